"""A challenger among the users, and a new champion on probation: are they worse than who was there before?

Four things are compared, as shares of the answered requests: failures (status 5xx), answers of no valid
form, thumbs down, corrections. Over requests and not over those with feedback: somebody who only writes when
an answer is wrong would make every share 1.

The test is a permutation of users (else sessions, else requests) between both sides, one-sided, corrected by
Holm over the four. On trial it is exact: a hash deals users to the sides. On probation it compares with the
former champion's last equally many requests, whose feedback counts only as far as the new ones had time to
get any; users who were there before and after make it stricter than it says.

It looks four times, at each quarter of the requests it waits for, so that a disaster ends soon. The looks
share `alpha`: a tenth for each of the first three, the rest for the last (Bonferroni). What a look sees is
fixed by the requests alone (what was given until `settle_s` after the last of them), not by who polls when.
"""

from __future__ import annotations

import logging
import math
import time
from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from flows.release.actions import CANARY
from flows.release.journal import done_releases, trial_record
from monitoring.traffic.features import same_answer
from services.events import read_joined
from services.versions.__main__ import ALIASES, read_aliases
from stages.common.artifacts import read_json, write_json
from stages.common.association import holm
from stages.common.errors import InputError
from stages.common.params.loading import Params
from stages.common.params.loop import CanarySettings

LOOKS = (0.25, 0.5, 0.75, 1.0)  # of the requests waited for
SPENT = (0.1, 0.1, 0.1, 0.7)  # of alpha, at each look
MIN_OTHER = 20  # requests of the other side; fewer are nothing to compare with
# Permutations for one threshold: enough that the least p-value of all criteria lies well below it.
PER_THRESHOLD = 5
MIN_PERMUTATIONS, MAX_PERMUTATIONS = 2000, 100_000
FIRST_PERMUTATIONS = 500  # then as many again, while a p-value may still become small
CHUNK = 2_000_000  # random numbers in memory at once
FIRST_SEARCH_S = 3600.0  # back in time, for the former champion's last requests; then four times as far
MAX_SEARCH_S = 366 * 86_400.0
SEED = 7

Floats = NDArray[np.float64]
Kind = Literal["canary", "probation"]
State = Literal["wait", "good", "bad"]

logger = logging.getLogger("flows.release.canary")


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one request.

    Attributes:
        at: when it was received, unix s.
        asker: the user, else the session, else the key, else the request itself.
        valid: whether the answer had the right form; None where nobody looked.
        thumb_down_at, corrected_at: when it was first said, unix s; None if never.
    """

    at: float
    asker: str
    failed: bool
    valid: bool | None
    thumb_down_at: float | None
    corrected_at: float | None


@dataclass(frozen=True, slots=True)
class CanaryCriterion:
    """One thing that may have become worse; `value` and `other` are shares of the requests.

    Attributes:
        value: of the version that is judged; other: of whom it is compared with.
        p_value: how often chance alone makes a difference as large, corrected for all criteria (Holm).
        threshold: the look's share of alpha; a p-value above it passes.
    """

    name: str
    question: str
    value: float
    other: float
    p_value: float
    threshold: float
    passed: bool
    said: str


@dataclass(frozen=True, slots=True)
class CanaryVerdict:
    """What the users' side says of a version.

    Attributes:
        other: whom it is compared with.
        since: when its trial, or its time as champion, began, unix s.
        requests, needed: answered by it, and waited for.
        silent: the users did not come in time, and the settings decided.
        looks: how many of `LOOKS` were taken.
        alpha: for all looks together.
    """

    tag: str
    other: str | None
    kind: Kind
    state: State
    since: float
    made_at: float
    requests: int
    needed: int
    other_requests: int
    silent: bool
    looks: int
    alpha: float
    criteria: tuple[CanaryCriterion, ...]
    said: str


# What is worse, its question, and whether it takes time until somebody says it.
CRITERIA = (
    ("failed", "do requests fail?"),
    ("invalid", "do answers lose their form?"),
    ("thumb_down", "do users dislike the answers?"),
    ("corrected", "do users correct the answers?"),
)


def judge_trial(root: Path, params: Params, now: float | None = None) -> CanaryVerdict:
    """Judge the challenger on what users got since its trial began, and write the report.

    Raises:
        InputError: nobody is on trial by a release, or the event store cannot be read.
    """
    now = time.time() if now is None else now
    aliases = read_aliases(root / ALIASES)
    begun = trial_record(root, aliases.challenger.tag) if aliases.challenger else None
    if aliases.challenger is None or begun is None or aliases.champion is None:
        raise InputError("no version is on trial", "python -m flows.release try TAG --why TEXT")
    settings, tag = params.flows.retrain.canary, aliases.challenger.tag
    url = store_url(root, params)
    new = list(outcomes(url, begun.at, now, tag, "challenger"))
    old = list(outcomes(url, begun.at, now, aliases.champion, "champion"))
    verdict = judge_canary(
        "canary",
        tag,
        aliases.champion,
        new,
        old,
        settings,
        needed=settings.min_requests,
        since=begun.at,
        now=now,
        settle_s=params.monitoring.window.settle_s,
        looks=_looks_taken(root, tag, "canary", begun.at),
    )
    _write(root, verdict)
    return verdict


def judge_probation(root: Path, params: Params, now: float | None = None) -> CanaryVerdict | None:
    """Judge the champion against the former one, and write the report; None if it is on no probation.

    It is on probation until so many requests were answered, if it was promoted in another's place.

    Raises:
        InputError: the event store cannot be read.
    """
    now = time.time() if now is None else now
    settings = params.flows.retrain.canary
    champion = read_aliases(root / ALIASES).champion
    moves = [record for record in done_releases(root) if record.action in ("promote", "roll_back")]
    last = moves[-1] if moves else None
    if last is None or last.action != "promote" or last.tag != champion or last.former is None:
        return None
    known = _read(root, str(champion)).get("probation")
    over = known is not None and known["since"] == last.at and known["state"] == "good"
    if over or champion is None or not settings.probation_requests:
        return None
    url = store_url(root, params)
    new = list(outcomes(url, last.at, now, champion, "champion", settings.probation_requests))
    old = _last_before(url, last.at, last.former, len(new))
    verdict = judge_canary(
        "probation",
        champion,
        last.former,
        new,
        old,
        settings,
        needed=settings.probation_requests,
        since=last.at,
        now=now,
        settle_s=params.monitoring.window.settle_s,
        looks=_looks_taken(root, champion, "probation", last.at),
    )
    _write(root, verdict)
    return verdict


def judge_canary(
    kind: Kind,
    tag: str,
    other: str,
    new: Sequence[Outcome],
    old: Sequence[Outcome],
    settings: CanarySettings,
    *,
    needed: int,
    since: float,
    now: float,
    settle_s: float,
    looks: int = 0,
) -> CanaryVerdict:
    """Return the verdict on what users got from a version and from another.

    Args:
        new, old: what became of their requests, in the order of time.
        needed: requests of the new one to wait for.
        looks: that were taken before, and found nothing.
    """
    blank = CanaryVerdict(
        tag=tag,
        other=other,
        kind=kind,
        state="wait",
        since=since,
        made_at=now,
        requests=len(new),
        needed=needed,
        other_requests=len(old),
        silent=False,
        looks=looks,
        alpha=settings.alpha,
        criteria=(),
        said=f"{len(new)} of {needed} requests",
    )
    verdict = blank
    for number in range(looks, len(LOOKS)):
        quota = math.ceil(LOOKS[number] * needed)
        if len(new) < quota or now < new[quota - 1].at + settle_s:
            break
        last = number + 1 == len(LOOKS)
        ours, seen_until = new[:quota], new[quota - 1].at + settle_s
        theirs: Sequence[Outcome] = _compared_with(kind, old, ours, seen_until)
        if len(theirs) < MIN_OTHER and last and kind == "canary":
            # Nearly everybody is on trial: the champion's requests are waited for, too.
            ours, theirs, seen_until = new, old, now
        if len(theirs) < MIN_OTHER:
            if not last:
                continue
            if kind == "canary":
                break
            said = f"{other} answered {len(theirs)} requests: nothing to compare with"
            return replace(blank, state="good", looks=len(LOOKS), said=said)
        criteria = _compare(kind, ours, theirs, seen_until, SPENT[number] * settings.alpha)
        worse = [criterion.said for criterion in criteria if not criterion.passed]
        state: State = "bad" if worse else "good" if last else "wait"
        said = f"after {quota} requests: {'; '.join(worse)}" if worse else _all_well(quota, other, last)
        verdict = replace(blank, state=state, looks=number + 1, criteria=criteria, said=said)
        if worse:
            return verdict
    if verdict.state == "wait" and kind == "canary" and now - since > 60.0 * settings.max_minutes:
        return _at_silence(verdict, new, old, settings, now)
    return verdict


def outcomes(
    url: str, start: float, end: float, tag: str, role: str, limit: int | None = None
) -> Iterator[Outcome]:
    """Yield what became of a version's requests in [start, end), in the order of time, at most `limit`.

    Refused requests (4xx) are the asker's doing, and answers that nobody waited for (499) tell nothing.

    Raises:
        InputError: there is no store, or it cannot be read.
    """
    version, found = tag.rpartition(":")[2], 0
    for batch in read_joined(url, start, end):
        for row in batch.to_pylist():
            if row["version"] != version or row["role"] != role or 400 <= row["status"] < 500:
                continue
            yield outcome(row)
            found += 1
            if limit is not None and found >= limit:
                return


def outcome(row: dict[str, Any]) -> Outcome:
    """Return what became of one exchange, as `services.events.read_joined` gives it."""
    down = [given["given_at"] for given in row["feedback"] if given["thumb"] == -1]
    corrected = [
        given["given_at"]
        for given in row["feedback"]
        if given["correction"] and not same_answer(row["answer"] or "", given["correction"])
    ]
    return Outcome(
        at=row["received_at"],
        asker=str(row["user"] or row["session"] or row["key_id"] or row["request_id"]),
        failed=row["status"] >= 500,
        valid=row["valid_output"],
        thumb_down_at=min(down, default=None),
        corrected_at=min(corrected, default=None),
    )


def store_url(root: Path, params: Params) -> str:
    """Return the event store's URL, with a relative file taken from the checkout."""
    url = params.services.events.url
    kind, slashes, path = url.partition(":///")
    if kind.startswith("sqlite") and slashes and not path.startswith("/"):
        return f"{kind}:///{root / path}"
    return url


def _compared_with(
    kind: Kind, old: Sequence[Outcome], new: Sequence[Outcome], seen_until: float
) -> list[Outcome]:
    """Return the other side of a look: of the same period, or the last equally many before it.

    Before a promotion feedback had longer to come. An old request is paired with a new one, by their order,
    and what was said of it later than of the new one can have been said does not count.
    """
    if kind == "canary":
        return [one for one in old if one.at <= new[-1].at]
    before = list(old[-len(new) :])
    return [
        _until(one, one.at + (seen_until - paired.at))
        for one, paired in zip(before, new[len(new) - len(before) :], strict=True)
    ]


def _until(one: Outcome, until: float) -> Outcome:
    """Return an outcome as it was known then."""
    down, corrected = (
        at if at is not None and at <= until else None for at in (one.thumb_down_at, one.corrected_at)
    )
    return replace(one, thumb_down_at=down, corrected_at=corrected)


def _compare(
    kind: Kind, new: Sequence[Outcome], old: Sequence[Outcome], seen_until: float, alpha: float
) -> tuple[CanaryCriterion, ...]:
    """Test all criteria that have something to compare, at a family-wise level of `alpha`."""
    if kind == "canary":
        old = [_until(one, seen_until) for one in old]
    new = [_until(one, seen_until) for one in new]
    sums, is_new = _by_asker(new, old)
    if math.comb(len(is_new), int(is_new.sum())) < _permutations(len(CRITERIA), alpha):
        # So few askers can be dealt in so few ways that no p-value would be small enough, whatever happens.
        # Taking their requests for independent sends a good one back too often, and lets no bad one through.
        sums, is_new = _by_asker(_alone(new), _alone(old))
    # Of each criterion: how many were bad, and of how many.
    bad, known = sums[:, : len(CRITERIA)], sums[:, len(CRITERIA) :]
    sides = [(bad[side].sum(axis=0), known[side].sum(axis=0)) for side in (is_new, ~is_new)]
    judged = [place for place in range(len(CRITERIA)) if all(counts[place] > 0 for _, counts in sides)]
    p_values = _permutation(bad[:, judged], known[:, judged], is_new, alpha)
    shares = [[bads[place] / counts[place] for place in judged] for bads, counts in sides]
    corrected = holm(p_values.tolist())
    return tuple(
        CanaryCriterion(
            *CRITERIA[place],
            value=float(shares[0][n]),
            other=float(shares[1][n]),
            p_value=corrected[n],
            threshold=alpha,
            passed=corrected[n] > alpha,
            said=(
                f"{CRITERIA[place][0].replace('_', ' ')}: {shares[0][n]:.1%} of its requests, "
                f"{shares[1][n]:.1%} of the other's (p = {corrected[n]:.4f})"
            ),
        )
        for n, place in enumerate(judged)
    )


def _by_asker(new: Sequence[Outcome], old: Sequence[Outcome]) -> tuple[Floats, NDArray[np.bool_]]:
    """Return the sums of each asker on each side, and which of them are on the new side."""
    sums: defaultdict[tuple[bool, str], Floats] = defaultdict(lambda: np.zeros(2 * len(CRITERIA)))
    for is_new, side in ((True, new), (False, old)):
        for one in side:
            answered = float(not one.failed)
            bad = (
                float(one.failed),
                float(one.valid is False),
                float(one.thumb_down_at is not None),
                float(one.corrected_at is not None),
            )
            known = (1.0, float(one.valid is not None), answered, answered)
            sums[is_new, one.asker] += np.array([*bad, *known])
    return np.array(list(sums.values())), np.array([is_new for is_new, _ in sums], dtype=bool)


def _permutation(bad: Floats, known: Floats, is_new: NDArray[np.bool_], alpha: float) -> Floats:
    """Return the one-sided p-value of each criterion: askers are dealt to the sides anew.

    (1 + as bad) / (1 + dealt), never 0 (Phipson & Smyth 2010). Mostly nothing is worse, and a few deals show
    it: they end as soon as no criterion could come down to `alpha` any more, had all deals been made
    (sequential Monte Carlo p-values: Besag & Clifford 1991, Biometrika 78). So no decision is another one.
    """
    permutations = _permutations(bad.shape[1], alpha)
    plainly_large = alpha * (1 + permutations)
    askers, ours = len(is_new), int(is_new.sum())
    observed = _difference(is_new[None, :].astype(np.float64), bad, known)[0]
    rng = np.random.default_rng(SEED)
    as_bad, done = np.zeros(bad.shape[1]), 0
    while done < permutations and as_bad.min() < plainly_large:
        rows = min(permutations - done, done or FIRST_PERMUTATIONS, max(1, CHUNK // askers))
        dealt = np.zeros((rows, askers))
        chosen = np.argpartition(rng.random((rows, askers)), ours - 1, axis=1)[:, :ours]
        np.put_along_axis(dealt, chosen, 1.0, axis=1)
        as_bad += (_difference(dealt, bad, known) >= observed - 1e-12).sum(axis=0)
        done += rows
    p_values: Floats = (1.0 + as_bad) / (1.0 + done)
    return p_values


def _permutations(criteria: int, alpha: float) -> int:
    wanted = math.ceil(PER_THRESHOLD * max(1, criteria) / alpha)
    return min(MAX_PERMUTATIONS, max(MIN_PERMUTATIONS, wanted))


def _alone(outcomes: Sequence[Outcome]) -> list[Outcome]:
    return [replace(one, asker=str(number)) for number, one in enumerate(outcomes)]


def _difference(dealt: Floats, bad: Floats, known: Floats) -> Floats:
    """Return the share of bad ones on the new side minus that on the other: shape (dealt, criteria)."""
    ours_bad, ours = dealt @ bad, dealt @ known
    theirs_bad, theirs = bad.sum(axis=0) - ours_bad, known.sum(axis=0) - ours
    shares = [
        np.divide(top, bottom, out=np.zeros_like(top), where=bottom > 0)
        for top, bottom in ((ours_bad, ours), (theirs_bad, theirs))
    ]
    # A side of which nothing is known says nothing.
    found: Floats = np.where((ours > 0) & (theirs > 0), shares[0] - shares[1], 0.0)
    return found


def _at_silence(
    verdict: CanaryVerdict,
    new: Sequence[Outcome],
    old: Sequence[Outcome],
    settings: CanarySettings,
    now: float,
) -> CanaryVerdict:
    """Decide a trial to which too few users came, by what there is, and else as the settings say."""
    waited = f"{len(new)} of {verdict.needed} requests after {settings.max_minutes:g} minutes"
    if new and len(old) >= MIN_OTHER:
        criteria = _compare("canary", new, old, now, SPENT[-1] * settings.alpha)
        worse = [criterion.said for criterion in criteria if not criterion.passed]
        verdict = replace(verdict, criteria=criteria, looks=len(LOOKS))
        if worse:
            return replace(verdict, state="bad", said=f"{waited}: {'; '.join(worse)}")
    state: State = "good" if settings.on_silence == "promote" else "bad"
    said = f"{waited}; flows.retrain.canary.on_silence is {settings.on_silence}"
    return replace(verdict, state=state, silent=True, said=said)


def _all_well(requests: int, other: str, last: bool) -> str:
    return f"after {requests} requests nothing is worse than with {other}{'' if last else ' so far'}"


def _last_before(url: str, at: float, tag: str, count: int) -> list[Outcome]:
    """Return the last `count` outcomes of a champion before a time, looking back no farther than needed."""
    back_s = FIRST_SEARCH_S
    while count:
        found = deque(outcomes(url, at - back_s, at, tag, "champion"), maxlen=count)
        if len(found) == count or back_s > MAX_SEARCH_S:
            return list(found)
        back_s *= 4
    return []


def _looks_taken(root: Path, tag: str, kind: Kind, since: float) -> int:
    known = _read(root, tag).get(kind)
    if known is None or known["since"] != since or known["state"] != "wait":
        return 0
    return int(known["looks"])


def _path(root: Path, tag: str) -> Path:
    return root / CANARY / f"{tag.rpartition(':')[2]}.json"


def _read(root: Path, tag: str) -> dict[str, Any]:
    path = _path(root, tag)
    return dict(read_json(path)) if path.exists() else {}


def _write(root: Path, verdict: CanaryVerdict) -> None:
    known = {"canary": None, "probation": None} | _read(root, verdict.tag)
    write_json(_path(root, verdict.tag), known | {"tag": verdict.tag, verdict.kind: asdict(verdict)})
