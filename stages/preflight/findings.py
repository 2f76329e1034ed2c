"""What preflight found in rows that are learned all the same, for the report and the log."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby, islice
from typing import Any

from stages.common.chat.fitting import Misfit, describe_misfits
from stages.common.chat.template import Encoded, thinks
from stages.common.chat.turns import list_learned
from stages.common.logs import get_logger
from stages.common.messages import LearnedTurns
from stages.common.params.services import Guard
from stages.common.records import Row

logger = get_logger("preflight")


Fitted = Iterable[tuple[Row, Encoded]]  # a row follows itself where it has several sequences


def count_unwritten_thoughts(tokenizer: Any, fitted: Fitted, learned_turns: LearnedTurns) -> int:
    """Return how many learned answers have thoughts that the chat template does not write."""
    if thinks(tokenizer):
        return 0
    rows = (row for row, _ in fitted)
    return sum(
        bool(row.messages[place].reasoning)
        for _, same in groupby(rows, key=lambda row: row.id)
        for row in islice(same, 1)
        for place in list_learned(row.messages, learned_turns)
    )


def count_unserved(fitted: Fitted, guard: Guard) -> dict[str, int]:
    """Return by the key of `services.guard` how many rows ask more than it takes; none of them are 0."""
    over: dict[str, set[str]] = {"max_prompt_tokens": set(), "max_messages": set()}
    for row, example in fitted:
        if max(start for start, _ in example.learned) > guard.max_prompt_tokens:
            over["max_prompt_tokens"].add(row.id)
        if len(row.prompt) > guard.max_messages:
            over["max_messages"].add(row.id)
    return {key: len(ids) for key, ids in over.items() if ids}


def report_findings(
    evidence: Mapping[str, Any],
    misfits: Mapping[str, Sequence[Misfit]],
    over_limit: Sequence[str],
    max_new_tokens: int,
    guard: Guard,
) -> None:
    """Log what is excluded, changed or cannot be judged right."""
    for side, found in evidence["sides"].items():
        logger.info("%s: %d rows, %d of %d tokens learned", side, *_counts(found))
        if misfits[side]:
            logger.warning(
                "%s: %d rows excluded: %s\n%s",
                side,
                len(misfits[side]),
                found["excluded"],
                describe_misfits(misfits[side], 3),
            )
    text = evidence["text"]
    if count := text["rows_with_control_tokens_as_text"]:
        logger.warning(
            "%d rows hold control tokens, which are learned as text: %s",
            count,
            text["control_tokens_as_text"],
        )
    if count := text["prompts_cut_by_the_template"]:
        logger.warning(
            "the chat template leaves out text of %d prompts, which the model will not read: %s",
            count,
            text["first_prompts_cut"][0],
        )
    if count := text["answers_changed_by_the_template"]:
        logger.warning(
            "the chat template changes %d answers; the first: %s", count, text["first_answers_changed"][0]
        )
    if count := evidence["thoughts_not_written"]:
        logger.warning(
            "%d learned answers have thoughts that the template does not write; fix: %s",
            count,
            evidence["thoughts_fix"],
        )
    for key, count in evidence["learned_rows_refused_by_the_guard"].items():
        logger.warning(
            "%d learned rows exceed services.guard.%s (%d): the service would refuse them; fix: raise it",
            count,
            key,
            getattr(guard, key),
        )
    if over_limit:
        logger.warning(
            "%d test answers are longer than ask_base.max_new_tokens (%d), so that no answer can match: %s",
            len(over_limit),
            max_new_tokens,
            ", ".join(over_limit[:3]),
        )
    if before := evidence["template"]["before"]:
        logger.info("the template writes %r before an answer: it is part of the prompt", before)


def _counts(side: Mapping[str, Any]) -> tuple[int, int, int]:
    return side["rows"], side["learned_tokens"], side["tokens"]
