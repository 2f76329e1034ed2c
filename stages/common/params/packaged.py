"""Values of `params.yaml` that describe the packaged task, and are wrong for a model of other rows.

A test compares these words with the shipped file.
"""

from __future__ import annotations

from collections.abc import Iterator

from stages.common.params.stages import Collect, Feedback, HomeIntents, ModelCard
from stages.common.task.settings import TaskSettings

NAME = "home-intents-smollm2-135m"
SYSTEM_PROMPT = "Answer with one intent as JSON."
LABEL_KEY = "intent"
PROSE = {
    "intended_use": (
        "Turn one spoken request to a smart home into one JSON call of a Home Assistant intent, on the "
        "machine at home."
    ),
    "out_of_scope": (
        "Anything safety-critical (locks and alarms without a confirmation), languages other than English, "
        "conversations of several turns, and requests outside the intents in the training data."
    ),
}


def find_packaged_words(
    collect: Collect, task: TaskSettings, card: ModelCard
) -> Iterator[tuple[tuple[str, str], str]]:
    """Yield each key whose value is about the packaged rows, if no source has them, and what to do."""
    # Feedback is about whatever task is served.
    own = [source for source in collect.sources if not isinstance(source, Feedback)]
    if not own or any(isinstance(source, HomeIntents) for source in own):
        return
    without = "and collect.sources has other rows"
    if card.name == NAME:
        yield ("model_card", "name"), f"is the name of the packaged task's model, {without}: choose one"
    for key, words in PROSE.items():
        if " ".join((getattr(card, key) or "").split()) == words:
            yield (
                ("model_card", key),
                f"is about the packaged task, {without}: describe your model, or write null (the card then "
                "shows that it is not stated)",
            )
    if task.system_prompt == SYSTEM_PROMPT and (task.kind, task.label_key) != ("json", LABEL_KEY):
        yield (
            ("task", "system_prompt"),
            f"is the packaged task's, {without}: write what fits your answers, or null for none",
        )
