"""What OpenVINO's pipeline can hold: JSON schemas within its bounds, and calls as XGrammar's structural tags.

https://xgrammar.mlc.ai/docs/structural_tag/structural_tag.html
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

from services.engines.protocol import CallForm, SchemaUnsupported
from stages.common.tools.references import resolve
from stages.common.tools.validation import make_validator

# JSON schema keywords that the pipeline supports. It compiles a schema in the middle of a step, has no way to
# do so before, and fails as a whole on any other keyword, so those are rejected before. String lengths are
# excluded because the pipeline then allows control characters, which JSON forbids.
SCHEMA_KEYWORDS = frozenset(
    (
        *("type", "enum", "const", "anyOf", "$ref", "$defs", "definitions"),
        *("properties", "required", "additionalProperties", "items", "minItems", "maxItems"),
        *("minimum", "maximum"),
        *("title", "description", "default", "examples", "$schema"),
    )
)
READ_ALONE = ("$ref", "const", "enum", "anyOf")
NOTES = frozenset(("$defs", "definitions", "title", "description", "default", "examples", "$schema"))
# No other answer goes on while it compiles: for up to 0.4 s of CPU with these bounds and a vocabulary of
# 49,152 tokens. 498 optional properties or texts of 60,000 characters, which others take, need 1 to 3 s.
MAX_SCHEMA_CHARS = 16_384
MAX_OPTIONAL_PAIRS = 100**2  # of optional properties in an object, each of which may follow each other


def write_tags(form: CallForm | None) -> str:
    """Return the answers of a form as structural tags, in JSON.

    White space between the parts of arguments is free: the pipeline has no setting for it.

    Raises:
        SchemaUnsupported: the form, or a schema in it, cannot be held.
    """
    if form is None or (form.mode != "required" and not form.opener):
        raise SchemaUnsupported(
            "the openvino engine cannot tell calls of this model from other text; "
            "services.engine.kind: paged can"
        )
    schemas = [json.loads(schema) for _, schema, _ in form.tools]
    if form.json_schema is not None:
        schemas.append(json.loads(form.json_schema))
    for schema in schemas:
        check_keywords(schema)
    check_size(json.dumps(schemas))
    elements = [_make_answer(form)]
    if form.thought is not None:
        start, end = form.thought
        elements.insert(0, {"type": "tag", "begin": start, "content": {"type": "any_text"}, "end": end})
    return json.dumps({"type": "structural_tag", "format": {"type": "sequence", "elements": elements}})


def _make_answer(form: CallForm) -> dict[str, Any]:
    """Return the format of an answer behind its thoughts."""
    excluded = [
        mark.strip() for mark in (form.opener, form.thought[1] if form.thought else "") if mark.strip()
    ]
    text = _make_text(form, excluded)
    if form.mode == "none":
        return text
    calls = _make_calls(form)
    if form.opener or form.closer:
        calls = {"type": "tag", "begin": form.opener, "content": calls, "end": form.closer}
    if form.mode == "required":
        return calls
    if text["type"] != "any_text" or not form.has_text:
        return {"type": "or", "elements": [text, calls]}
    return {
        "type": "triggered_tags",
        "triggers": [form.opener.strip()],
        "tags": [calls],
        "stop_after_first": True,
        "excludes": excluded[1:],
    }


def _make_text(form: CallForm, excluded: Sequence[str]) -> dict[str, Any]:
    """Return the format of an answer without calls."""
    if form.json_schema is not None:
        return {"type": "json_schema", "json_schema": json.loads(form.json_schema)}
    if form.choices:
        options = [{"type": "const_string", "value": choice} for choice in form.choices]
        return {"type": "or", "elements": options}
    return {"type": "any_text", "excludes": excluded}


def _make_calls(form: CallForm) -> dict[str, Any]:
    tags = [
        {
            "type": "tag",
            "begin": before,
            "content": {"type": "json_schema", "json_schema": json.loads(schema)},
            "end": after,
        }
        for before, schema, after in form.tools
    ]
    return {
        "type": "tags_with_separator",
        "tags": tags,
        "separator": form.separator,
        "at_least_one": True,
        "stop_after_first": not form.separator,
    }


def check_size(schema: str) -> None:
    """Raise SchemaUnsupported for a schema that the pipeline takes too long to compile."""
    if len(schema) > MAX_SCHEMA_CHARS:
        raise SchemaUnsupported(
            f"the JSON schema has {len(schema)} characters; the openvino engine takes {MAX_SCHEMA_CHARS}"
        )
    pairs = 0
    parts = [json.loads(schema)]
    while parts:
        part = parts.pop()
        if isinstance(part, dict):
            properties, required = part.get("properties"), part.get("required")
            if isinstance(properties, dict):
                names = required if isinstance(required, list) else []
                pairs += sum(name not in names for name in properties) ** 2
            parts += part.values()
        elif isinstance(part, list):
            parts += part
    if pairs > MAX_OPTIONAL_PAIRS:
        raise SchemaUnsupported(
            f"the JSON schema has {pairs} pairs of properties that are not required in one object; the "
            f"openvino engine takes {MAX_OPTIONAL_PAIRS}, as of {math.isqrt(MAX_OPTIONAL_PAIRS)} properties"
        )


def check_keywords(schema: Any, document: Any = None) -> None:
    """Check that the pipeline supports all of a schema: it ignores the rest, or fails with all answers.

    Args:
        schema: one that llguidance compiles.
        document: that its references are about; None: the schema itself.

    Raises:
        SchemaUnsupported: it does not; the message names the keyword and what to write.
    """
    document = schema if document is None else document
    if schema is False:
        raise SchemaUnsupported("the openvino engine does not support the schema false; fix: leave it out")
    if not isinstance(schema, dict):
        return
    unknown = sorted(set(schema) - SCHEMA_KEYWORDS)
    if unknown:
        raise SchemaUnsupported(f"the openvino engine does not support {', '.join(unknown)} in a JSON schema")
    reference = schema.get("$ref", "#")
    if not isinstance(reference, str) or not reference.startswith("#"):
        raise SchemaUnsupported(f"the JSON schema refers to {reference!r}, which is outside of it")
    _check_neighbours(schema, document)
    if not {"const", "enum"} & schema.keys():
        _check_limits(schema)
    for key in ("properties", "$defs", "definitions"):
        for part in schema.get(key, {}).values():
            check_keywords(part, document)
    for part in schema.get("anyOf", ()):
        check_keywords(part, document)
    for key in ("items", "additionalProperties"):
        if schema.get(key) is not False:
            check_keywords(schema.get(key), document)


def _check_neighbours(schema: dict[str, Any], document: Any) -> None:
    """Refuse what the pipeline does not read: of these keywords it reads the first, and nothing else."""
    first = next((key for key in READ_ALONE if key in schema), None)
    others = {key: value for key, value in schema.items() if key not in NOTES and key != first}
    if first is None or not others:
        return
    named = ", ".join(others)
    if first in ("const", "enum"):
        fits = make_validator(document).evolve(schema=others).is_valid
        if not all(map(fits, schema["enum"] if first == "enum" else [schema["const"]])):
            raise SchemaUnsupported(
                f"the openvino engine would write a value of {first} that {named} excludes; fix: leave it out"
            )
        return
    parts = [resolve(document, schema["$ref"])] if first == "$ref" else schema["anyOf"]
    if not all(isinstance(part, dict) and others.items() <= part.items() for part in parts):
        raise SchemaUnsupported(
            f"the openvino engine does not hold {named} next to {first}; fix: write it into each schema that "
            f"{first} leads to"
        )


def _check_limits(schema: dict[str, Any]) -> None:
    """Refuse limits that the pipeline ignores, holds wrongly, or fails on."""
    kinds = schema.get("type")
    kinds = kinds if isinstance(kinds, list) else [kinds]
    for key in ("minimum", "maximum"):
        if key not in schema:
            continue
        if None in kinds or "number" in kinds:
            raise SchemaUnsupported(f"the openvino engine holds {key} of the type integer only")
        if "integer" in kinds and schema[key] != int(schema[key]):
            raise SchemaUnsupported(
                f"{key} is {schema[key]}; fix: give a whole number to the openvino engine"
            )
    if {"minItems", "maxItems"} & schema.keys() and None in kinds:
        raise SchemaUnsupported("the openvino engine holds minItems and maxItems of the type array only")
    if schema.get("minItems") and "items" not in schema and "array" in kinds:
        raise SchemaUnsupported("the openvino engine holds minItems with a schema of items only")
    unnamed = [name for name in schema.get("required", ()) if name not in schema.get("properties", {})]
    if unnamed and (None in kinds or "object" in kinds):
        raise SchemaUnsupported(
            f"the openvino engine does not hold the required {unnamed[0]!r}; fix: write it into properties"
        )
