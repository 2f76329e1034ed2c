"""JSON answers: reading them, their metrics, and what is wrong with one."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from stages.common.messages import refuse_constant, refuse_repeated_keys
from stages.common.records import format_canonical_json
from stages.common.task.metrics import Metric, compute_ratio, compute_share

# Above this a float cannot hold every whole number, so 2**53 + 1 and its float are not the same.
MAX_EXACT_FLOAT = 2**53


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
        return {key: format_canonical_json(value) for key, value in pairs if key != label_key}


def read_json_answer(text: str) -> JsonAnswer | None:
    """Return the one JSON value that `text` is, or None.

    Space around it is allowed; anything else is not: no prose, no code fence, no second value, no key
    given twice (readers disagree about which counts), no NaN or infinity, no half of a surrogate pair.
    Numbers that are equal become one: 5.0 reads as 5.
    """
    try:
        value = json.loads(
            text, object_pairs_hook=refuse_repeated_keys, parse_float=_number, parse_constant=refuse_constant
        )
        canonical = format_canonical_json(value)
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
        "exact_match": compute_share([a is not None and a.canonical == r.canonical for a, r in known]),
        "valid_output": compute_share([is_valid(a, r, label_key) for a, r in known]),
    }
    if label_key is not None:
        metrics[f"{label_key}_accuracy"] = compute_share(
            [a is not None and a.label(label_key) == r.label(label_key) for a, r in known]
        )
    if any(r.is_object for r in references):
        metrics["slot_f1"] = Metric(
            np.array([_slot_counts(a, r, label_key) for a, r in known], dtype=float), compute_ratio, 1.0
        )
    return metrics


def is_valid(answer: JsonAnswer | None, reference: JsonAnswer, label_key: str | None) -> bool:
    """Return whether an answer could be used at all, right or wrong; `score_json` defines what counts."""
    if answer is None:
        return False
    if label_key is not None:
        return answer.label(label_key) is not None
    return _kind(answer.value) == _kind(reference.value)


def find_json_errors(
    answer: JsonAnswer | None, reference: JsonAnswer, label_key: str | None
) -> dict[str, str]:
    """Return what differs, by error type; empty if the answer is right.

    The types, worst first: `invalid`, `wrong label`, `missing slot`, `wrong value`, `extra slot`,
    and `wrong answer` where neither side has keys.
    """
    if answer is not None and answer.canonical == reference.canonical:
        return {}
    if answer is None:
        return {"invalid": "not one JSON value"}
    if not is_valid(answer, reference, label_key):
        wanted = f"no text under {label_key!r}" if label_key else f"not {_kind(reference.value)}"
        return {"invalid": wanted}
    errors = {}
    if label_key is not None and answer.label(label_key) != reference.label(label_key):
        errors["wrong label"] = f"{answer.label(label_key)}, not {reference.label(label_key)}"
    given, wanted_slots = answer.slots(label_key), reference.slots(label_key)
    by_kind: Mapping[str, list[str]] = {
        "missing slot": [f"{k}={v}" for k, v in sorted(wanted_slots.items()) if k not in given],
        "wrong value": [
            f"{k}={given[k]}, not {v}" for k, v in sorted(wanted_slots.items()) if given.get(k, v) != v
        ],
        "extra slot": [f"{k}={v}" for k, v in sorted(given.items()) if k not in wanted_slots],
    }
    errors.update({kind: "; ".join(found) for kind, found in by_kind.items() if found})
    return errors or {"wrong answer": f"{answer.canonical}, not {reference.canonical}"}


def _number(text: str) -> float | int:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is beyond any float")
    return int(number) if number.is_integer() and abs(number) <= MAX_EXACT_FLOAT else number


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
