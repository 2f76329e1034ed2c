"""The section `compress` of `params.yaml`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field
from typing_extensions import override

from stages.common.params.checked_yaml import Section
from stages.common.params.types import Count, NotNegative, Positive, PositiveCount, Seed, Share

Variant = Literal["int8", "int4", "q4_k", "fewer_layers", "pruned", "small_vocabulary"]


class Compress(Section):
    """Which smaller models are made and compared, and which one goes on."""

    variants: tuple[Variant, ...] = ()
    calibration_rows: Count = 128
    kept_layers: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.5
    kept_channels: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.5
    kept_tokens: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.25
    healing_rows: Count | None = None
    healing_epochs: PositiveCount = 1
    healing_rate: Positive = 0.0003
    healing_teacher_weight: Share = 0.0
    choose: Variant | Literal["smallest"] | None = None
    max_lost_points: NotNegative = 2.0
    seed: Seed = 7

    @override
    def find_conflicts(self) -> Iterator[tuple[str, str]]:
        if len(set(self.variants)) < len(self.variants):
            yield "variants", "names a variant twice"
        if self.choose == "smallest" and not self.variants:
            yield "choose", "is smallest, and variants is empty: there is nothing to choose from"
        if self.choose not in (None, "smallest", *self.variants):
            yield "choose", f"is {self.choose}, which is not in variants; add it there"
