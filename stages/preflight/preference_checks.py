"""Check before the costly stages that there are answers to compare, where `finetune.method` compares them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from stages.common.artifacts import artifacts
from stages.common.chat.fitting import count_reasons
from stages.common.chat.preferences import encode_pairs, encode_ratings
from stages.common.chat.template import Encoded
from stages.common.errors import InputError
from stages.common.model.adapter import PREFERENCE_METHODS
from stages.common.records import Row, read_rows
from stages.common.spool import join

if TYPE_CHECKING:
    from stages.common.params.finetune import Finetune

FORMATS = "docs/how-to/methods.md has the formats of files"


def count_preferences(
    finetune: Finetune, tokenizer: Any, train: Sequence[Row], limit: int
) -> dict[str, Any] | None:
    """Return how many answers of the training rows can be compared; None where the method compares none.

    Args:
        limit: the most tokens of a prompt with its answer.
    """
    if finetune.method not in PREFERENCE_METHODS:
        return None
    if finetune.method == "kto":
        rows = join(train, read_rows(artifacts("split") / "refused.parquet"))
        rated, misfits = encode_ratings(tokenizer, rows, limit)
        good = sum(one.is_desirable for one in rated)
        used = {one.row.id for one in rated}
        counts = {"good_answers": good, "bad_answers": len(rated) - good}
        sizes = measure_sequences([one.answer] for one in rated)
    else:
        pairs, misfits = encode_pairs(tokenizer, train, limit)
        rows, used = train, {pair.row.id for pair in pairs}
        counts = {"pairs": len(pairs)}
        sizes = measure_sequences([pair.chosen, pair.rejected] for pair in pairs)
    used |= {misfit.row.id for misfit in misfits}
    without = sum(row.id not in used for row in rows)
    return {**counts, **sizes, "excluded": count_reasons(misfits), "rows_without_preference": without}


def measure_sequences(rows: Iterable[Sequence[Encoded]]) -> dict[str, int]:
    """Return how many rows a training on these sequences has, their tokens, and the longest one."""
    found = {"rows": 0, "tokens": 0, "learned_tokens": 0, "longest": 0, "longest_answer": 0}
    for sequences in rows:
        found["rows"] += 1
        for one in sequences:
            found["tokens"] += len(one.input_ids)
            found["learned_tokens"] += one.learned_count
            found["longest"] = max(found["longest"], len(one.input_ids))
            found["longest_answer"] = max(found["longest_answer"], one.learned_count)
    return found


def find_preference_problems(finetune: Finetune, counts: Mapping[str, Any] | None) -> list[InputError]:
    """Return why there is nothing to compare; none where the method compares nothing."""
    if counts is None:
        return []
    excluded = f"; excluded: {counts['excluded']}" if counts["excluded"] else ""
    if finetune.method == "kto":
        good, bad = counts["good_answers"], counts["bad_answers"]
        if good and bad:
            return []
        return [
            InputError(
                f"finetune.method: kto learns from good and from bad answers, and there are {good} and {bad}"
                + excluded,
                "set monitoring.feedback.thumbs_down_as_refusal: true, or give a file with ratings "
                f"({FORMATS})",
            )
        ]
    if counts["pairs"]:
        return []
    return [
        InputError(
            f"finetune.method: {finetune.method} learns from pairs, and none of the "
            f"{counts['rows_without_preference']} training rows has a rejected answer{excluded}",
            f"collect corrections, give a file of pairs ({FORMATS}), or set finetune.method: lora",
        )
    ]


def describe_preferences(counts: Mapping[str, Any]) -> str:
    """Return in a line how many answers are compared."""
    if "pairs" in counts:
        found = f"{counts['pairs']} pairs of a better and a worse answer"
    else:
        found = f"{counts['good_answers']} good and {counts['bad_answers']} bad answers"
    without = counts["rows_without_preference"]
    return f"{found} are learned; {without} training rows have neither, and are not learned"
