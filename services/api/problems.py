"""Describe why a body cannot be read or a field cannot be accepted."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from services import errors
from services.api.fields import BROKEN_TEXT, UNSUPPORTED, WRONG
from services.errors import ApiError


def describe_unread(error: HTTPException, headers: Mapping[str, str]) -> str:
    """Return why the parser could not read a body."""
    if encoding := headers.get("content-encoding"):
        return f"it has the Content-Encoding {encoding!r}, and only plain bodies are read"
    cause = error.__cause__
    if isinstance(cause, UnicodeDecodeError):
        return f"byte {cause.start} is not UTF-8"
    if isinstance(cause, RecursionError):
        return "it is nested too deeply"
    if isinstance(cause, ValueError) and "digits" in str(cause):
        return "it has an integer with too many digits"
    return str(cause or error.detail)


def convert_validation_error(error: RequestValidationError, content_type: str = "") -> ApiError:
    """Return the first problem of a body: 400 if it is not JSON, 415 or 422 for another type or value."""
    first = error.errors()[0]
    where = [part for part in first["loc"] if part != "body"]
    if not where and first["type"] == "missing":
        return errors.invalid_value(None, "The body is empty; it must be a JSON object.")
    if first["type"] == "model_attributes_type" and not where:
        if isinstance(error.body, bytes):
            return errors.wrong_content_type(content_type)
        return errors.invalid_value(None, "The body must be a JSON object.")
    if first["type"] == "json_invalid":
        return errors.invalid_json(f"{first['ctx']['error']} at position {first['loc'][-1]}")
    first, sent = _pick(error)
    param = ".".join(map(str, sent))
    if first["type"] in (BROKEN_TEXT, WRONG):
        param = ".".join(filter(None, (param, first["ctx"]["field"])))
        return errors.invalid_value(param or None, first["msg"])
    if first["type"] == UNSUPPORTED:
        param = ".".join(filter(None, (param, first["ctx"]["field"])))
        return errors.unsupported_parameter(param, first["msg"])
    return errors.invalid_value(param or None, first["msg"].removeprefix("Value error, "))


def _pick(error: RequestValidationError) -> tuple[Any, tuple[int | str, ...]]:
    """Return the first problem with its location, of those of one union the innermost."""
    found = [(problem, tuple(_keep_sent(problem, error.body))) for problem in error.errors()]
    outermost = found[0][1]
    same = [pair for pair in found if pair[1][: len(outermost)] == outermost]
    return max(same, key=lambda pair: len(pair[1]))


def _keep_sent(problem: Any, body: Any) -> Iterator[int | str]:
    """Yield the parts of a problem's location that are in the body, or missing; not pydantic's own names."""
    where = problem["loc"][1:]
    for place, part in enumerate(where):
        is_missing = problem["type"] == "missing" and place == len(where) - 1
        if isinstance(body, dict) and (part in body or is_missing):
            body = body.get(part)
        elif isinstance(body, list) and isinstance(part, int) and part < len(body):
            body = body[part]
        else:
            continue
        yield part
