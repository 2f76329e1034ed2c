"""Tasks whose answer is a JSON object, with or without a key that names its class."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from typing_extensions import override

from stages.common.task.answer_schema import derive_schema, fits, order_keys, read_objects
from stages.common.task.json_answers import (
    JsonAnswer,
    find_json_errors,
    is_valid,
    read_json_answer,
    score_json,
)
from stages.common.task.metrics import Metric
from stages.common.task.protocol import Schema, Task


@dataclass(frozen=True, slots=True)
class JsonTask(Task):
    """An answer is one JSON object (or array); exact match as a JSON value decides.

    Attributes:
        label_key: the key whose string names the class of an answer; None: answers have no classes.
    """

    label_key: str | None
    kind: ClassVar[str] = "json"
    error_types: ClassVar[tuple[str, ...]] = (
        "invalid",
        "wrong label",
        "missing slot",
        "wrong value",
        "extra slot",
        "wrong answer",
    )
    answers_are_json: ClassVar[bool] = True

    @property
    @override
    def primary(self) -> str:
        return "exact_match"

    @property
    @override
    def class_name(self) -> str | None:
        return self.label_key

    @property
    @override
    def closed_set(self) -> None:
        return None

    @property
    @override
    def meanings(self) -> Mapping[str, str]:
        label = {f"{self.label_key}_accuracy": "answers with the right label"} if self.label_key else {}
        others = " other than the label" if self.label_key else ""
        return {
            "exact_match": "answers equal to the reference as JSON values, whatever the order of keys",
            **label,
            "valid_output": "answers that can be used at all: one JSON value of the right shape",
            "slot_f1": f"micro-averaged F1 over the pairs of key and value{others}",
        }

    @override
    def describe(self) -> dict[str, Any]:
        return {"kind": self.kind, "label_key": self.label_key, "labels": None}

    @override
    def find_problem(self, answer: str) -> str | None:
        found = read_json_answer(answer)
        if found is None:
            return "the answer is not one JSON value (NaN, Infinity and a repeated key are not JSON)"
        if not isinstance(found.value, dict | list):
            return "the answer is not a JSON object or array"
        if self.label_key is None or found.label(self.label_key):
            return None
        if not isinstance(found.value, dict) or self.label_key not in found.value:
            return f"the answer has no key {self.label_key!r}, which names its class (task.label_key)"
        value = json.dumps(found.value[self.label_key], ensure_ascii=False)
        return f"the class under {self.label_key!r} is {value[:40]}; it must be text that is not empty"

    @override
    def canonical(self, answer: str) -> str:
        found = read_json_answer(answer)
        return answer if found is None else found.canonical

    @override
    def rewrite(self, answer: str, schema: Mapping[str, Any] | None, separators: tuple[str, str]) -> str:
        value = json.loads(answer)
        ordered = order_keys(value, schema) if isinstance(value, dict) else value
        return json.dumps(ordered, ensure_ascii=False, separators=separators)

    @override
    def has_one_answer(self, answer: str) -> bool:
        return True

    @override
    def read_class(self, answer: str) -> str | None:
        found = read_json_answer(answer)
        return found.label(self.label_key) if found is not None and self.label_key else None

    @override
    def is_valid(self, answer: str, reference: str) -> bool:
        return is_valid(read_json_answer(answer), _read_reference(reference), self.label_key)

    @override
    def is_right(self, answer: str, reference: str) -> bool:
        found = read_json_answer(answer)
        return found is not None and found.canonical == _read_reference(reference).canonical

    @override
    def score(self, answers: Sequence[str], references: Sequence[str]) -> dict[str, Metric]:
        known = [_read_reference(reference) for reference in references]
        return score_json([read_json_answer(answer) for answer in answers], known, self.label_key)

    @override
    def find_errors(self, answer: str, reference: str) -> dict[str, str]:
        return find_json_errors(read_json_answer(answer), _read_reference(reference), self.label_key)

    @override
    def derive_schema(self, answers: Sequence[str]) -> Schema | None:
        objects = read_objects(answers)
        return None if objects is None else derive_schema(objects, self.label_key)

    @override
    def fits(self, schema: Mapping[str, Any] | None, answer: str) -> bool:
        found = read_json_answer(answer)
        if found is None or schema is None:
            return found is not None
        try:
            return fits(dict(schema), json.loads(answer))
        except KeyError:  # items in a list that was empty in all of training: nothing is known of them
            return False


def _read_reference(reference: str) -> JsonAnswer:
    found = read_json_answer(reference)
    if found is None:
        raise ValueError(f"a reference is not one JSON value: {reference[:100]!r}")
    return found
