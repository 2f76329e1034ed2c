"""The section `task` of `params.yaml`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Literal

from pydantic import Field
from typing_extensions import override

from stages.common.messages import LearnedTurns
from stages.common.params.checked_yaml import Section

Kind = Literal["json", "label", "text", "tools", "chat"]
# The keys that only one kind reads.
KIND_OF_KEY = {"label_key": "json", "labels": "label", "primary_metric": "text"}
CONVERSATIONS = ("tools", "chat")
CLASS = "label"  # stratify_by: the class of the answer, not a tag


class TaskSettings(Section):
    """What the answers are, and by what the rows are divided."""

    kind: Kind
    label_key: Annotated[str, Field(min_length=1)] | None = None
    labels: Annotated[tuple[str, ...], Field(min_length=2)] | None = None
    primary_metric: Literal["chrf", "exact_match"] | None = None
    system_prompt: str | None = None
    stratify_by: Annotated[str, Field(min_length=1)] | None = None
    slices: tuple[str, ...] = ()
    learned_turns: Literal["auto", "all", "last", "weight"] = "auto"
    tools_template: Literal["auto", "own", "default"] = "auto"
    template_arguments: Mapping[str, bool | int | float | str | None] = Field(default_factory=dict)

    @override
    def find_conflicts(self) -> Iterator[tuple[str, str]]:
        for key, kind in KIND_OF_KEY.items():
            if getattr(self, key) is not None and self.kind != kind:
                yield key, f"is set, but only kind: {kind} has it; set it to null"
        if self.stratify_by == CLASS and not self.has_classes:
            yield "stratify_by", "needs classes, and these answers have none; name a tag or set it to null"
        for label in self.labels or ():
            if label != label.strip() or len(label.splitlines()) != 1:
                yield "labels", f"has {label!r}: a label is one line without space at its ends"
        if self.labels and len(set(self.labels)) < len(self.labels):
            yield "labels", "has a label twice"

    @property
    def turns(self) -> LearnedTurns:
        """Which turns of a conversation are learned; `auto`: all where the kind is one of conversations."""
        if self.learned_turns != "auto":
            return self.learned_turns
        return "all" if self.kind in CONVERSATIONS else "last"

    @property
    def has_classes(self) -> bool:
        """Return whether every answer belongs to a class."""
        return self.kind == "label" or self.label_key is not None
