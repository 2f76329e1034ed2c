"""The sections `monitoring` and `flows` of `params.yaml`: drift, feedback, and when flows run."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field
from typing_extensions import override

from stages.common.params.checked_yaml import Section
from stages.common.params.schedule import Cron, Timezone
from stages.common.params.types import (
    Confidence,
    Count,
    NotNegative,
    OpenShare,
    Port,
    Positive,
    PositiveCount,
    Resamples,
    Seed,
    Share,
)

Chance = Annotated[float, Field(gt=0.0, lt=0.5)]
DriftType = Literal["input", "output", "quality"]


class Reference(Section):
    """The reference traffic that windows are compared with."""

    rows: Annotated[int, Field(ge=50)]


class WindowSettings(Section):
    """How traffic is cut into windows."""

    kind: Literal["count", "time"]
    rows: Annotated[int, Field(ge=20)]
    hours: Positive
    min_rows: Annotated[int, Field(ge=20)]
    settle_s: NotNegative


class FeatureSettings(Section):
    """What is looked at in an exchange."""

    max_categories: Annotated[int, Field(ge=2)]
    embeddings: Literal["ngrams", "minilm", "none"]
    cost_per_hour: NotNegative


class DriftSettings(Section):
    """When a window counts as drifted."""

    alpha: Chance
    min_effect: Share
    permutations: Annotated[int, Field(ge=200)]
    calibration_windows: Count
    blocks: Annotated[int, Field(ge=50)]
    seed: Seed

    @override
    def find_conflicts(self) -> Iterator[tuple[str, str]]:
        level = self.alpha / 3  # the three drift types that decide share alpha
        if (1 + self.permutations) * level < 1.0:
            needed = math.ceil(1 / level) - 1
            yield "permutations", f"no p-value can reach alpha / 3 ({level:g}): at least {needed} are needed"


class TriggerSettings(Section):
    """When drift starts a retraining."""

    drift_types: Annotated[tuple[DriftType, ...], Field(min_length=1)]
    drifted: PositiveCount
    of: PositiveCount
    min_labelled_rows: Count
    cooldown_hours: NotNegative

    @override
    def find_conflicts(self) -> Iterator[tuple[str, str]]:
        if self.drifted > self.of:
            yield "drifted", f"is above of ({self.of}): no number of windows could trigger"


class FeedbackSettings(Section):
    """Which feedback becomes training rows."""

    license: Annotated[str, Field(min_length=1)]
    thumbs_up_as_label: bool
    thumbs_down_as_refusal: bool = False
    min_agreement: Annotated[float, Field(gt=0.5, le=1.0)]
    max_rows_per_user: PositiveCount
    max_share_per_key: Annotated[float, Field(gt=0.0, le=1.0)]
    max_rows: PositiveCount
    on_suspicion: Literal["drop", "keep"]
    holdout_share: OpenShare
    seed: Seed


class Monitoring(Section):
    """What is watched, and what is learned from it."""

    reference: Reference
    window: WindowSettings
    features: FeatureSettings
    drift: DriftSettings
    trigger: TriggerSettings
    feedback: FeedbackSettings


class TrainingFlow(Section):
    """When the training flow runs."""

    cron: Cron | None
    timezone: Timezone = "UTC"
    retries: Count
    retry_delay_s: Count
    power_watts: Positive | None = None
    co2_g_per_kwh: NotNegative | None = None
    price_per_hour: NotNegative | None = None


class WatchFlow(Section):
    """When production is watched."""

    cron: Cron | None
    timezone: Timezone = "UTC"
    max_windows: PositiveCount
    retrain: bool


class GateSettings(Section):
    """What a challenger must reach before it answers any user."""

    min_new_rows: PositiveCount
    min_new_gain: Share
    max_old_loss: Share
    max_bias_gap_increase: Share
    max_unsafe_increase: Share
    min_preference_gain: Annotated[float, Field(ge=-1.0, le=1.0)] | None
    max_rows: PositiveCount | None
    concurrency: PositiveCount
    confidence: Confidence
    resamples: Resamples
    seed: Seed


class CanarySettings(Section):
    """How a challenger that passed the gate meets the users."""

    share: Annotated[float, Field(gt=0.0, le=0.5)]
    min_requests: Annotated[int, Field(ge=20)]
    max_minutes: Positive
    on_timeout: Literal["promote", "reject"]
    bake_requests: Count
    alpha: Chance


class RetrainFlow(Section):
    """How a model is replaced."""

    cron: Cron | None
    timezone: Timezone = "UTC"
    warm_start_from: Literal["champion", "base"]
    gate: GateSettings
    canary: CanarySettings


class TriedValues(Section):
    """Which values of one key are tried: these choices, or a range."""

    choices: Annotated[tuple[Any, ...], Field(min_length=1)] | None = None
    low: int | float | None = None
    high: int | float | None = None
    log: bool = False

    def find_problem(self) -> str | None:
        """Return why no value can be drawn from it, or None."""
        if self.choices is not None:
            if self.low is not None or self.high is not None or self.log:
                return "has choices and a range; keep one of them"
            repeated = [value for at, value in enumerate(self.choices) if value in self.choices[:at]]
            return f"has the choice {repeated[0]!r} twice" if repeated else None
        if self.low is None or self.high is None:
            return "needs low and high, or choices"
        if self.low > self.high:
            return f"low ({self.low}) is above high ({self.high})"
        if self.log and self.low <= 0:
            return f"low ({self.low}) must be above 0 where log is true"
        return None


class SweepFlow(Section):
    """Which trainings a sweep compares."""

    space: Annotated[dict[str, TriedValues], Field(min_length=1)]
    metric: Annotated[str, Field(min_length=1)]
    trials: PositiveCount
    timeout_minutes: Positive | None = None
    sampler: Literal["tpe", "random"]
    pruner: Literal["median", "none"]
    startup_trials: PositiveCount
    warmup_points: Count
    seed: Seed

    @override
    def find_conflicts(self) -> Iterator[tuple[str, str]]:
        for key, tried in self.space.items():
            if problem := tried.find_problem():
                yield "space", f"{key} {problem}"


class Tracking(Section):
    """Where experiments and versions are kept."""

    tracking_url: Annotated[str, Field(pattern=r"^(sqlite:///|https?://|postgresql)")]
    experiment: Annotated[str, Field(min_length=1)]


class Notify(Section):
    """Who is notified, of what."""

    webhook: str | None
    email: str | None
    events: tuple[Literal["drift", "rejected", "promoted", "rolled_back", "failed"], ...]


class Pages(Section):
    """Where `make up` listens, on loopback."""

    dashboard: Port
    prefect: Port
    mlflow: Port
    evidently: Port


class Flows(Section):
    """When things happen."""

    training: TrainingFlow
    watch: WatchFlow
    retrain: RetrainFlow
    sweep: SweepFlow
    tracking: Tracking
    notify: Notify
    pages: Pages
