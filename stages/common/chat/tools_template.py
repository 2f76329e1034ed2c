"""The chat template of a model folder: the model's own, with fixed arguments and, if it has none, with tools.

Both are Jinja statements before the template. `fetch_base` writes them into the tokenizer's files, so that
training, evaluation, the GGUF file and every server render the same prompts without settings of their own.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from typing import Any, Literal

from stages.common.chat.calls import find_template_gap
from stages.common.chat.template import fix_argument, render_whole, thinks, writes_thoughts
from stages.common.errors import InputError
from stages.common.messages import Message

# Variables by which templates are told to have the model think. The first is also taken for a template that
# has none of them, because it always writes thoughts.
THINKING = ("enable_thinking", "thinking")

ToolsTemplate = Literal["auto", "own", "default"]

# Hermes' notation (NousResearch, 2024), which Qwen's templates have too: most parsers of servers know it.
_INTRODUCTION = (
    "To call functions, write for each call\n"
    '<tool_call>\n{"name": <name>, "arguments": {<arguments>}}\n</tool_call>\n'
    "Functions:"
)
# Lines end in the tags, so that nothing of them is written.
_PREAMBLE = """\
{%- set own = namespace(turns=[], tools='', results='') -%}
{%- if tools -%}
{%- set own.tools = INTRODUCTION -%}
{%- for tool in tools -%}{%- set own.tools = own.tools ~ '\\n' ~ (tool.function | tojson) -%}{%- endfor -%}
{%- if not messages or messages[0].role != PLACE -%}
{%- set own.turns = [{'role': PLACE, 'content': own.tools}] -%}
{%- endif -%}
{%- endif -%}
{%- for message in messages -%}
{%- if message.role == 'tool' and RESULTS_ARE_USER -%}
{%- set own.results = own.results ~ ('\\n' if own.results else '') -%}
{%- set own.results = own.results ~ '<tool_response>\\n' ~ message.content ~ '\\n</tool_response>' -%}
{%- elif message.role == 'user' and own.results and TURNS_ALTERNATE -%}
{%- set own.turns = own.turns + [{'role': 'user', 'content': own.results ~ '\\n\\n' ~ message.content}] -%}
{%- set own.results = '' -%}
{%- else -%}
{%- if own.results -%}
{%- set own.turns = own.turns + [{'role': 'user', 'content': own.results}] -%}
{%- set own.results = '' -%}
{%- endif -%}
{%- if loop.first and tools and message.role == PLACE -%}
{%- set own.turns = own.turns + [{'role': PLACE, 'content': JOINED}] -%}
{%- elif message.tool_calls -%}
{%- set calls = namespace(text=(message.content or '')) -%}
{%- for call in message.tool_calls -%}
{%- set calls.text = calls.text ~ ('\\n' if calls.text else '') ~ '<tool_call>\\n{"name": ' -%}
{%- set calls.text = calls.text ~ (call.function.name | tojson) ~ ', "arguments": ' -%}
{%- set calls.text = calls.text ~ (call.function.arguments | tojson) ~ '}\\n</tool_call>' -%}
{%- endfor -%}
{%- set own.turns = own.turns + [{'role': 'assistant', 'content': calls.text}] -%}
{%- else -%}
{%- set own.turns = own.turns + [message] -%}
{%- endif -%}
{%- endif -%}
{%- endfor -%}
{%- if own.results -%}
{%- set own.turns = own.turns + [{'role': 'user', 'content': own.results}] -%}
{%- endif -%}
{%- set messages = own.turns -%}
{%- set has_tools = true if tools else false -%}
{%- set tools = none -%}
"""


def adapt_template(
    tokenizer: Any, arguments: Mapping[str, Any], with_tools: bool, tools_template: ToolsTemplate
) -> str:
    """Return the tokenizer's chat template with its arguments fixed and, where it must, with tools.

    Args:
        arguments: values of the variables that the template reads, such as `enable_thinking`.
        with_tools: whether conversations have tools.
        tools_template: `auto` takes the default if the model's own template lacks tools.

    Raises:
        InputError: the template is to write tools and cannot.
    """
    adapted = _with_arguments(tokenizer, arguments)
    if not with_tools:
        return str(adapted.chat_template)
    gap = None if tools_template == "default" else find_template_gap(adapted)
    if gap and tools_template == "own":
        raise InputError(gap, "set task.tools_template: auto, which adds the default notation of tools")
    if gap or tools_template == "default":
        adapted.chat_template = _write_preamble(adapted) + str(adapted.chat_template)
        if missing := find_template_gap(adapted):
            raise InputError(
                f"{missing}, also with the default notation of tools before it",
                "choose another base model (fetch_base in params.yaml)",
            )
    return str(adapted.chat_template)


def find_filled_gap(
    tokenizer: Any, arguments: Mapping[str, Any], with_tools: bool, tools_template: ToolsTemplate
) -> str | None:
    """Return what the model's own template lacks and `adapt_template` adds, where nothing asked for it."""
    if not with_tools or tools_template != "auto":
        return None
    return find_template_gap(_with_arguments(tokenizer, arguments))


def _with_arguments(tokenizer: Any, arguments: Mapping[str, Any]) -> Any:
    """Return a copy of the tokenizer whose template has the arguments fixed."""
    fixed = copy.deepcopy(tokenizer)
    fixed.chat_template = _fix_arguments(tokenizer, arguments)
    return fixed


def suggest_for_thoughts(tokenizer: Any) -> str:
    """Return what has thoughts learned that the template does not write as it is, found by rendering one."""
    asked = copy.deepcopy(tokenizer)
    template = str(tokenizer.chat_template)
    for name in [name for name in THINKING if name in template] or THINKING[:1]:
        asked.chat_template = fix_argument(name, True) + template.replace(fix_argument(name, False), "")
        if thinks(asked):
            return f"set task.template_arguments: {{{name}: true}}"
    return (
        "this template writes no thoughts: choose a base model whose template does (fetch_base in "
        "params.yaml), or go on without them"
    )


def _fix_arguments(tokenizer: Any, arguments: Mapping[str, Any]) -> str:
    template = str(tokenizer.chat_template)
    unread = [name for name in arguments if name not in template]
    is_asked = unread == [THINKING[0]] and arguments[THINKING[0]] is True
    if is_asked and THINKING[1] not in template and writes_thoughts(tokenizer):
        unread = []
    if unread:
        raise InputError(
            f"the base model's chat template does not read {', '.join(unread)} (task.template_arguments)",
            "remove it from task.template_arguments, or correct its name",
        )
    return "".join(fix_argument(name, value) for name, value in arguments.items()) + template


def _write_preamble(tokenizer: Any) -> str:
    takes_system = _takes(tokenizer, [Message("system", "perennialtext"), Message("user", "b")])
    results = [Message("user", "a"), Message("assistant", "b"), Message("tool", "perennialtext")]
    takes_result = _takes(tokenizer, results)
    takes_two = _takes(tokenizer, [Message("user", "a"), Message("user", "perennialtext")])
    joined = (
        "message.content ~ '\\n\\n' ~ own.tools" if takes_system else "own.tools ~ '\\n\\n' ~ message.content"
    )
    return (
        _PREAMBLE.replace("INTRODUCTION", json.dumps(_INTRODUCTION))
        .replace("PLACE", "'system'" if takes_system else "'user'")
        .replace("RESULTS_ARE_USER", "false" if takes_result else "true")
        .replace("TURNS_ALTERNATE", "false" if takes_two else "true")
        .replace("JOINED", joined)
    )


def _takes(tokenizer: Any, messages: list[Message]) -> bool:
    """Return whether the template writes the message `perennialtext`, and a result under its own role."""
    try:
        text = render_whole(tokenizer, [*messages, Message("assistant", "c")], ())
    except InputError:
        return False
    return "perennialtext" in text and (messages[-1].role != "tool" or "tool" in text)
