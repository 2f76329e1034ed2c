"""The section `task` of `params.yaml`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Literal

from pydantic import Field
from typing_extensions import override

from stages.common.messages import LearnedTurns
from stages.common.params.checked_yaml import Section

Kind = Literal["json", "label", "text", "chat", "tools"]
# The keys that only some kinds read.
KINDS_OF_KEY = {"label_key": ("json",), "labels": ("label",), "primary_metric": ("text", "chat")}
CONVERSATIONS = ("tools", "chat")
CLASS = "label"  # stratify_by: the class of the answer, not a tag
# Variables of a chat template that the conversation and the tokenizer fill.
FILLED_ARGUMENTS = ("messages", "tools", "documents", "add_generation_prompt", "bos_token", "eos_token")


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
        for key, kinds in KINDS_OF_KEY.items():
            if getattr(self, key) is not None and self.kind not in kinds:
                yield key, f"is set, but only kind: {' or '.join(kinds)} has it; set it to null"
        if self.stratify_by == CLASS and not self.has_classes:
            yield "stratify_by", "needs classes, and these answers have none; name a tag or set it to null"
        for label in self.labels or ():
            if label != label.strip() or len(label.splitlines()) != 1:
                yield "labels", f"has {label!r}: a label is one line without space at its ends"
        if self.labels and len(set(self.labels)) < len(self.labels):
            yield "labels", "has a label twice"
        yield from self._find_template_conflicts()

    def _find_template_conflicts(self) -> Iterator[tuple[str, str]]:
        for name in self.template_arguments:
            if not name.isidentifier():
                yield "template_arguments", f"has {name!r}: variables have letters, digits and _"
            if name in FILLED_ARGUMENTS:
                yield "template_arguments", f"has {name}, which comes from the conversation; remove it"

    @property
    def turns(self) -> LearnedTurns:
        """Which turns of a conversation are learned; `auto`: all where the kind is one of conversations."""
        if self.learned_turns != "auto":
            return self.learned_turns
        return "all" if self.kind in CONVERSATIONS else "last"

    @property
    def has_classes(self) -> bool:
        """Return whether every answer belongs to a class."""
        return self.kind in ("label", "tools") or self.label_key is not None
