"""Check values against JSON schemas that others wrote: patterns have a time limit, and nothing is fetched."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from fractions import Fraction
from typing import Any

MAX_PATTERN_S = 0.1  # for one `pattern` and one text


def choose_validator(schema: Any) -> Any:
    """Return jsonschema's class for the draft that a schema names; without one, for 2020-12."""
    import jsonschema  # type: ignore[import-untyped]

    return jsonschema.validators.validator_for(schema, jsonschema.Draft202012Validator)


def make_validator(schema: Mapping[str, Any] | bool) -> Any:
    """Return jsonschema's validator of a schema; it raises a TimeoutError where a pattern takes too long."""
    import jsonschema
    import referencing

    keywords = {"pattern": _check_pattern, "multipleOf": _check_multiple}
    bounded = jsonschema.validators.extend(choose_validator(schema), keywords)
    return bounded(schema, registry=referencing.Registry())  # an empty registry fetches nothing


def _check_pattern(_validator: Any, pattern: str, instance: object, _schema: object) -> Iterator[Any]:
    """Check the keyword `pattern` with a time limit: it can backtrack forever.

    Raises:
        TimeoutError: it takes longer. No error of the value: under `not` that would count as a match.
    """
    import jsonschema
    import regex  # type: ignore[import-untyped]

    if not isinstance(instance, str):
        return
    try:
        if not regex.search(pattern, instance, timeout=MAX_PATTERN_S):
            yield jsonschema.ValidationError(f"does not match the pattern {pattern!r}")
    except TimeoutError:
        raise TimeoutError(f"a text takes too long to match the pattern {pattern!r}") from None
    except regex.error:
        yield jsonschema.ValidationError(f"cannot be checked with the pattern {pattern!r}")


def _check_multiple(_validator: Any, multiple: float, instance: object, _schema: object) -> Iterator[Any]:
    """Check the keyword `multipleOf` in decimals, as it is written: in floats 4.47 is no multiple of 0.01."""
    import jsonschema

    is_number = isinstance(instance, int | float) and not isinstance(instance, bool)
    if is_number and Fraction(repr(instance)) % Fraction(repr(multiple)):
        yield jsonschema.ValidationError(f"{instance!r} is not a multiple of {multiple!r}")
