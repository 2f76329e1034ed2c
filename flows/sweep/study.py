"""The trials of a sweep in Optuna's storage, an SQLite file that a killed sweep leaves whole.

SQLite, because Optuna's journal can end in half a line, and its lock file outlives a kill and is then waited
for without end (optuna/optuna issues 5138 and 5921). What a seed draws depends on how many trials have ended
and on their results, not on the process: a sweep that was killed draws what it would have drawn (issue 3255:
a seeded sampler begins again with every process, and draws the same values twice).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Literal

import numpy as np
import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.trial import FrozenTrial, Trial, TrialState

from flows.sweep.space import Space, Values, decode_values, make_distributions
from stages.common.artifacts import make_folder
from stages.common.params.loop import SweepFlow

STORAGE_TIMEOUT_S = 60  # while another program, such as a dashboard, holds the file
DRAWS = 8  # of values that were tried already: samplers repeat themselves, and a training would too
MOST_LISTED = 10_000  # combinations of a space; a larger one is not listed
ENDED = (TrialState.COMPLETE, TrialState.PRUNED)

State = Literal["complete", "pruned", "failed"]


@dataclass(frozen=True, slots=True)
class TrialResult:
    """A trial that has ended.

    Attributes:
        number: from 1 on, in the order of the trials.
        values: what was tried, by dotted key.
        value: the metric; of a pruned trial at its last point; None where it has none.
        points: validation points that were seen.
        seconds: that it took.
        experiment: the DVC experiment of a complete trial.
        message: why it failed.
    """

    number: int
    values: Values
    state: State
    value: float | None
    points: int
    seconds: float
    experiment: str | None = None
    message: str = ""


class SweepStudy:
    """A study: one space, on the same rows, code and settings.

    Args:
        path: of the SQLite file; several studies share it.
        name: of the study; one of that name is continued.
        lower_is_better: whether less of the metric is better.
        current: the present values, which are tried first; None if they are not in the space.
        new: forget the trials of this name.
    """

    def __init__(
        self,
        path: Path,
        name: str,
        settings: SweepFlow,
        *,
        lower_is_better: bool,
        current: Mapping[str, Any] | None = None,
        new: bool = False,
    ) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        make_folder(path.parent)
        self._settings = settings
        self._distributions = make_distributions(settings.space)
        self._current = current
        self.lower_is_better = lower_is_better
        storage = optuna.storages.RDBStorage(
            f"sqlite:///{path}", engine_kwargs={"connect_args": {"timeout": STORAGE_TIMEOUT_S}}
        )
        if new and name in optuna.get_all_study_names(storage):
            optuna.delete_study(study_name=name, storage=storage)
        self._study = optuna.create_study(
            storage=storage,
            study_name=name,
            direction="minimize" if lower_is_better else "maximize",
            load_if_exists=True,
            pruner=_make_pruner(settings),
        )

    def ask(self) -> Trial | None:
        """Return the next trial, with values that were not tried yet; None if there are none left.

        One that a killed sweep left is closed, and drawn again: Optuna would keep it as running for ever.
        """
        for left in self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            self._study.tell(left.number, state=TrialState.FAIL)
        ended = self._study.get_trials(deepcopy=False, states=ENDED)
        if not ended and self._current is not None:
            self._study.enqueue_trial(dict(self._current))
        tried = [trial.params for trial in ended]
        untried = list_untried(self._distributions, tried)
        if untried == []:
            return None
        for draw in range(DRAWS):
            seed = np.random.SeedSequence([self._settings.seed, len(ended), draw])
            if untried is not None and draw == DRAWS - 1:
                self._study.enqueue_trial(untried[int(np.random.default_rng(seed).integers(len(untried)))])
            self._study.sampler = _make_sampler(self._settings, int(seed.generate_state(1)[0]))
            trial = self._study.ask(self._distributions)
            if trial.params not in tried:
                return trial
            self._study.tell(trial, state=TrialState.FAIL)
        return None

    def read_values(self, trial: Trial) -> dict[str, Any]:
        """Return what a trial is to try, by dotted key."""
        return decode_values(trial.params, self._settings.space)

    def finish(
        self,
        trial: Trial,
        state: State,
        value: float | None,
        seconds: float,
        experiment: str | None = None,
        message: str = "",
    ) -> None:
        """Record how a trial ended.

        A failed one is pruned for Optuna, whose samplers ignore failed trials: they would draw values that
        cannot be trained again and again.
        """
        trial.set_user_attr("state", state)
        trial.set_user_attr("seconds", round(seconds, 1))
        trial.set_user_attr("experiment", experiment)
        trial.set_user_attr("message", message)
        if state == "complete":
            assert value is not None and math.isfinite(value)
            self._study.tell(trial, value)
        else:
            self._study.tell(trial, state=TrialState.PRUNED)

    def list_results(self) -> list[TrialResult]:
        """Return the trials that have ended, in their order."""
        ended = self._study.get_trials(deepcopy=False, states=ENDED)
        return [_read_result(number, trial, self._settings.space) for number, trial in enumerate(ended, 1)]


def list_untried(
    distributions: Mapping[str, BaseDistribution], tried: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]] | None:
    """Return the combinations that were not tried; None where there are too many to list."""
    values = [_list_values(distribution) for distribution in distributions.values()]
    if None in values or math.prod(len(one or ()) for one in values) > MOST_LISTED:
        return None
    every = (dict(zip(distributions, one, strict=True)) for one in product(*filter(None, values)))
    return [combination for combination in every if combination not in tried]


def _list_values(distribution: BaseDistribution) -> Sequence[Any] | None:
    """Return the values of a distribution; None where it has no number of them."""
    if isinstance(distribution, CategoricalDistribution):
        return distribution.choices
    if isinstance(distribution, IntDistribution):
        return range(distribution.low, distribution.high + 1)
    if isinstance(distribution, FloatDistribution) and distribution.single():
        return [distribution.low]
    return None


def find_best(results: Sequence[TrialResult], lower_is_better: bool) -> TrialResult | None:
    """Return the best complete trial; of several alike, the first; None if there is none."""
    complete = [result for result in results if result.state == "complete" and result.value is not None]
    sign = 1 if lower_is_better else -1
    return min(complete, key=lambda result: sign * (result.value or 0.0), default=None)


def _read_result(number: int, trial: FrozenTrial, space: Space) -> TrialResult:
    attributes = trial.user_attrs
    value = trial.value if trial.state == TrialState.COMPLETE else _read_last(trial)
    return TrialResult(
        number,
        decode_values(trial.params, space),
        attributes["state"],
        value,
        len(trial.intermediate_values),
        attributes["seconds"],
        attributes["experiment"],
        attributes["message"],
    )


def _read_last(trial: FrozenTrial) -> float | None:
    return None if trial.last_step is None else trial.intermediate_values[trial.last_step]


def _make_sampler(settings: SweepFlow, seed: int) -> optuna.samplers.BaseSampler:
    if settings.sampler == "random":
        return optuna.samplers.RandomSampler(seed)
    return optuna.samplers.TPESampler(n_startup_trials=settings.startup_trials, seed=seed)


def _make_pruner(settings: SweepFlow) -> optuna.pruners.BasePruner:
    if settings.pruner == "none":
        return optuna.pruners.NopPruner()
    # Points are counted from 1 on.
    return optuna.pruners.MedianPruner(settings.startup_trials, settings.warmup_points + 1)
