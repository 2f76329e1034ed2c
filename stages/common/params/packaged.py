"""Values of `params.yaml` that describe a packaged task, and are wrong for a model of other rows.

A test compares these words with the shipped files.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from stages.common.params.stages import Collect, Feedback, HomeIntents, HomeTools, ModelCard
from stages.common.task.settings import TaskSettings


@dataclass(frozen=True, slots=True)
class Words:
    """What a shipped file says of its packaged rows.

    Attributes:
        source: the kind of these rows.
        kind, label_key: of the task, which the system prompt fits.
        prose: texts of the model card.
    """

    source: type[HomeIntents | HomeTools]
    name: str
    system_prompt: str
    kind: str
    label_key: str | None
    prose: Mapping[str, str]


INTENTS = Words(
    source=HomeIntents,
    name="home-intents-smollm2-135m",
    system_prompt="Answer with one intent as JSON.",
    kind="json",
    label_key="intent",
    prose={
        "intended_use": (
            "Turn one spoken request to a smart home into one JSON call of a Home Assistant intent, on the "
            "machine at home."
        ),
        "out_of_scope": (
            "Anything safety-critical (locks and alarms without a confirmation), languages other than "
            "English, conversations of several turns, and requests outside the intents in the training data."
        ),
    },
)
TOOLS = Words(
    source=HomeTools,
    name="home-tools-smollm2-135m",
    system_prompt="You control a smart home.",
    kind="tools",
    label_key=None,
    prose={
        "intended_use": (
            "Turn the requests of a conversation with a smart home into calls of its tools, and state their "
            "results, on the machine at home."
        ),
        "out_of_scope": (
            "Anything safety-critical (locks and alarms without a confirmation), languages other than "
            "English, other tools than those in the training data, and questions about anything but the home."
        ),
    },
)


def find_packaged_words(
    collect: Collect, task: TaskSettings, card: ModelCard
) -> Iterator[tuple[tuple[str, str], str]]:
    """Yield each key whose value is about packaged rows that no source has, and what to do."""
    # Feedback is about whatever task is served.
    own = [source for source in collect.sources if not isinstance(source, Feedback)]
    for words in (INTENTS, TOOLS):
        if own and not any(isinstance(source, words.source) for source in own):
            yield from _find_words(words, task, card)


def _find_words(words: Words, task: TaskSettings, card: ModelCard) -> Iterator[tuple[tuple[str, str], str]]:
    without = "and collect.sources has other rows"
    if card.name == words.name:
        yield ("model_card", "name"), f"is the name of the packaged task's model, {without}: choose one"
    for key, text in words.prose.items():
        if " ".join((getattr(card, key) or "").split()) == text:
            yield (
                ("model_card", key),
                f"is about the packaged task, {without}: describe your model, or write null (the card then "
                "shows that it is not stated)",
            )
    if task.system_prompt == words.system_prompt and (task.kind, task.label_key) != (
        words.kind,
        words.label_key,
    ):
        yield (
            ("task", "system_prompt"),
            f"is the packaged task's, {without}: write what fits your answers, or null for none",
        )
