"""What an answer is worth: exact match, labels and slots of JSON answers; ROUGE-L, chrF and BLEU of texts.

Every metric turns a row into a line of columns whose sums give the figure (`stages.common.statistics`).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from stages.common.records import canonical_json
from stages.common.statistics import Figure, Floats

BLEU_ORDER = 4
CHRF_ORDER = 6
CHRF_BETA = 2.0

# Above this a float cannot hold every whole number, so 2**53 + 1 and its float are not the same.
MAX_EXACT_FLOAT = 2**53


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric over the rows of one model.

    Attributes:
        columns: one line a row; shape (rows, columns).
        figure: from column sums to the figure.
        scale: the best possible score where the worst is 0; None for a figure without bounds.
    """

    columns: Floats
    figure: Figure
    scale: float | None

    def by_row(self) -> Floats:
        """Return the figure of each row on its own."""
        return self.figure(self.columns)


@dataclass(frozen=True, slots=True)
class JsonAnswer:
    """An answer that is one JSON value; `canonical` is equal for equal values."""

    value: Any
    canonical: str

    @property
    def is_object(self) -> bool:
        """Whether it is an object, and so can have a label and slots."""
        return isinstance(self.value, dict)

    def label(self, key: str) -> str | None:
        """Return the label, if there is one and it is a string."""
        found = self.value.get(key) if self.is_object else None
        return found if isinstance(found, str) else None

    def slots(self, label_key: str | None) -> dict[str, str]:
        """Return every other key of the object, with its value as canonical JSON."""
        pairs = self.value.items() if self.is_object else ()
        return {key: canonical_json(value) for key, value in pairs if key != label_key}


def read_json_answer(text: str) -> JsonAnswer | None:
    """Return the one JSON value that `text` is, or None.

    Space around it is allowed; anything else is not: no prose, no code fence, no second value, no key
    given twice (readers disagree about which counts), no NaN or infinity, no half of a surrogate pair.
    Numbers that are equal become one: 5.0 reads as 5.
    """
    try:
        value = json.loads(
            text, object_pairs_hook=_object, parse_float=_number, parse_constant=_refuse_constant
        )
        canonical = canonical_json(value)
        canonical.encode("utf-8")
    except (ValueError, RecursionError):
        return None
    return JsonAnswer(value, canonical)


def score_json(
    answers: Sequence[JsonAnswer | None], references: Sequence[JsonAnswer], label_key: str | None
) -> dict[str, Metric]:
    """Return the metrics of JSON answers.

    - `exact_match`: the answer equals the reference as a JSON value. The order of keys, space between
      tokens and the spelling of a number do not count; everything else does.
    - `valid_output`: the answer is one JSON value by `read_json_answer`, and, with a label key, an object
      with a string under that key; without, a value of the reference's kind (object, array, string ...).
    - `<label_key>_accuracy`: the strings under the label key are equal.
    - `slot_f1`: micro-averaged F1 over the pairs of key and value other than the label, as CoNLL counts
      spans (Tjong Kim Sang & Buchholz 2000): a pair is right if the reference has the same key with an
      equal value, whatever the label; an answer that is not valid JSON has no pair. 1 if no row has any.
    """
    known = [(a, r) for a, r in zip(answers, references, strict=True)]
    metrics = {
        "exact_match": share([a is not None and a.canonical == r.canonical for a, r in known]),
        "valid_output": share([is_valid(a, r, label_key) for a, r in known]),
    }
    if label_key is not None:
        metrics[f"{label_key}_accuracy"] = share(
            [a is not None and a.label(label_key) == r.label(label_key) for a, r in known]
        )
    if any(r.is_object for r in references):
        metrics["slot_f1"] = Metric(
            np.array([_slot_counts(a, r, label_key) for a, r in known], dtype=float), ratio, 1.0
        )
    return metrics


def is_valid(answer: JsonAnswer | None, reference: JsonAnswer, label_key: str | None) -> bool:
    """Return whether an answer could be used at all, right or wrong; `score_json` says what counts."""
    if answer is None:
        return False
    if label_key is not None:
        return answer.label(label_key) is not None
    return _kind(answer.value) == _kind(reference.value)


def score_text(answers: Sequence[str], references: Sequence[str]) -> dict[str, Metric]:
    """Return the metrics of answers in plain words.

    - `exact_match`: equal, but for space at the ends.
    - `rouge_l`: mean F1 of the longest common subsequence of words (rouge_score), 0 to 1. Words are runs
      of letters and digits of any script; a script that puts no space between words is for chrF.
    - `chrf`: corpus chrF2 as sacrebleu computes it, 0 to 100.
    - `bleu`: corpus BLEU as sacrebleu computes it (13a tokens, exponential smoothing), 0 to 100.
    """
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu.metrics import BLEU

    rouge, bleu = RougeScorer(["rougeL"], tokenizer=_Words()), BLEU(effective_order=True)
    pairs = list(zip(answers, references, strict=True))
    counted = [bleu.sentence_score(a, [r]) for a, r in pairs]
    return {
        "exact_match": share([a.strip() == r.strip() for a, r in pairs]),
        "rouge_l": mean([rouge.score(r, a)["rougeL"].fmeasure for a, r in pairs], scale=1.0),
        "chrf": Metric(np.array([_chrf_counts(a, r) for a, r in pairs], dtype=float), chrf_figure, 100.0),
        "bleu": Metric(
            np.array([[*c.counts, *c.totals, c.sys_len, c.ref_len] for c in counted], dtype=float),
            bleu_figure,
            100.0,
        ),
    }


def perplexity(losses: Sequence[float], tokens: Sequence[int]) -> Metric:
    """Return the perplexity of the reference answers: exp of the mean loss of a token, over all tokens.

    Args:
        losses: summed negative log-likelihood of each row's reference, in nats.
    """
    return Metric(np.stack([np.array(losses), np.array(tokens)], axis=1).astype(float), _exp_ratio, None)


def share(hits: Sequence[bool]) -> Metric:
    """Return the share of rows that hit."""
    return mean([float(hit) for hit in hits], scale=1.0)


def mean(values: Sequence[float], scale: float | None) -> Metric:
    """Return the mean of one value a row."""
    return Metric(np.stack([np.array(values, dtype=float), np.ones(len(values))], axis=1), ratio, scale)


def ratio(sums: Floats) -> Floats:
    """Return the first column over the second; 1 for nothing of nothing."""
    top, bottom = sums[..., 0], sums[..., 1]
    found: Floats = np.divide(top, bottom, out=np.ones_like(top), where=bottom > 0)
    return found


def chrf_figure(sums: Floats) -> Floats:
    """Return chrF2 from hypothesis, reference and matching n-grams of each order (Popović 2015)."""
    hypothesis, reference, match = (sums[..., i::3] for i in range(3))
    counts = (hypothesis > 0) & (reference > 0)
    orders = np.maximum(counts.sum(axis=-1), 1)
    precision = np.divide(match, hypothesis, out=np.zeros_like(match), where=counts).sum(axis=-1) / orders
    recall = np.divide(match, reference, out=np.zeros_like(match), where=counts).sum(axis=-1) / orders
    weighted = CHRF_BETA**2 * precision + recall
    score: Floats = np.divide(
        100.0 * (1 + CHRF_BETA**2) * precision * recall,
        weighted,
        out=np.zeros_like(weighted),
        where=weighted > 0,
    )
    return score


def bleu_figure(sums: Floats) -> Floats:
    """Return BLEU from matching and total n-grams of each order and both lengths (Papineni et al. 2002).

    An order without a match counts as half a match, the next as a quarter (sacrebleu's "exp").
    """
    match, total = sums[..., :BLEU_ORDER], sums[..., BLEU_ORDER : 2 * BLEU_ORDER]
    length, reference_length = sums[..., -2], sums[..., -1]
    empty_orders = np.cumsum((match == 0) & (total > 0), axis=-1)
    smoothed = np.where(match > 0, match, 0.5**empty_orders)
    logs = np.log(np.divide(smoothed, total, out=np.ones_like(match), where=total > 0))
    brevity = 1.0 - np.divide(reference_length, length, out=np.ones_like(length), where=length > 0)
    score = 100.0 * np.exp(np.minimum(brevity, 0.0) + logs.mean(axis=-1))
    # Without one match, or with answers too short for an order, sacrebleu's corpus score is 0.
    found: Floats = np.where((match.sum(axis=-1) > 0) & np.all(total > 0, axis=-1), score, 0.0)
    return found


def json_faults(answer: JsonAnswer | None, reference: JsonAnswer, label_key: str | None) -> dict[str, str]:
    """Return what differs, by kind of fault, in words; empty if the answer is right.

    The kinds, worst first: `invalid`, `wrong label`, `missing slot`, `wrong value`, `extra slot`,
    and `wrong answer` where neither side has keys.
    """
    if answer is not None and answer.canonical == reference.canonical:
        return {}
    if answer is None:
        return {"invalid": "not one JSON value"}
    if not is_valid(answer, reference, label_key):
        wanted = f"no text under {label_key!r}" if label_key else f"not {_kind(reference.value)}"
        return {"invalid": wanted}
    faults = {}
    if label_key is not None and answer.label(label_key) != reference.label(label_key):
        faults["wrong label"] = f"{answer.label(label_key)}, not {reference.label(label_key)}"
    given, wanted_slots = answer.slots(label_key), reference.slots(label_key)
    by_kind: Mapping[str, list[str]] = {
        "missing slot": [f"{k}={v}" for k, v in sorted(wanted_slots.items()) if k not in given],
        "wrong value": [
            f"{k}={given[k]}, not {v}" for k, v in sorted(wanted_slots.items()) if given.get(k, v) != v
        ],
        "extra slot": [f"{k}={v}" for k, v in sorted(given.items()) if k not in wanted_slots],
    }
    faults.update({kind: "; ".join(found) for kind, found in by_kind.items() if found})
    return faults or {"wrong answer": f"{answer.canonical}, not {reference.canonical}"}


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key is given twice")
    return found


def _number(text: str) -> float | int:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is beyond any float")
    return int(number) if number.is_integer() and abs(number) <= MAX_EXACT_FLOAT else number


def _refuse_constant(text: str) -> Any:
    raise ValueError(f"{text} is not JSON")


def _kind(value: Any) -> str:
    if isinstance(value, bool):
        return "a truth value"
    if isinstance(value, int | float):
        return "a number"
    if isinstance(value, str):
        return "a string"
    if isinstance(value, list):
        return "an array"
    return "an object" if isinstance(value, dict) else "null"


def _slot_counts(answer: JsonAnswer | None, reference: JsonAnswer, label_key: str | None) -> tuple[int, int]:
    """Return twice the right pairs, and all pairs of both sides: F1 is their ratio."""
    given = set(answer.slots(label_key).items()) if answer else set()
    wanted = set(reference.slots(label_key).items())
    return 2 * len(given & wanted), len(given) + len(wanted)


def _chrf_counts(answer: str, reference: str) -> list[int]:
    from sacrebleu.metrics.helpers import extract_all_char_ngrams

    counts = []
    for given, wanted in zip(
        extract_all_char_ngrams(answer, CHRF_ORDER, include_whitespace=False),
        extract_all_char_ngrams(reference, CHRF_ORDER, include_whitespace=False),
        strict=True,
    ):
        # A reference too short for an order says nothing about precision there (sacrebleu).
        counts += [given.total() if wanted else 0, wanted.total(), (given & wanted).total()]
    return counts


def _exp_ratio(sums: Floats) -> Floats:
    found: Floats = np.exp(ratio(sums))
    return found


class _Words:
    """Words for ROUGE: as rouge_score's own in English, where its own drops every other letter than a-z."""

    def tokenize(self, text: str) -> list[str]:
        return re.findall(r"[^\W_]+", text.lower())
