"""Calibration of the probabilities of a closed set of answers.

The probability of an answer is what constrained decoding would draw it with: at each of its tokens, the
softmax over the tokens that continue some answer of the set. So the probabilities of all answers sum to 1,
and one pass over the prompts is enough, however many answers there are. A model with a head over the labels
has their softmax itself.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from stages.common.artifacts import artifacts
from stages.common.chat.template import encode_example
from stages.common.messages import Message
from stages.common.model.generation import EvalPrompt, answer_questions
from stages.common.model.label_head import find_labels
from stages.common.model.loading import load_tuned, pick_device, pick_dtype
from stages.common.records import Row
from stages.common.task.protocol import Task

# Ten bins of equal width, as in Naeini et al. 2015, "Obtaining well calibrated probabilities", AAAI.
BINS = 10

# From the tokens of an answer so far to the tokens that may follow.
Trie = Mapping[tuple[int, ...], frozenset[int]]


@dataclass(frozen=True, slots=True)
class Bin:
    """The answers whose probability is above `low` and at most `high`; means are 0 for none."""

    low: float
    high: float
    rows: int
    confidence: float
    accuracy: float


@dataclass(frozen=True, slots=True)
class Calibration:
    """How probability and accuracy agree.

    Attributes:
        ece: expected calibration error: the mean distance of both, weighted by the rows of each bin.
        rows: answers that are in the set; the others have no probability.
    """

    ece: float
    mean_confidence: float
    accuracy: float
    rows: int
    bins: tuple[Bin, ...]


def measure_calibration(
    rows: Sequence[Row],
    questions: Sequence[EvalPrompt],
    answers: Sequence[str],
    tokenizer: Any,
    task: Task,
    batch_size: int,
) -> dict[str, Any] | None:
    """Return the calibration of the tuned model's answers; None where the set of answers is open."""
    if task.closed_set is None:
        return None
    tokens = {answer: _encode(tokenizer, rows[0], answer) for answer in task.closed_set}
    chosen = [(i, text) for i, answer in enumerate(answers) if (text := answer.strip()) in tokens]
    if not chosen:
        return None
    device = pick_device()
    model = load_tuned(artifacts("fetch_base"), artifacts("finetune"), pick_dtype(device), device)
    asked = [EvalPrompt(questions[i].prompt, tokens[text]) for i, text in chosen]
    if find_labels(model):  # whose loss is that of the whole label
        found = answer_questions(model, tokenizer, asked, batch_size, 1)
        probabilities = [math.exp(-answer.reference_loss) for answer in found]
    else:
        trie = make_trie(list(tokens.values()))
        probabilities = []
        for start in range(0, len(asked), batch_size):
            batch = [(question.prompt, question.reference) for question in asked[start : start + batch_size]]
            probabilities += read_probabilities(model, batch, trie, tokenizer.pad_token_id)
    del model
    gc.collect()
    right = [task.is_right(text, rows[i].answer) for i, text in chosen]
    return asdict(calibrate(probabilities, right))


def calibrate(probabilities: Sequence[float], right: Sequence[bool]) -> Calibration:
    """Return how the probabilities of answers agree with how often they are right."""
    bins = []
    for number in range(BINS):
        low, high = number / BINS, (number + 1) / BINS
        inside = [(p, r) for p, r in zip(probabilities, right, strict=True) if _bin_of(p) == number]
        confidence = sum(p for p, _ in inside) / len(inside) if inside else 0.0
        accuracy = sum(r for _, r in inside) / len(inside) if inside else 0.0
        bins.append(Bin(low, high, len(inside), round(confidence, 6), round(accuracy, 6)))
    total = len(right)
    return Calibration(
        ece=round(sum(b.rows / total * abs(b.accuracy - b.confidence) for b in bins), 6),
        mean_confidence=round(sum(probabilities) / total, 6),
        accuracy=round(sum(right) / total, 6),
        rows=total,
        bins=tuple(bins),
    )


def make_trie(answers: Sequence[Sequence[int]]) -> Trie:
    """Return which tokens may follow each beginning of an answer."""
    following: dict[tuple[int, ...], set[int]] = {}
    for answer in answers:
        for place, token in enumerate(answer):
            following.setdefault(tuple(answer[:place]), set()).add(token)
    return {prefix: frozenset(tokens) for prefix, tokens in following.items()}


def read_probabilities(
    model: Any, batch: Sequence[tuple[Sequence[int], Sequence[int]]], trie: Trie, pad: int
) -> list[float]:
    """Return the probability of each answer behind its prompt, among all answers of the trie."""
    import torch

    texts = [[*prompt, *answer[:-1]] for prompt, answer in batch]
    width, read = max(map(len, texts)), max(len(answer) for _, answer in batch)
    ids = torch.tensor([[pad] * (width - len(t)) + t for t in texts], device=model.device)
    mask = torch.tensor([[0] * (width - len(t)) + [1] * len(t) for t in texts], device=model.device)
    with torch.inference_mode():
        logits = model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=(mask.cumsum(dim=1) - 1).clamp(min=0),
            logits_to_keep=torch.arange(width - read, width, device=model.device),
        ).logits.float()
    found = []
    for row, (_, answer) in enumerate(batch):
        behind = logits[row, read - len(answer) :]
        nats = 0.0
        for place, token in enumerate(answer):
            allowed = sorted(trie[tuple(answer[:place])])
            scores = torch.log_softmax(behind[place, torch.tensor(allowed, device=model.device)], dim=0)
            nats += float(scores[allowed.index(token)])
        found.append(math.exp(nats))
    return found


def _encode(tokenizer: Any, row: Row, answer: str) -> list[int]:
    example = encode_example(tokenizer, [*row.prompt, Message("assistant", answer)], row.tools)
    return example.input_ids[example.prompt_length :]


def _bin_of(probability: float) -> int:
    return min(BINS - 1, max(0, math.ceil(probability * BINS) - 1))
