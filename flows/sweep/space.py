"""The search space: its keys and values, checked against the model of `params.yaml` before any trial."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.common.errors import ParamsError
from stages.common.params.checked_yaml import Document, check_section, parse, suggest_nearest
from stages.common.params.finetune import Finetune
from stages.common.params.loop import TriedValues

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

SECTION = "finetune"  # trials share the rows: only how they are learned differs
POINTS = "finetune.validate_every"

Space = Mapping[str, TriedValues]
Values = Mapping[str, Any]  # of a trial, by dotted key


def check_space(path: Path, space: Space) -> None:
    """Check that every key is one of the section, and takes each choice and both ends of each range.

    Args:
        path: of the `params.yaml` that has the other values.

    Raises:
        ParamsError: with every problem.
    """
    document = parse(path)
    found = [problem for key, tried in space.items() for problem in _find_problems(document, key, tried)]
    found += _find_problem_of_points(document, space)
    if found:
        lines = "\n".join(f"{path.name}: flows.sweep.space: {problem}" for problem in dict.fromkeys(found))
        raise ParamsError(
            f"the sweep cannot try these values\n{lines}",
            "correct flows.sweep.space; docs/reference/params.md has every key of finetune",
        )


def _find_problems(document: Document, key: str, tried: TriedValues) -> Iterator[str]:
    section, _, name = key.partition(".")
    if section != SECTION:
        yield f"{key} is not a key of section {SECTION}: all trials learn the same rows"
    elif name not in Finetune.model_fields:
        known = [f"{SECTION}.{field}" for field in Finetune.model_fields]
        yield f"{key} is an unknown key{suggest_nearest(key, known)}"
    else:
        for value in list_ends(tried):
            values = {**document.values, SECTION: {**document.values[SECTION], name: value}}
            _, problems = check_section(replace(document, values=values), SECTION, Finetune)
            yield from (text for _, text in problems)


def _find_problem_of_points(document: Document, space: Space) -> Iterator[str]:
    """Yield why trials would have no points, or no comparable ones."""
    tried = space.get(POINTS)
    every = list_ends(tried) if tried else [document.values[SECTION].get("validate_every")]
    if None in every:
        yield f"{POINTS} is null: no validation row would be asked, and nothing could be compared"
    elif len(every) > 1:
        yield f"{POINTS} has several values: the points of two trials could not be compared"


def list_ends(tried: TriedValues) -> list[Any]:
    """Return the choices, or the ends of the range."""
    if tried.choices is not None:
        return list(tried.choices)
    return list(dict.fromkeys([tried.low, tried.high]))


def make_distributions(space: Space) -> dict[str, BaseDistribution]:
    """Return the space as Optuna has it; a choice is its JSON text, as it can be a list or a mapping."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    found: dict[str, BaseDistribution] = {}
    for key, tried in space.items():
        if tried.choices is not None:
            found[key] = CategoricalDistribution([encode_choice(choice) for choice in tried.choices])
        elif isinstance(tried.low, int) and isinstance(tried.high, int):
            found[key] = IntDistribution(tried.low, tried.high, log=tried.log)
        else:
            assert tried.low is not None and tried.high is not None
            found[key] = FloatDistribution(tried.low, tried.high, log=tried.log)
    return found


def encode_choice(value: Any) -> str:
    """Return a choice as JSON text."""
    return json.dumps(value, sort_keys=True)


def decode_values(drawn: Mapping[str, Any], space: Space) -> dict[str, Any]:
    """Return what Optuna has drawn as values of `params.yaml`."""
    return {
        key: json.loads(drawn[key]) if tried.choices is not None else drawn[key]
        for key, tried in space.items()
    }


def encode_current(section: Mapping[str, Any], space: Space) -> dict[str, Any] | None:
    """Return the present values as Optuna would draw them; None if one is outside the space.

    Args:
        section: `finetune` of params.yaml, as plain values.
    """
    drawn: dict[str, Any] = {}
    for key, tried in space.items():
        # Points change nothing that is learned.
        value = list_ends(tried)[0] if key == POINTS else section[key.partition(".")[2]]
        if tried.choices is not None:
            if encode_choice(value) not in map(encode_choice, tried.choices):
                return None
            drawn[key] = encode_choice(value)
        else:
            assert tried.low is not None and tried.high is not None
            if isinstance(value, bool) or not isinstance(value, int | float):
                return None
            if not tried.low <= value <= tried.high:
                return None
            drawn[key] = value
    return drawn


def to_changes(values: Values) -> dict[str, dict[str, Any]]:
    """Return values by dotted key as changes of sections of `params.yaml`."""
    return {SECTION: {key.partition(".")[2]: value for key, value in values.items()}}
