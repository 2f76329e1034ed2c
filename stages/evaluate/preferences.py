"""Preference on test pairs: how often a model finds the better of two answers to a prompt the likelier one.

A pair is a test row with a rejected answer, of those that both models were asked. Its answers are compared by
the log-probability of the whole answer with its end of turn, which decides what a model would rather write.
The loss of the better answer is known where the model was asked; the same engine computes the other one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stages.common.artifacts import artifacts
from stages.common.chat.fitting import count_reasons
from stages.common.chat.preferences import Pair, encode_pairs
from stages.common.chat.template import Encoded
from stages.common.model.adapter import HEAD, count_virtual_tokens, read_settings
from stages.common.model.generation import Answer, EvalPrompt
from stages.common.model.loading import count_context_tokens, read_config
from stages.common.model.results import Metrics, Sampling, compare, with_intervals
from stages.common.records import Row
from stages.common.spool import view
from stages.common.task.metrics import compute_mean

# The summed negative log-likelihood of each reference in nats.
Score = Callable[[Sequence[EvalPrompt]], list[float]]


@dataclass(frozen=True, slots=True)
class Scorer:
    """A model whose preference is measured.

    Attributes:
        score: computes the losses of references.
        answers: its answers by the id of their row, with the losses of the better answers; None if it was
            not asked.
        pairs: the pairs in the tokens of its own vocabulary; None if that is the base model's.
    """

    score: Score
    answers: Mapping[str, Answer] | None = None
    pairs: Sequence[Pair] | None = None


@dataclass(frozen=True, slots=True)
class PairsFound:
    """The pairs among the test rows that were asked.

    Attributes:
        left_out: how many rows with a rejected answer are no pairs, by reason.
        skipped: why nothing is measured on them; None if something is.
    """

    pairs: Sequence[Pair]
    left_out: Mapping[str, int]
    skipped: str | None


def find_pairs(rows: Sequence[Row], tokenizer: Any, min_pairs: int) -> PairsFound | None:
    """Return the pairs among test rows; None where no row has a rejected answer.

    Args:
        min_pairs: `evaluate.min_preference_pairs`.
    """
    if not any(row.rejected for row in rows):
        return None
    adapter = artifacts("finetune")
    context = count_context_tokens(read_config(artifacts("fetch_base")), count_virtual_tokens(adapter))
    pairs, misfits = encode_pairs(tokenizer, rows, context)
    skipped = None
    if read_settings(adapter)["method"] == HEAD:
        skipped = "a head over labels has no probability of another answer"
    elif len(pairs) < min_pairs:
        skipped = f"too few test pairs: {len(pairs)}, and evaluate.min_preference_pairs is {min_pairs}"
    return PairsFound(pairs, dict(count_reasons(misfits)), skipped)


def measure_preferences(
    found: PairsFound, before: Scorer, tuned: Scorer, sampling: Sampling
) -> dict[str, Any]:
    """Return the preference before and after the training with intervals, and the difference with a p-value.

    `accuracy` is the share of pairs whose better answer is the likelier one (equal ones count half), `margin`
    by how many nats it is on average.

    Args:
        before: the model that the training started from.
    """
    counts = {"pairs": len(found.pairs), "left_out": dict(found.left_out)}
    if found.skipped is not None:
        return {**counts, "skipped": found.skipped}
    metrics = {
        name: compute_preference(_measure_gaps(scorer.pairs or found.pairs, scorer))
        for name, scorer in (("before", before), ("tuned", tuned))
    }
    groups = [pair.row.group for pair in found.pairs]
    return {
        **counts,
        "groups": len(set(groups)),
        **{name: with_intervals(metrics[name], groups, sampling) for name in metrics},
        "difference": compare(metrics["before"], metrics["tuned"], groups, sampling),
    }


def compute_preference(gaps: Sequence[float]) -> Metrics:
    """Return accuracy and margin, from how much likelier the better answer of each pair is, in nats."""
    likelier = [float(gap > 0) + 0.5 * (gap == 0) for gap in gaps]
    return {"accuracy": compute_mean(likelier, scale=1.0), "margin": compute_mean(gaps, scale=None)}


def _measure_gaps(pairs: Sequence[Pair], scorer: Scorer) -> list[float]:
    worse = scorer.score(view(pairs, lambda pair: _as_question(pair.row, pair.rejected)))
    if scorer.answers is not None:
        better = [scorer.answers[pair.row.id].reference_loss for pair in pairs]
    else:
        better = scorer.score(view(pairs, lambda pair: _as_question(pair.row, pair.chosen)))
    return [bad - good for good, bad in zip(better, worse, strict=True)]


def _as_question(row: Row, example: Encoded) -> EvalPrompt:
    length = example.prompt_length
    return EvalPrompt(example.input_ids[:length], example.input_ids[length:], bool(row.tools))
