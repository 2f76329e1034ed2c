"""Whatever is in the event store: windows get verdicts, what is bad is counted, the next run goes on."""

import json
import math
import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import text

from flows.release.outcomes import read_outcomes
from monitoring.feedback.labels import ServedTask
from monitoring.feedback.rows import label_rows
from monitoring.traffic.windows import find_closed_windows
from monitoring.verdicts import NOT_DECIDED, get_window_folder, read_verdicts, write_verdict
from monitoring.watching import judge, judge_new_windows, read_reference
from services.events.database import check_url, make_engine
from stages.common.params.loading import load_params
from stages.common.task.kinds import JsonTask
from tests.exchanges import VERSION
from tests.monitoring.store import add, exchange, feedback, stored

TAG = f"toy:{VERSION}"
SHIPPED = load_params("params.yaml").monitoring
REFERENCE, WINDOW, WINDOWS = 60, 30, 3
ROWS = REFERENCE + WINDOW * WINDOWS
SETTINGS = SHIPPED.model_copy(
    update={
        "reference": SHIPPED.reference.model_copy(update={"rows": REFERENCE}),
        "window": SHIPPED.window.model_copy(update={"rows": WINDOW, "min_rows": 1, "settle_s": 10.0}),
        "drift": SHIPPED.drift.model_copy(update={"permutations": 200, "calibration_windows": 3}),
    }
)
NOW = 1e6
SCHEMA = {"type": "object", "properties": {"intent": {"enum": ["On", "Off"]}}, "required": ["intent"]}
TASK = ServedTask(JsonTask("intent"), SCHEMA, None, 100_000, 100_000)

DEEP = "[" * 50_000 + "]" * 50_000
BIG = "word " * 200_000  # a megabyte
NUMBERS = (math.inf, -math.inf, -1.0, -0.0, 5e-324, 1e7, 1e300, 1e308)


def asked(*contents, role="user"):
    return json.dumps([{"role": role, "content": content} for content in contents])


ANSWERS = (
    *("", "   ", "null", "[]", "0", "NaN", "-Infinity", "1e999", '"On"', "On", "\u0000", "9" * 4000, DEEP),
    *('{"intent": NaN}', '{"intent": 1e999}', '{"intent": null}', '{"intent": {}}', '{"intent": []}'),
    *(
        r'{"intent": "\ud83d"}',
        r'{"\ud83d": 1, "\udc00": 2}',
        r'"\ud83d"',
        '{"": 1}',
        '{"form": 1, "chars": 2}',
    ),
    *(
        '{"intent": "On", "intent": "Off"}',
        '{"intent": "Neither"}',
        '{"$x$": "<script>", "a\u2028b": "=1+1"}',
    ),
    json.dumps({f"k{n}": n for n in range(3000)}),
    json.dumps({"intent": BIG}),
    json.dumps({BIG: "On"}),
    f'{{"intent": {DEEP}}}',
    BIG,
)
MESSAGES = (
    *(
        "",
        "null",
        "[]",
        "{}",
        "no JSON",
        "NaN",
        DEEP,
        "[1]",
        '[{"role": "user"}]',
        '[{"role": 1, "content": "a"}]',
    ),
    *(
        asked(""),
        asked("a", "b"),
        asked("a", role="system"),
        asked("a", role="assistant"),
        asked(BIG),
        asked(None),
    ),
    *(asked("\ud83d"), asked("turn on the \udc00 light"), asked([]), asked([{"type": "text", "text": "a"}])),
    *(asked("a", role="\ud83d"), asked("\u202eturn on"), asked("👍" * 300), asked("\u0000")),
)
DECISIONS = (
    *(
        "",
        "null",
        "[]",
        "{}",
        "no JSON",
        DEEP,
        '{"toxicity": true}',
        '{"toxicity": [null, 1]}',
        '{"toxicity": []}',
    ),
    *('{"toxicity": [false, "\\ud83d"]}', r'{"\ud83d": [true, null]}', '{"secrets": [false, NaN]}'),
)
HOSTILE = st.one_of(
    st.sampled_from(ANSWERS).map(lambda value: {"answer": value}),
    st.sampled_from(MESSAGES).map(lambda value: {"messages": value}),
    st.sampled_from(DECISIONS).map(lambda value: {"decisions": value}),
    st.sampled_from(("", "null", "[]", "no JSON", DEEP)).map(lambda value: {"parameters": value}),
    st.sampled_from((-1, 0, 42, 200, 400, 404, 499, 500, 503, 599, 600, 2**31 - 1)).map(
        lambda value: {"status": value}
    ),
    st.sampled_from((-1, 0, 2**31 - 1)).map(
        lambda value: {"prompt_tokens": value, "completion_tokens": value}
    ),
    st.tuples(
        st.sampled_from(("queue_s", "first_token_s", "total_s", "mean_logprob")), st.sampled_from(NUMBERS)
    ).map(lambda pair: dict([pair])),
    st.sampled_from((None, "", "cancelled", "length", "?" * 10_000)).map(
        lambda value: {"finish_reason": value}
    ),
    st.sampled_from(("", "one", "\u202e", "x" * 100_000)).map(lambda value: {"session": value}),
    st.sampled_from(("", "one", "x" * 100_000)).map(lambda value: {"session": None, "user": value}),
    st.sampled_from((-math.inf, -1e300, -1.0, 0.0, 1000.0, 1100.5, 2e6, 1e12, 1e300, math.inf)).map(
        lambda value: {"received_at": value}
    ),
    st.just(
        {"answer": None, "finish_reason": None, "status": 503, "mean_logprob": None, "first_token_s": None}
    ),
    st.just({"valid_output": None, "mean_logprob": None, "first_token_s": None}),
    st.sampled_from(("shadow", "challenger", "")).map(lambda value: {"role": value}),
)
WORDS = (
    "",
    " ",
    "On",
    "NaN",
    '{"intent": "On"}',
    '{"intent": "Neither"}',
    r'{"intent": "\ud83d"}',
    DEEP,
    BIG,
    None,
)
FEEDBACK = st.builds(
    lambda number, at, thumb, correction: feedback(number, at=at, thumb=thumb, correction=correction),
    st.integers(0, ROWS + 20),  # the last ones are on events that do not exist
    st.sampled_from((-1e300, 0.0, 1500.0, NOW, 1e300, math.inf)),
    st.sampled_from((1, -1, None)),
    st.sampled_from(WORDS),
)


@st.composite
def stores(draw):
    """Draw the events of a store: usual ones, of which any may be hostile, alone or all in the same way."""
    events = [usual(number) for number in range(ROWS)]
    if draw(st.booleans()):
        changes = draw(HOSTILE.filter(is_short))
        first = draw(st.sampled_from((0, REFERENCE // 2, REFERENCE, REFERENCE + WINDOW)))
        last = draw(st.sampled_from((REFERENCE, REFERENCE + WINDOW, ROWS)))
        events[first:last] = [replace(event, **changes) for event in events[first:last]]
    for place, changes in draw(st.lists(st.tuples(st.integers(0, ROWS - 1), HOSTILE), max_size=12)):
        events[place] = replace(events[place], **changes)
    given_words = draw(st.lists(FEEDBACK, max_size=12, unique_by=lambda one: one.feedback_id))
    return [*events, *given_words]


def is_short(changes):
    return all(len(value) < 1000 for value in changes.values() if isinstance(value, str))


def usual(number, at=None):
    words = ("turn on the light", "is the door locked", "close the blind", "how warm is it")[number % 4]
    answer = json.dumps({"intent": "On" if number % 3 else "Off", "area": f"room {number % 5}"})
    return exchange(number, at, messages=asked(words), answer=answer)


def read_usual(url):
    return read_reference(url, TAG, SETTINGS, NOW)


def find_windows(url, reference):
    return find_closed_windows(url, reference.window.end, TAG, SETTINGS.window, NOW, 50)


def judge_all(root, url):
    """Look at production once, as `perennial watch` does."""
    reference = read_usual(url)
    if reference is None:
        return []
    return list(judge_new_windows(root, url, reference, SETTINGS, lambda _: NOT_DECIDED, now=NOW, limit=50))


def check_verdict(root, verdict, window):
    """Check that a window was judged or passed with a reason, and nothing in it went away in silence."""
    assert (verdict.id, verdict.problems) == (window.name, ())
    assert verdict.judged or verdict.why_not
    assert verdict.window.rows + sum(verdict.quarantined.values()) == window.rows
    assert count_lines(get_window_folder(root, verdict.id) / "quarantined.jsonl") == verdict.quarantined


def count_lines(path):
    """Return the quarantined events of a window by reason, as its file has them."""
    lines = path.read_text().splitlines() if path.exists() else []
    return Counter(json.loads(line)["reason"] for line in lines)


def check_feedback(url):
    """Learn from a store; check that each piece of feedback became a row or was counted with its reason."""
    report = label_rows(url, 0.0, NOW, SETTINGS.feedback, TASK).report
    assert report["given"] == report["labelled_rows"] + sum(report["excluded"].values())
    by_key = report["by_key"].values()
    assert sum(sum(one["excluded"].values()) for one in by_key) == sum(report["excluded"].values())
    json.dumps(report, allow_nan=False).encode()
    assert all(one.at < NOW for one in read_outcomes(url, 0.0, NOW, TAG, "champion"))


def check_store(root, url):
    """Judge each window of a store, write its verdict, and learn from the feedback in it."""
    reference = read_usual(url)
    for window in find_windows(url, reference) if reference else []:
        verdict = judge(root, url, reference, window, SETTINGS, NOW)
        write_verdict(root, verdict)
        check_verdict(root, verdict, window)
    check_feedback(url)


CHECKS = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture]


@pytest.mark.slow
@settings(max_examples=25, deadline=None, suppress_health_check=CHECKS)
@given(events=stores())
def test_each_window_of_any_store_gets_a_verdict_and_all_feedback_is_learned_or_counted(events):
    with tempfile.TemporaryDirectory() as folder:
        url = f"sqlite:///{folder}/events.db"
        stored(url, *events)
        check_store(Path(folder), url)


@pytest.mark.slow
@settings(max_examples=4, deadline=None, suppress_health_check=CHECKS)
@given(events=stores())
def test_any_store_is_watched_to_its_end_and_the_next_run_goes_on(events):
    with tempfile.TemporaryDirectory() as folder:
        root, url = Path(folder), f"sqlite:///{folder}/events.db"
        stored(url, *events)
        verdicts = judge_all(root, url)
        reference = read_usual(url)
        for verdict, window in zip(verdicts, find_windows(url, reference) if reference else [], strict=True):
            check_verdict(root, verdict, window)
        assert read_verdicts(root) == verdicts
        assert judge_all(root, url) == []
        add(url, *(usual(ROWS + number, at=5e5 + number) for number in range(WINDOW)))
        if reference is not None:
            assert judge_all(root, url) != []


@pytest.mark.slow
def test_a_store_in_postgresql_is_watched_to_its_end_too(postgresql, tmp_path):
    """It holds NaN, which SQLite does not; one store after another, in one database."""
    for example in range(5):
        nan = dict.fromkeys(("queue_s", "total_s", "mean_logprob", "first_token_s"), math.nan)
        events = [usual(number) for number in range(ROWS)]
        events[example * 20 : example * 20 + 40] = [
            replace(event, **nan) for event in events[example * 20 : example * 20 + 40]
        ]
        events[-1] = replace(events[-1], received_at=math.nan)
        told = feedback(3, at=math.nan, correction='{"intent": "On"}')
        stored(postgresql.url, *events, told, feedback(ROWS + 9, thumb=1))
        check_store(tmp_path / str(example), postgresql.url)
        write(postgresql.url, "TRUNCATE exchanges, feedback")


# What SQLite keeps though its columns are of other types, and what a damaged page may look like.
DAMAGE = [
    "answer = CAST(x'7bff7d' AS TEXT)",  # no UTF-8
    "messages = x'00ff'",
    "messages = CAST(x'ff' AS TEXT)",
    "user = x'01'",
    "status = 'many'",
    "status = 200.5",
    "prompt_tokens = x'00'",
    "total_s = 'long'",
    "mean_logprob = 'high'",
    "first_token_s = x'00'",
    "decisions = x'ff'",
    "valid_output = 'yes'",
    "answer = x'7b7d'",
    "key_id = x'ff'",
]


def test_damaged_rows_are_set_aside_or_read_and_end_nothing(tmp_path):
    url = stored(f"sqlite:///{tmp_path}/events.db", *(usual(number) for number in range(ROWS)))
    for number, changed in enumerate(DAMAGE, REFERENCE):
        write(url, f"UPDATE exchanges SET {changed} WHERE request_id = 'r{number:05}'")
    check_store(tmp_path, url)
    first, *others = read_verdicts(tmp_path)
    assert first.judged and first.window.rows >= WINDOW - len(DAMAGE)
    assert all(verdict.judged and not verdict.quarantined for verdict in others)


def test_damaged_feedback_ends_no_learning(tmp_path):
    url = stored(f"sqlite:///{tmp_path}/events.db", *(usual(number) for number in range(ROWS)))
    told = [feedback(number, correction='{"intent": "On"}') for number in range(4)]
    add(url, *told)
    for number, changed in enumerate(("correction = x'ff'", "given_at = 'soon'", "key_id = x'01'")):
        write(url, f"UPDATE feedback SET {changed} WHERE request_id = 'r{number:05}'")
    check_feedback(url)
    assert label_rows(url, 0.0, NOW, SETTINGS.feedback, TASK).report["labelled_rows"] >= 1


def test_a_window_whose_rows_alone_cannot_be_read_is_passed_with_the_reason(tmp_path):
    giant = "giant " * 20_000
    events = [usual(number) for number in range(REFERENCE + WINDOW)]
    events[REFERENCE:] = [replace(event, messages=asked(giant)) for event in events[REFERENCE:]]
    url = stored(f"sqlite:///{tmp_path}/events.db", *events)
    break_pages(tmp_path / "events.db", b"giant giant")
    (passed,) = judge_all(tmp_path, url)
    (problem,) = passed.problems
    assert not passed.judged and "its rows cannot be read" in problem and "malformed" in problem
    assert judge_all(tmp_path, url) == []


def break_pages(path, marker, size=4096):
    """Break the pages of long texts that hold `marker`: each begins with the number of the next page."""
    pages = path.read_bytes()
    with path.open("r+b") as file:
        for start in range(size, len(pages), size):
            if pages[start] == 0 and marker in pages[start : start + size]:
                file.seek(start)
                file.write(b"\x7f\xff\xff\xff")


def write(url, statement):
    engine = make_engine(check_url(url))
    with engine.execution_options(writes=True).begin() as connection:
        connection.execute(text(statement))
    engine.dispose()


def test_a_reference_of_which_nothing_can_be_read_is_told_in_each_verdict(tmp_path):
    events = [replace(usual(number), messages="no JSON") for number in range(REFERENCE)]
    url = stored(f"sqlite:///{tmp_path}/events.db", *events, *map(usual, range(REFERENCE, ROWS)))
    check_store(tmp_path, url)
    for verdict in read_verdicts(tmp_path):
        assert not verdict.judged and verdict.reference is None
        assert "the reference has no rows" in verdict.why_not
        assert "monitoring.reference.rows" in verdict.why_not
