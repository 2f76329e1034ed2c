"""What the loop leaves in a checkout, small and made up: for the pages that show it."""

import asyncio
import json
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path

from flows.gate.verdict import Criterion, GateVerdict
from flows.gate.verdict import write_verdict as write_gate_verdict
from flows.release.canary import CanaryVerdict
from monitoring.verdicts import (
    ColumnChange,
    DriftTypeVerdict,
    DriftVerdict,
    Period,
    TriggerDecision,
    write_verdict,
)
from services.events import Feedback, open_store
from stages.common.artifacts import write_json
from tests.exchanges import EXCHANGE

ROOT = Path(__file__).parents[2]
NAME = "home-assistant-intents"
FORMER, CHAMPION, CHALLENGER, POISONED = (
    f"{NAME}:{version}" for version in ("0123456789ab", "4b5c6d7e8f90", "deadbeef0001", "bad000bad000")
)


def change(column, kind, *, drifted=False, effect=0.02, summary="as before"):
    p_value = 0.0005 if drifted else 0.4
    return ColumnChange(column, kind, effect, p_value, 1.1, drifted, "0 %", "11 %", summary)


def verdict(end, *, drifted=False, version="4b5c6d7e8f90", judged=True, rows=500, columns=None):
    """A verdict on the hour before `end`; when drifted, German is asked and answers break."""
    columns = columns or {
        "input": [
            change(
                "language",
                "category",
                drifted=drifted,
                effect=0.11 if drifted else 0.01,
                summary="language: de 0 % -> 11 % of 500 prompts" if drifted else "as before",
            ),
            change("prompt_chars", "number"),
            change("prompt_vector", "vector"),
        ],
        "output": [change("finish_reason", "category")],
        "quality": [change("valid_output", "flag"), change("thumb", "flag")],
    }
    drift_types = tuple(
        DriftTypeVerdict(
            drift_type,
            any(one.drifted for one in found),
            min(one.p_value for one in found),
            tuple(found),
        )
        for drift_type, found in columns.items()
    )
    return DriftVerdict(
        id=f"{time.strftime('%Y%m%dT%H%M%S', time.gmtime(end - 3600))}-{rows}",
        model=NAME,
        version=version,
        made_at=end + 40,
        window=Period(end - 3600, end, rows, rows // 5),
        reference=Period(end - 90_000, end - 86_400, 2000, 400),
        judged=judged,
        why_not=None if judged else "only 42 rows, 100 are needed",
        drifted=judged and drifted,
        drift_types=drift_types if judged else (),
        quarantined={"no user message": 2},
        alpha=0.005,
        service={"total_p95_s": 0.61},
        trigger=TriggerDecision(
            drifted, "2 of the last 3 windows drifted", () if drifted else ("23 more labelled rows",)
        ),
    )


def gate(tag, at, *, passed):
    summary = "31 points better" if passed else "42 points worse"
    value, low, high = (0.31, 0.24, 0.38) if passed else (-0.42, -0.5, -0.33)
    new = f"{summary} on 214 held-out rows of the new traffic."
    criteria = (
        Criterion("new_window", "better", value, low, high, 0.0, passed, new),
        Criterion("card", "documented", None, None, None, None, True, "The model card is complete."),
    )
    return GateVerdict(tag, FORMER, at, passed, "champion", criteria, {}, {})


def trial(tag, since):
    return CanaryVerdict(
        tag=tag,
        baseline=FORMER,
        kind="canary",
        state="good",
        since=since,
        made_at=since + 60,
        requests=214,
        needed=100,
        baseline_requests=214,
        timed_out=False,
        analyses=1,
        alpha=0.01,
        criteria=(),
        summary="No sign of harm in 214 answers.",
    )


def release(at, action, tag, champion, reason):
    return {
        "id": str(at),
        "at": at,
        "action": action,
        "tag": tag,
        "by": "retrain",
        "reason": reason,
        "champion": champion,
        "challenger": None,
        "former": FORMER,
    }


def exchange(number, at, *, version="4b5c6d7e8f90", status=200, valid=True, role="champion"):
    return replace(
        EXCHANGE,
        request_id=f"r{number}",
        received_at=at,
        session=f"s{number // 5}",
        role=role,
        model=NAME,
        version=version,
        status=status,
        valid_output=valid,
    )


def record(root, events):
    """Put events into the store of the checkout at `root`."""

    async def all_of_them(store):
        await asyncio.gather(*(store.record(event) for event in events))

    (root / ".perennial").mkdir(exist_ok=True)
    url = f"sqlite:///{root / '.perennial' / 'events.db'}"
    store = open_store(url, queue_size=len(events), group_rows=512, group_wait_s=0.0)
    try:
        # In a thread of its own: Playwright's has a loop already.
        thread = threading.Thread(target=lambda: asyncio.run(all_of_them(store)))
        thread.start()
        thread.join()
    finally:
        store.close()


def thumb(number, at, up):
    return Feedback(f"f{number}", f"r{number}", at, None, 1 if up else -1, None, None)


def leave_traces(root, now, *, traffic=True):
    """Write a checkout in which the loop went round once, in the 26 hours before `now`."""
    hour = 3600.0
    began = now - 26 * hour
    private = root / ".perennial"
    write_json(
        private / "aliases.json",
        {
            "champion": CHAMPION,
            "challenger": {"tag": CHALLENGER, "share": 0.2, "mode": "canary", "since": began + 20 * hour},
            "history": [FORMER],
            "champion_since": began + 18.8 * hour,
            "replaced": FORMER,
            "pinned": None,
            "release": None,
        },
    )
    for number in range(12):
        version = FORMER if number < 9 else CHAMPION
        drifted = 6 <= number < 9
        write_verdict(
            root,
            verdict(
                began + (2 + 2 * number) * hour,
                drifted=drifted,
                version=version.split(":")[1],
                judged=number > 0,
            ),
        )
    write_gate_verdict(root, gate(CHAMPION, began + 18 * hour, passed=True))
    write_gate_verdict(root, gate(POISONED, began + 16 * hour, passed=False))
    report = {"tag": CHAMPION, "canary": asdict(trial(CHAMPION, began + 18.1 * hour)), "bake": None}
    write_json(root / "reports/canary/4b5c6d7e8f90.json", report)
    releases = [
        release(began, "promote", FORMER, FORMER, "the first model"),
        release(began + 16.1 * hour, "reject", POISONED, FORMER, "the gate rejected it"),
        release(began + 18.8 * hour, "promote", CHAMPION, CHAMPION, "2 of the last 3 windows drifted"),
    ]
    (private / "releases.jsonl").write_text("".join(json.dumps(one) + "\n" for one in releases))
    write_json(
        root / "reports/feedback.json",
        {
            "given": 812,
            "exchanges": 6512,
            "rows_train": 411,
            "rows_holdout": 176,
            "excluded": {"contradiction": 12},
        },
    )
    if traffic:
        record(root, _requests_and_thumbs(began, hour))


def _requests_and_thumbs(began, hour):
    events = []
    for number in range(400):
        at = began + 26 * hour * number / 400
        bad = began + 13 * hour < at < began + 18.8 * hour
        version = (CHAMPION if at > began + 18.8 * hour else FORMER).split(":")[1]
        events.append(
            exchange(
                number,
                at,
                version=version,
                status=500 if number % 97 == 0 else 200,
                valid=not (bad and number % 3 == 0),
            )
        )
        if number % 2:
            events.append(thumb(number, at + 5, not (bad and number % 4 == 1)))
    return events
