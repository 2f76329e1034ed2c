"""What OpenAI's API has and the service does not: a request for each gap, and the field of its refusal.

The tests send each case; docs/reference/openai.md lists them.
"""

from dataclasses import dataclass
from typing import Any

CHAT, COMPLETIONS, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
EMBEDDINGS = "/v1/embeddings"
USER = {"role": "user", "content": "x"}
FUNCTION = {"type": "function", "function": {"name": "f"}}
FLAT_FUNCTION = {"type": "function", "name": "f"}
# A request of each route that is answered; a case replaces or adds fields.
ANSWERED: dict[str, dict[str, Any]] = {
    CHAT: {"messages": [USER], "max_tokens": 4},
    COMPLETIONS: {"prompt": "x", "max_tokens": 4},
    RESPONSES: {"input": "x", "max_output_tokens": 4},
    EMBEDDINGS: {"input": "x"},
}


@dataclass(frozen=True)
class Gap:
    """One thing that a route does not do.

    Attributes:
        param: the field that the refusal names.
        sent: the fields of the request.
        instead: words of the refusal on what to do instead.
    """

    param: str
    sent: dict[str, Any]
    instead: str = ""


def make_part(kind: str) -> dict[str, Any]:
    """Return the fields of a chat with a part of this type."""
    return {"messages": [{"role": "user", "content": [{"type": kind, kind: {}}]}]}


def make_item(kind: str) -> dict[str, Any]:
    """Return the fields of a response with an item of this type."""
    return {"input": [USER, {"type": kind, "id": "x"}]}


def make_input_part(kind: str) -> dict[str, Any]:
    """Return the fields of a response with a message that has a part of this type."""
    return {"input": [{"role": "user", "content": [{"type": kind}]}]}


def make_asking(more: dict[str, Any]) -> dict[str, Any]:
    """Return a turn that calls a tool, with further fields in the call."""
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}, **more}
    return {"role": "assistant", "tool_calls": [call]}


FLAT_CALL = {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"}
FLAT_RESULT = {"type": "function_call_output", "call_id": "c", "output": "x"}
RESULT = {"role": "tool", "tool_call_id": "c", "content": "x"}
ANY_JSON = {"name": "a", "schema": {"enum": ["y", "z"]}}
ONLY_TEXT = "only text is supported"
ONLY_TEXT_PARTS = "only 'text' is"
ONLY_FUNCTIONS = "only 'function' is"
TAKES_TOOLS = "/v1/chat/completions takes tools, and tool_choice"
SEND_ITEMS = "no response is stored here; send the earlier items in input"
TOOL_TYPES = (
    "apply_patch",
    "code_interpreter",
    "computer_use_preview",
    "custom",
    "file_search",
    "image_generation",
)
TOOL_TYPES += ("local_shell", "mcp", "shell", "tool_search", "web_search", "web_search_preview")
ITEM_TYPES = ("apply_patch_call", "code_interpreter_call", "compaction", "computer_call", "custom_tool_call")
ITEM_TYPES += ("file_search_call", "image_generation_call", "item_reference", "local_shell_call", "mcp_call")
ITEM_TYPES += ("mcp_list_tools", "shell_call", "tool_search_call", "web_search_call")

GAPS: dict[str, list[Gap]] = {
    CHAT: [
        Gap("audio", {"audio": {"voice": "alloy", "format": "mp3"}}, ONLY_TEXT),
        Gap("function_call", {"function_call": {"name": "f"}}, TAKES_TOOLS),
        Gap("functions", {"functions": [{"name": "f"}]}, TAKES_TOOLS),
        Gap("logit_bias", {"logit_bias": {"5": -100}}),
        Gap("logprobs", {"logprobs": True, "stop": "x", "tools": [FUNCTION]}, "leave one out"),
        *(Gap("messages.0.content.0.type", make_part(kind), ONLY_TEXT_PARTS)
          for kind in ("file", "image_url", "input_audio", "refusal")),
        Gap("messages.0.name", {"messages": [{**USER, "name": "ann"}]}, "leave it out"),
        Gap("messages.0.role", {"messages": [{"role": "function", "name": "f", "content": "x"}]}),
        Gap("modalities", {"modalities": ["text", "audio"]}, ONLY_TEXT),
        Gap("moderation", {"moderation": {"model": "omni-moderation-latest"}}),
        Gap("n", {"n": 2}),
        Gap("prediction", {"prediction": {"type": "content", "content": "x"}}, "leave it out"),
        Gap("reasoning_effort", {"reasoning_effort": "high"}),
        Gap("store", {"store": True}, "send false"),
        Gap("tool_choice.type", {"tool_choice": {"type": "allowed_tools"}}, ONLY_FUNCTIONS),
        Gap("tools.0.custom", {"tools": [{"type": "custom", "custom": {"name": "f"}}]}, "the type function"),
        Gap("verbosity", {"verbosity": "low"}),
        Gap("web_search_options", {"web_search_options": {}}),
    ],
    COMPLETIONS: [
        Gap("best_of", {"best_of": 2}),
        Gap("logit_bias", {"logit_bias": {"5": -100}}),
        Gap("max_tokens", {"max_tokens": 0}, "only possible with echo"),
        Gap("n", {"n": 2}),
        Gap("suffix", {"suffix": "x"}),
    ],
    RESPONSES: [
        Gap("access_programs", {"access_programs": {"cyber": "standard"}}),
        Gap("background", {"background": True}, "wait for the answer, or stream it"),
        Gap("context_management", {"context_management": [{"type": "compaction"}]}),
        Gap("conversation", {"conversation": "conv_1"}, SEND_ITEMS),
        Gap("image", {"image": {"context_compression": "enabled"}}),
        Gap("include", {"include": ["reasoning.encrypted_content"]}),
        *(Gap("input.0.content.0.type", make_input_part(kind), "'input_text' is")
          for kind in ("input_audio", "input_file", "input_image")),
        Gap("input.1.encrypted_content", {"input": [USER, {"type": "reasoning", "encrypted_content": "x"}]}),
        Gap("input.1.summary", {"input": [USER, {"type": "reasoning", "summary": [{"text": "x"}]}]}),
        *(Gap("input.1.type", make_item(kind), "function_call_output, reasoning are") for kind in ITEM_TYPES),
        Gap("max_tool_calls", {"max_tool_calls": 1}),
        Gap("moderation", {"moderation": {"model": "omni-moderation-latest"}}),
        Gap("previous_response_id", {"previous_response_id": "resp_1"}, SEND_ITEMS),
        Gap("prompt", {"prompt": {"id": "pmpt_1"}}),
        Gap("reasoning.context", {"reasoning": {"context": "all_turns"}}),
        Gap("reasoning.effort", {"reasoning": {"effort": "high"}}),
        Gap("reasoning.summary", {"reasoning": {"summary": "auto"}}),
        Gap("store", {"store": True}, "send false"),
        Gap("text.verbosity", {"text": {"verbosity": "low"}}),
        Gap("tool_choice.type", {"tool_choice": {"type": "allowed_tools"}}, ONLY_FUNCTIONS),
        Gap("tool_choice.type", {"tool_choice": {"type": "web_search_preview"}}, ONLY_FUNCTIONS),
        Gap("tools.0.defer_loading", {"tools": [{**FLAT_FUNCTION, "defer_loading": True}]}),
        *(Gap("tools.0.type", {"tools": [{"type": kind}]}, ONLY_FUNCTIONS) for kind in TOOL_TYPES),
        Gap("top_logprobs", {"top_logprobs": 1}),
        Gap("truncation", {"truncation": "auto"}, "a conversation that is too long is rejected"),
    ],
    EMBEDDINGS: [Gap("dimensions", {"dimensions": 5}, "is not possible")],
}  # fmt: skip
# Fields that are taken and change no answer: they name who asks, or how fast and how long to keep.
_NOTED: dict[str, Any] = {
    "prompt_cache_key": "k",
    "prompt_cache_options": {"mode": "explicit"},
    "prompt_cache_retention": "24h",
    "safety_identifier": "u",
    "service_tier": "flex",
}
TAKEN: dict[str, dict[str, Any]] = {
    CHAT: {**_NOTED, "metadata": {"a": "b"}},
    COMPLETIONS: {},
    RESPONSES: _NOTED,
    EMBEDDINGS: {},
}
# The same of fields within objects: a request with them, and the field.
TAKEN_WITHIN: dict[str, list[Gap]] = {
    CHAT: [
        *(Gap(f"messages.1.tool_calls.0.{name}", {"messages": [USER, make_asking({name: {"a": 1}}), RESULT]})
          for name in ("extra_content", "provider_specific_fields")),
        Gap("response_format.json_schema.description",
            {"response_format": {"type": "json_schema", "json_schema": {**ANY_JSON, "description": "d"}}}),
    ],
    COMPLETIONS: [],
    RESPONSES: [
        Gap("input.1.provider_specific_fields",
            {"input": [USER, {**FLAT_CALL, "provider_specific_fields": {"a": 1}}, FLAT_RESULT]}),
        Gap("text.format.description",
            {"text": {"format": {"type": "json_schema", **ANY_JSON, "description": "d"}}}),
    ],
    EMBEDDINGS: [],
}  # fmt: skip
# Method, path and status of what there is no route for.
ROUTES: list[tuple[str, str, int]] = [
    *(("POST", f"/v1/{path}", 404) for path in (
        "assistants", "audio/speech", "audio/transcriptions", "audio/translations", "batches",
        "chat/completions/ID", "containers", "conversations", "evals", "files", "fine_tuning/jobs",
        "images/edits", "images/generations", "moderations", "realtime/client_secrets", "responses/compact",
        "responses/input_tokens", "responses/ID/cancel", "skills", "threads", "uploads",
        "vector_stores", "videos",
    )),
    ("GET", "/v1/chat/completions", 405),
    ("GET", "/v1/chat/completions/ID", 404),
    ("GET", "/v1/responses/ID", 404),
    ("DELETE", "/v1/responses/ID", 404),
    ("GET", "/v1/responses/ID/input_items", 404),
    ("DELETE", "/v1/models/ID", 405),
]  # fmt: skip
