"""The canary and the bake period: is a version worse for users than the one before it?

In a canary the challenger is compared with the champion over the same hours; users are assigned by a hash,
and the test is exact. In the bake period a new champion is compared with the same number of the former
champion's last requests, counting only feedback that arrived within the same delay. Returning users make
that test conservative.

There are four interim analyses, at each quarter of the required requests, so that a disaster ends early.
They share `alpha`: a tenth each for the first three, the rest for the last (alpha spending by Bonferroni).
The data of an analysis is fixed by the requests alone (feedback up to `settle_s` after the last of them), not
by when it is run.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from flows.common.clock import Moment, compute_elapsed_s, read_moment
from flows.release.comparison import CanaryCriterion, compare
from flows.release.outcomes import RequestOutcome, read_last_outcomes, read_outcomes, resolve_store_url
from services.versions.aliases import ALIASES, read_aliases
from stages.common.artifacts import read_json, write_json
from stages.common.errors import InputError
from stages.common.params.loop import CanarySettings
from stages.common.tag import Tag

ANALYSES = (0.25, 0.5, 0.75, 1.0)  # shares of the required requests
ALPHA_SPENDING = (0.1, 0.1, 0.1, 0.7)  # shares of alpha
MIN_BASELINE = 20  # requests of the baseline; fewer are too few to compare with

Kind = Literal["canary", "bake"]
State = Literal["wait", "good", "bad"]


@dataclass(frozen=True, slots=True)
class Trial:
    """A comparison of a version with the one before it.

    Attributes:
        baseline: tag of the version it is compared with.
        since: start of the canary, or of the version's time as champion, unix s.
        start: requests from then on count; before `since` if the clock was set back.
        waited_s: of a canary, by a clock that cannot be set; 0 in a bake period, which has no limit.
        needed: requests of the version to wait for.
        settle_s: wait for feedback on the last request of an analysis.
    """

    kind: Kind
    tag: str
    baseline: str
    since: float
    start: float
    waited_s: float
    needed: int
    settle_s: float


@dataclass(frozen=True, slots=True)
class CanaryVerdict:
    """The state of a trial.

    Attributes:
        requests, baseline_requests: answered by the version, and by its baseline.
        timed_out: too few users came in time, and flows.retrain.canary.on_timeout decided.
        start: see `Trial`; began: the first analysis of a canary.
        analyses: how many of `ANALYSES` were done.
        alpha: of all analyses together.
    """

    tag: str
    baseline: str
    kind: Kind
    state: State
    since: float
    made_at: float
    requests: int
    needed: int
    baseline_requests: int
    timed_out: bool
    analyses: int
    alpha: float
    criteria: tuple[CanaryCriterion, ...]
    summary: str
    start: float | None = None
    began: Moment | None = None


def judge_canary(
    root: Path, url: str, settings: CanarySettings, settle_s: float, now: float | None = None
) -> CanaryVerdict:
    """Judge the challenger on the requests since its canary began, and write the report.

    Args:
        url: of the event store.

    Raises:
        InputError: there is no challenger, or the event store cannot be read.
    """
    moment = read_moment(now)
    aliases = read_aliases(root / ALIASES)
    challenger = aliases.challenger
    if challenger is None or challenger.since is None or aliases.champion is None:
        raise InputError("no version is in canary", "perennial release canary TAG --reason TEXT")
    known = _read_known(root, challenger.tag, "canary", challenger.since)
    began = _find_beginning(known, challenger.since, moment)
    trial = Trial(
        "canary",
        challenger.tag,
        aliases.champion,
        challenger.since,
        _find_start(known, challenger.since, moment),
        compute_elapsed_s(began, moment),
        settings.min_requests,
        settle_s,
    )
    url = resolve_store_url(root, url)
    new = list(read_outcomes(url, trial.start, moment.at, trial.tag, "challenger"))
    old = list(read_outcomes(url, trial.start, moment.at, trial.baseline, "champion"))
    verdict = analyse(trial, new, old, settings, moment.at, _count_analyses(known))
    return _write(root, replace(verdict, began=began))


def judge_bake(
    root: Path, url: str, settings: CanarySettings, settle_s: float, now: float | None = None
) -> CanaryVerdict | None:
    """Judge a new champion against the one it replaced, and write the report; None outside its bake period.

    The bake period begins with the promotion, and ends after `settings.bake_requests`.

    Args:
        url: of the event store.

    Raises:
        InputError: the event store cannot be read.
    """
    moment = read_moment(now)
    aliases = read_aliases(root / ALIASES)
    champion, replaced, since = aliases.champion, aliases.replaced, aliases.champion_since
    if champion is None or replaced is None or since is None or not settings.bake_requests:
        return None
    known = _read_known(root, champion, "bake", since)
    if known is not None and known["state"] == "good":
        return None
    start = _find_start(known, since, moment)
    trial = Trial("bake", champion, replaced, since, start, 0.0, settings.bake_requests, settle_s)
    url = resolve_store_url(root, url)
    new = list(read_outcomes(url, trial.start, moment.at, champion, "champion", trial.needed))
    old = read_last_outcomes(url, since, replaced, len(new))
    return _write(root, analyse(trial, new, old, settings, moment.at, _count_analyses(known)))


def _read_known(root: Path, tag: str, kind: Kind, since: float) -> dict[str, Any] | None:
    """Return what the last analysis of a trial wrote; None at the first one."""
    known: dict[str, Any] | None = _read(root, tag).get(kind)
    return known if known is not None and known["since"] == since else None


def _find_start(known: dict[str, Any] | None, since: float, now: Moment) -> float:
    """Return from when on requests count: since the trial began, or since the clock was set back."""
    earlier = known.get("start") if known else None
    return min(since, now.at, since if earlier is None else earlier)


def _find_beginning(known: dict[str, Any] | None, since: float, now: Moment) -> Moment:
    """Return the first analysis of a trial: it comes within seconds, and its clock cannot be set."""
    began = known.get("began") if known else None
    return Moment(**began) if began else replace(now, at=min(since, now.at))


def analyse(
    trial: Trial,
    new: Sequence[RequestOutcome],
    old: Sequence[RequestOutcome],
    settings: CanarySettings,
    now: float,
    done: int = 0,
) -> CanaryVerdict:
    """Return the verdict after every analysis that is due.

    Args:
        new, old: outcomes of the version and of its baseline, ordered by time.
        done: analyses that were done before, and found nothing.
    """
    blank = CanaryVerdict(
        tag=trial.tag,
        baseline=trial.baseline,
        kind=trial.kind,
        state="wait",
        since=trial.since,
        start=trial.start,
        made_at=now,
        requests=len(new),
        needed=trial.needed,
        baseline_requests=len(old),
        timed_out=False,
        analyses=done,
        alpha=settings.alpha,
        criteria=(),
        summary=f"{len(new)} of {trial.needed} requests",
    )
    verdict = blank
    for number in range(done, len(ANALYSES)):
        quota = math.ceil(ANALYSES[number] * trial.needed)
        if not _is_due(new, quota, trial.settle_s, now):
            break
        ours, theirs = _select(trial, new, old, quota, now)
        if len(theirs) >= MIN_BASELINE:
            verdict = _decide(blank, ours, theirs, quota, number)
        elif _is_last(number) and trial.kind == "bake":
            summary = f"{trial.baseline} answered {len(theirs)} requests: too few to compare with"
            verdict = replace(blank, state="good", analyses=len(ANALYSES), summary=summary)
        if verdict.state == "bad":
            return verdict
    timed_out = trial.kind == "canary" and trial.waited_s > 60.0 * settings.max_minutes
    if verdict.state == "wait" and timed_out:
        return _decide_at_timeout(verdict, new, old, settings, now)
    return verdict


def _is_due(new: Sequence[RequestOutcome], quota: int, settle_s: float, now: float) -> bool:
    return len(new) >= quota and now >= new[quota - 1].at + settle_s


def _is_last(number: int) -> bool:
    return number + 1 == len(ANALYSES)


def _select(
    trial: Trial, new: Sequence[RequestOutcome], old: Sequence[RequestOutcome], quota: int, now: float
) -> tuple[list[RequestOutcome], list[RequestOutcome]]:
    """Return the outcomes that an analysis compares, with the feedback that both sides had time to get."""
    ours = new[:quota]
    seen_until = ours[-1].at + trial.settle_s
    if trial.kind == "bake":
        # Feedback on the old requests had more time to come. Each is paired with a new one by order, and
        # only feedback within the delay of the new one counts.
        before = old[-quota:]
        pairs = zip(before, ours[quota - len(before) :], strict=True)
        theirs = [one.known_at(one.at + (seen_until - paired.at)) for one, paired in pairs]
        return [one.known_at(seen_until) for one in ours], theirs
    during = [one for one in old if one.at <= ours[-1].at]
    if len(during) < MIN_BASELINE and quota == trial.needed:
        # Nearly all users are in the canary: wait for the champion's requests, too.
        ours, during, seen_until = new, list(old), now
    return [one.known_at(seen_until) for one in ours], [one.known_at(seen_until) for one in during]


def _decide(
    blank: CanaryVerdict,
    ours: Sequence[RequestOutcome],
    theirs: Sequence[RequestOutcome],
    quota: int,
    number: int,
) -> CanaryVerdict:
    criteria = compare(ours, theirs, ALPHA_SPENDING[number] * blank.alpha)
    worse = [criterion.summary for criterion in criteria if not criterion.passed]
    state: State = "bad" if worse else "good" if _is_last(number) else "wait"
    if worse:
        summary = f"after {quota} requests: {'; '.join(worse)}"
    else:
        so_far = "" if _is_last(number) else " so far"
        alone = [each.summary for each in criteria if each.p_value <= each.threshold]
        notes = f" ({'; '.join(alone)})" if alone else ""
        summary = f"after {quota} requests nothing is worse than with {blank.baseline}{so_far}{notes}"
    return replace(blank, state=state, analyses=number + 1, criteria=criteria, summary=summary)


def _decide_at_timeout(
    verdict: CanaryVerdict,
    new: Sequence[RequestOutcome],
    old: Sequence[RequestOutcome],
    settings: CanarySettings,
    now: float,
) -> CanaryVerdict:
    """Decide a canary that too few users came to: by what there is, else by `settings.on_timeout`."""
    waited = f"{len(new)} of {verdict.needed} requests after {settings.max_minutes:g} minutes"
    if new and len(old) >= MIN_BASELINE:
        ours, theirs = [one.known_at(now) for one in new], [one.known_at(now) for one in old]
        criteria = compare(ours, theirs, ALPHA_SPENDING[-1] * settings.alpha)
        worse = [criterion.summary for criterion in criteria if not criterion.passed]
        verdict = replace(verdict, criteria=criteria, analyses=len(ANALYSES))
        if worse:
            return replace(verdict, state="bad", summary=f"{waited}: {'; '.join(worse)}")
    state: State = "good" if settings.on_timeout == "promote" else "bad"
    summary = f"{waited}; flows.retrain.canary.on_timeout is {settings.on_timeout}"
    return replace(verdict, state=state, timed_out=True, summary=summary)


def _count_analyses(known: dict[str, Any] | None) -> int:
    """Return how many analyses of a trial its report has."""
    return int(known["analyses"]) if known is not None and known["state"] == "wait" else 0


def read_trials(root: Path, tag: str) -> list[CanaryVerdict]:
    """Return the verdicts on a version's canary and bake period, as far as there are any.

    Raises:
        InputError: the report is broken.
    """
    found = [values for values in map(_read(root, tag).get, ("canary", "bake")) if values]
    try:
        return [_make_verdict(one) for one in found]
    except (KeyError, TypeError) as error:
        path = Tag.parse(tag).report("canary")
        raise InputError(f"{path} is not a valid canary report: {error!r}", "remove it") from None


def _make_verdict(values: dict[str, Any]) -> CanaryVerdict:
    criteria = tuple(CanaryCriterion(**each) for each in values["criteria"])
    began = values.get("began")
    return CanaryVerdict(**{**values, "criteria": criteria, "began": Moment(**began) if began else None})


def _read(root: Path, tag: str) -> dict[str, Any]:
    path = root / Tag.parse(tag).report("canary")
    return dict(read_json(path)) if path.exists() else {}


def _write(root: Path, verdict: CanaryVerdict) -> CanaryVerdict:
    """Write a verdict into the version's report, next to that of the other kind; return it."""
    report = {"canary": None, "bake": None} | _read(root, verdict.tag)
    report |= {"tag": verdict.tag, verdict.kind: asdict(verdict)}
    write_json(root / Tag.parse(verdict.tag).report("canary"), report)
    return verdict
