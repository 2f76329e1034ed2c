"""What OpenVINO's pipeline can hold: JSON schemas within its bounds, and calls as XGrammar's structural tags.

https://xgrammar.mlc.ai/docs/structural_tag/structural_tag.html
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

from services.engines.protocol import CallForm, SchemaUnsupported

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


def check_keywords(schema: Any) -> None:
    """Raise SchemaUnsupported for a keyword that the pipeline does not support."""
    if not isinstance(schema, dict):
        return
    unknown = sorted(set(schema) - SCHEMA_KEYWORDS)
    if unknown:
        raise SchemaUnsupported(f"the openvino engine does not support {', '.join(unknown)} in a JSON schema")
    reference = schema.get("$ref", "#")
    if not isinstance(reference, str) or not reference.startswith("#"):
        raise SchemaUnsupported(f"the JSON schema refers to {reference!r}, which is outside of it")
    for key in ("properties", "$defs", "definitions"):
        for part in schema.get(key, {}).values():
            check_keywords(part)
    for part in (schema.get("items"), schema.get("additionalProperties"), *schema.get("anyOf", ())):
        check_keywords(part)
