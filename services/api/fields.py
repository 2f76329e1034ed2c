"""Fields that requests of other servers' clients have, and this service does not.

A field that changes no answer and promises nothing is ignored. Any other is rejected by its name, unless its
value asks for what is done anyway: an answer other than the one asked for would be worse than none.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Collection
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, model_validator
from pydantic_core import PydanticCustomError

from services.engines.calls.bounds import MAX_DEPTH, is_deep

# Types of pydantic's errors whose context has the field.
UNSUPPORTED = "unsupported_field"  # it is not taken
BROKEN_TEXT = "broken_text"  # its text is not Unicode
WRONG = "wrong_field"  # its value does not fit other fields

# They name who asks, how fast to answer, or they describe what another field already holds. Clients send back
# what other servers wrote into a call (extra_content: Google's; provider_specific_fields: LiteLLM's).
IGNORED = frozenset(
    {
        "annotations",
        "cache_control",
        "description",
        "extra_content",
        "include_obfuscation",
        "index",
        "metadata",
        "parallel_tool_calls",
        "priority",
        "provider_specific_fields",
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
        "request_id",
        "safety_identifier",
        "service_tier",
    }
)
# Values besides null and, but for `SWITCHES`, what is empty that ask for what is done anyway.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "add_generation_prompt": (True,),
    "add_special_tokens": (False,),
    "best_of": (1,),
    "continue_final_message": (False,),
    "do_sample": (True,),
    "background": (False,),
    "early_stopping": (False,),
    "echo": (False,),
    "effort": ("none",),
    "function_call": ("none", "auto"),
    "ignore_eos": (False,),
    "include_stop_str_in_output": (False,),
    "length_penalty": (1,),
    "min_p": (0,),
    "min_tokens": (0,),
    "modalities": (["text"],),
    "num_beams": (1,),
    "reasoning_effort": ("none",),
    "repetition_penalty": (1,),
    "return_token_ids": (False,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "store": (False,),
    "tool_choice": ("none", "auto"),
    "top_k": (0, -1),
    "top_logprobs": (0,),
    "truncation": ("disabled",),
    "truncate_prompt_tokens": (-1,),
    "typical_p": (1,),
    "use_beam_search": (False,),
    "verbosity": ("medium",),
}
# What even an empty object asks for: a search, or an answer that is JSON.
SWITCHES = frozenset({"guided_json", "json_schema", "web_search_options"})
_TOOLS = "/v1/chat/completions takes tools, and tool_choice"
_GRAMMAR = "only JSON schemas are supported: response_format, type json_schema"
ALTERNATIVES = {
    "audio": "only text is supported",
    "background": "no response is stored here; wait for the answer, or stream it",
    "custom": "only tools of the type function are supported",
    "function_call": _TOOLS,
    "functions": _TOOLS,
    "grammar": _GRAMMAR,
    "guided_choice": _GRAMMAR,
    "guided_grammar": _GRAMMAR,
    "guided_json": _GRAMMAR,
    "guided_regex": _GRAMMAR,
    "json_schema": "it belongs into response_format, type json_schema",
    "modalities": "only text is supported",
    "name": "the chat template has no place for the name of a participant; leave it out",
    "prediction": "no answer is written faster for it; leave it out",
    "schema": "it is only taken as response_format.json_schema.schema, with type json_schema",
    "store": "no answer can be retrieved here; send false",
    "structured_outputs": _GRAMMAR,
    "tool_call_id": _TOOLS,
    "tool_calls": _TOOLS,
    "tool_choice": _TOOLS,
    "tools": _TOOLS,
    "truncation": "a conversation that is too long is rejected; shorten it",
}
SUPPORTED_TWIN = {"max_output_tokens": "max_tokens", "max_new_tokens": "max_tokens", "stop_sequences": "stop"}


class Body(BaseModel):
    """Base of request bodies: other fields are ignored if they change no answer, and rejected if they do."""

    model_config = ConfigDict(strict=True, extra="ignore")

    @model_validator(mode="before")
    @classmethod
    def _has_no_other_fields(cls, body: Any) -> Any:
        if not isinstance(body, dict):
            return body
        if (path := find_broken_text(body)) is not None:
            raise PydanticCustomError(BROKEN_TEXT, "is not valid Unicode", {"field": path})
        known = {field.alias or name for name, field in cls.model_fields.items()}
        for name, value in body.items():
            if name not in known and not asks_for_nothing(name, value):
                context = {"field": name, "problem": describe_unsupported(name, known)}
                raise PydanticCustomError(UNSUPPORTED, "{problem}", context)
        return body


def check_depth(value: Any) -> Any:
    """Return a JSON value that every part of the service can write and walk through.

    Raises:
        ValueError: it is nested too deeply.
    """
    if is_deep(value):
        raise ValueError(f"is nested more than {MAX_DEPTH} levels deep")
    return value


JsonObject = Annotated[dict[str, Any], AfterValidator(check_depth)]


def asks_for_nothing(name: str, value: Any) -> bool:
    """Return whether ignoring an unknown field changes no answer."""
    if name in IGNORED or value is None:
        return True
    if isinstance(value, (list, dict, str)) and not value:
        return name not in SWITCHES
    # 1 == True, but no client sends one for the other.
    same_kind = (same for same in NEUTRAL.get(name, ()) if isinstance(same, bool) == isinstance(value, bool))
    return value in same_kind


def describe_unsupported(name: str, known: Collection[str]) -> str:
    """Return what to do instead of sending an unknown field."""
    if name in ALTERNATIVES:
        return f"is not supported: {ALTERNATIVES[name]}"
    nearest = [SUPPORTED_TWIN[name]] if name in SUPPORTED_TWIN else difflib.get_close_matches(name, known, 1)
    if nearest and nearest[0] in known:
        return f"is not a field of this request; did you mean {nearest[0]}?"
    return "is not supported, and leaving it out changes the answer; remove it"


def find_broken_text(body: Any) -> str | None:
    """Return the path of the first text or name in a body that is not valid Unicode, or None.

    JSON can write half a surrogate pair, which no tokenizer, store or response can encode.
    """
    if _is_whole(body):
        return None
    parts = [("", body)]
    while parts:
        path, value = parts.pop()
        if isinstance(value, str) and not _is_unicode(value):
            return path
        if isinstance(value, dict):
            if any(not _is_unicode(name) for name in value if isinstance(name, str)):
                return path
            inner = [(f"{path}.{name}".removeprefix("."), part) for name, part in value.items()]
        else:
            found = enumerate(value) if isinstance(value, list) else ()
            inner = [(f"{path}.{place}".removeprefix("."), part) for place, part in found]
        parts += reversed(inner)
    return None


def _is_whole(body: Any) -> bool:
    """Return True if all texts are valid Unicode, in a twentieth of the time of a walk."""
    try:
        json.dumps(body, ensure_ascii=False).encode()
    except (UnicodeEncodeError, ValueError, TypeError, RecursionError):
        return False
    return True


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
