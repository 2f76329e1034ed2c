"""Render chat templates, for trainer, evaluation and server alike: no other module does.

What is learned is the answer and the token that ends its turn, whatever the template writes around them:

- what it writes between the prompt and the answer (Qwen3's empty think block) belongs to the prompt;
- what it writes behind the end of the turn (a newline, a second end) is not learned;
- the day's date is always the same day, so that a model is asked as it was taught, whatever the day;
- a control token in the text of a message is text (`control_tokens`).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import chain, pairwise
from typing import Any
from weakref import WeakKeyDictionary

from stages.common.chat.control_tokens import read_control_tokens
from stages.common.chat.day import fix_day
from stages.common.chat.plain import write_conversation, write_tools
from stages.common.errors import InputError
from stages.common.messages import Message, Tool

CHOOSE_ANOTHER = "choose an instruction-tuned base model whose chat template does (fetch_base in params.yaml)"

_ANSWER = "perennialanswer"  # found again in what the template writes around it; no template has this word
_THOUGHT = "perennialthought"
_NEXT = "perennialquestion"
_QUESTION = (Message("user", "a"),)
# `fix_argument` of a name such as enable_thinking (Qwen3) or thinking (DeepSeek, Granite).
_ASKS_TO_THINK = re.compile(r"\{%- set \w*think\w* = true -%\}\{#- task\.template_arguments -#\}")


class TemplateRefusal(InputError):
    """The chat template does not write this conversation: it has a role or an order that it refuses."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """Token ids of a conversation; the first `prompt_length` of them are not learned.

    Attributes:
        is_changed: whether the template wrote another answer than the row's, as one that cuts blanks does.
        given: further places that are not learned, each from a place up to another one: questions and results
            between the answers of a conversation.
    """

    input_ids: list[int]
    prompt_length: int
    is_changed: bool = False
    given: tuple[tuple[int, int], ...] = ()

    @property
    def learned(self) -> list[tuple[int, int]]:
        """The places that are learned: each answer with its end of turn, from a place up to another one."""
        edges = [self.prompt_length, *chain.from_iterable(self.given), len(self.input_ids)]
        return list(zip(edges[::2], edges[1::2], strict=True))

    @property
    def learned_count(self) -> int:
        """The number of tokens that are learned."""
        return sum(end - start for start, end in self.learned)


@dataclass(frozen=True, slots=True)
class AnswerFrame:
    """What a chat template writes around an answer.

    Attributes:
        before: text between the prompt and the answer, mostly none. It belongs to the prompt; where there are
            tools, mere space is learned with the answer: templates write none before a call (Mistral).
        end: the token that ends the turn, with what comes between the answer and it.
        end_id: its id.
        after: text behind it, which no model writes.
        thought_end: what ends the thoughts before an answer; None where the model does not think.
        thought_start: what begins them; empty where the prompt ends with it.
    """

    before: str
    end: str
    end_id: int
    after: str
    thought_end: str | None = None
    thought_start: str = ""


def encode_prompt(tokenizer: Any, messages: Sequence[Message], tools: Sequence[Tool] = ()) -> list[int]:
    """Return the token ids after which the model writes its answer.

    Raises:
        InputError: the template refuses the conversation, or is none that a model can be taught with.
    """
    return _tokens(tokenizer, render_prompt(tokenizer, messages, tools))


def encode_example(tokenizer: Any, messages: Sequence[Message], tools: Sequence[Tool] = ()) -> Encoded:
    """Return the token ids of prompt, answer and end of turn; the answer is the last message.

    The prompt's ids are exactly those of `encode_prompt`, and the answer is tokenised on its own,
    so that the model learns the very boundary that it will see when it is asked.

    Raises:
        InputError: the template refuses the conversation, or is none that a model can be taught with.
    """
    frame = read_answer_frame(tokenizer)
    prompt_text, answer_text = render_example(tokenizer, messages, tools)
    prompt = _tokens(tokenizer, prompt_text)
    answer = _tokens(tokenizer, answer_text + frame.end)
    return Encoded(prompt + answer, len(prompt), _is_changed(tokenizer, frame, messages[-1], answer_text))


def render_example(
    tokenizer: Any, messages: Sequence[Message], tools: Sequence[Tool] = ()
) -> tuple[str, str]:
    """Return the prompt and the answer as the template writes them, with their control tokens hidden.

    Raises:
        InputError: the template refuses the conversation, or is none that a model can be taught with.
    """
    frame = read_answer_frame(tokenizer)
    prompt_text = render_prompt(tokenizer, messages[:-1], tools)
    whole_text = _render(tokenizer, messages, tools, add_generation_prompt=False)
    answer_text = _cut_answer(prompt_text, whole_text, frame)
    if answer_text is None and not messages[-1].tool_calls:
        # Mistral's template leaves the system message out once there is an answer. It is asked with one.
        simple = render_prompt(tokenizer, _QUESTION)
        whole = _render(tokenizer, [*_QUESTION, messages[-1]], add_generation_prompt=False)
        answer_text = _cut_answer(simple, whole, frame)
    if answer_text is None:
        raise _rewrites()
    return prompt_text, answer_text


def encode_conversation(
    tokenizer: Any, messages: Sequence[Message], tools: Sequence[Tool], learned: Sequence[int]
) -> list[Encoded]:
    """Return the token ids of a conversation whose turns at the places `learned` are learned.

    It is one sequence, in which each turn has the very tokens before it that the model will be asked with. If
    the chat template writes earlier turns differently once there are later ones (Qwen3 drops what was
    thought), there is one sequence for each turn.

    Raises:
        InputError: the template refuses the conversation, or is none that a model can be taught with.
    """
    examples = [encode_example(tokenizer, messages[: place + 1], tools) for place in learned]
    for one, following in pairwise(examples):
        if following.input_ids[: len(one.input_ids)] != one.input_ids:
            return examples
    given = tuple((len(one.input_ids), following.prompt_length) for one, following in pairwise(examples))
    is_changed = any(example.is_changed for example in examples)
    return [Encoded(examples[-1].input_ids, examples[0].prompt_length, is_changed, given)]


def render_prompt(tokenizer: Any, messages: Sequence[Message], tools: Sequence[Tool] = ()) -> str:
    """Return the prompt as the template writes it, with the control tokens in its texts hidden.

    Raises:
        InputError: the template refuses the conversation, or is none that a model can be taught with.
    """
    frame = read_answer_frame(tokenizer)
    before = "" if tools and frame.before.isspace() else frame.before
    return _render(tokenizer, messages, tools, add_generation_prompt=True) + before


def render_whole(tokenizer: Any, messages: Sequence[Message], tools: Sequence[Tool]) -> str:
    """Return a conversation as the template writes it, the control tokens in its texts shown.

    Raises:
        InputError: the template refuses the conversation.
    """
    text = _render(tokenizer, messages, tools, add_generation_prompt=False)
    return read_control_tokens(tokenizer).show(text)


def cut_reasoning(tokenizer: Any, text: str) -> str:
    """Return what a model wrote behind its thoughts; the whole text where it does not think."""
    end = read_answer_frame(tokenizer).thought_end
    return text.rpartition(end)[2] if end else text


def encode_text(tokenizer: Any, text: str) -> list[int]:
    """Return the token ids of a text outside a conversation, in which no control token is one."""
    return _tokens(tokenizer, read_control_tokens(tokenizer).hide(text))


def end_of_turn_ids(tokenizer: Any) -> list[int]:
    """Return the ids that end an answer: the template's end of turn and the tokenizer's end of sequence."""
    ids = {read_answer_frame(tokenizer).end_id}
    if tokenizer.eos_token_id is not None:
        ids.add(tokenizer.eos_token_id)
    return sorted(ids)


def hash_template(tokenizer: Any) -> str:
    """Return the hash of the tokenizer's chat template: two that differ write different prompts."""
    return hashlib.sha256(str(tokenizer.chat_template).encode()).hexdigest()


def write_served_template(tokenizer: Any) -> str:
    """Return the chat template for servers that render it themselves.

    It writes the same prompts as `encode_prompt`: with the day of training, and with what comes between the
    prompt and the answer.
    """
    template = fix_day(str(tokenizer.chat_template))
    before = read_answer_frame(tokenizer).before
    if not before:
        return template
    literal = before.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n")
    when = (
        "add_generation_prompt and not (tools or has_tools)" if before.isspace() else "add_generation_prompt"
    )
    return f"{template}{{%- if {when} %}}{{{{- '{literal}' }}}}{{%- endif %}}"


def _cut_answer(prompt_text: str, whole_text: str, frame: AnswerFrame) -> str | None:
    """Return the answer in a rendered conversation; None if it does not begin with the prompt."""
    tail = frame.end + frame.after
    if not whole_text.startswith(prompt_text) or not whole_text[len(prompt_text) :].endswith(tail):
        return None
    return whole_text[len(prompt_text) : len(whole_text) - len(tail)]


_frames: WeakKeyDictionary[Any, tuple[str, AnswerFrame]] = WeakKeyDictionary()


def read_answer_frame(tokenizer: Any) -> AnswerFrame:
    """Return what the tokenizer's chat template writes around an answer.

    Raises:
        InputError: there is no template, it changes the prompt once there is an answer, or it writes no
            token behind the answer that could end it.
    """
    template = str(tokenizer.chat_template)
    if tokenizer in _frames and _frames[tokenizer][0] == template:
        return _frames[tokenizer][1]
    frame = _read_answer_frame(tokenizer)
    _frames[tokenizer] = (template, frame)
    return frame


def _read_answer_frame(tokenizer: Any) -> AnswerFrame:
    prompt = _render(tokenizer, _QUESTION, add_generation_prompt=True)
    answer = Message("assistant", _ANSWER, reasoning=_THOUGHT if thinks(tokenizer) else None)
    whole = _render(tokenizer, [*_QUESTION, answer], add_generation_prompt=False)
    if not whole.startswith(prompt) or whole.count(_ANSWER) != 1:
        raise _rewrites()
    before, _, after = whole[len(prompt) :].partition(_ANSWER)
    control = read_control_tokens(tokenizer)
    ends = control.find(after)
    if not ends or _opens_turn(tokenizer, ends[0]):
        raise InputError(
            f"the base model's chat template writes no end of turn after the answer, only {after!r}: "
            "the model would never learn where an answer ends",
            f"write one into its chat_template.jinja, or {CHOOSE_ANOTHER}",
        )
    place = after.index(ends[0]) + len(ends[0])
    # What a thinking model writes before its answer is learned with it.
    thought_start, thought, thought_end = before.partition(_THOUGHT)
    return AnswerFrame(
        "" if thought else before,
        after[:place],
        control.ids[ends[0]],
        after[place:],
        thought_end if thought else None,
        thought_start if thought else "",
    )


def _opens_turn(tokenizer: Any, token: str) -> bool:
    """Return whether the token behind an answer is that of a turn's header and not of an answer's end.

    A template that always writes the beginning of an answer writes it behind an answer, too. Such a token
    begins the conversation, or no longer follows the answer once there is another question. The tokenizer's
    end of sequence always is an end: some templates write it behind the last turn only.
    """
    if token == tokenizer.eos_token:
        return False
    control = read_control_tokens(tokenizer)
    if token in control.find_leading(_render(tokenizer, _QUESTION, add_generation_prompt=True)):
        return True
    talk = [*_QUESTION, Message("assistant", _ANSWER), Message("user", _NEXT)]
    try:
        between = _render(tokenizer, talk, add_generation_prompt=True).partition(_ANSWER)[2]
    except TemplateRefusal:  # it takes one question only
        return False
    between, followed, _ = between.partition(_NEXT)
    return bool(followed) and token not in control.find(between)


def _rewrites() -> InputError:
    return InputError(
        "the base model's chat template writes the prompt differently when an answer follows",
        "choose a base model whose chat template only appends (fetch_base in params.yaml)",
    )


def _is_changed(tokenizer: Any, frame: AnswerFrame, answer: Message, text: str) -> bool:
    """Return whether a template wrote another answer; of a turn with calls, whether it left out its text."""
    hidden = read_control_tokens(tokenizer).hide(answer.content)
    if answer.tool_calls:
        return hidden not in text
    answer_text = text.rpartition(frame.thought_end)[2] if frame.thought_end else text
    return answer_text.removeprefix(frame.before) != hidden


_thinking: WeakKeyDictionary[Any, tuple[str, bool]] = WeakKeyDictionary()


def thinks(tokenizer: Any) -> bool:
    """Return whether thoughts are written: `task.template_arguments` asks for them, and the template does."""
    template = str(tokenizer.chat_template)
    if _ASKS_TO_THINK.search(template) is None:
        return False
    if tokenizer not in _thinking or _thinking[tokenizer][0] != template:
        _thinking[tokenizer] = (template, writes_thoughts(tokenizer))
    return _thinking[tokenizer][1]


def writes_thoughts(tokenizer: Any) -> bool:
    """Return whether the template writes an answer's thoughts behind the prompt, found by rendering one."""
    answer = Message("assistant", _ANSWER, reasoning=_THOUGHT)
    try:
        prompt = _write(tokenizer, _QUESTION, add_generation_prompt=True)
        whole = _write(tokenizer, [*_QUESTION, answer], add_generation_prompt=False)
    except InputError:
        return False
    before, written, _ = whole.removeprefix(prompt).partition(_ANSWER)
    return whole.startswith(prompt) and bool(written) and _THOUGHT in before


def fix_argument(name: str, value: Any) -> str:
    """Return the statement, to be written before a chat template, that gives a variable its value."""
    literal = "none" if value is None else json.dumps(value)
    return f"{{%- set {name} = {literal} -%}}{{#- task.template_arguments -#}}"


def _render(
    tokenizer: Any, messages: Sequence[Message], tools: Sequence[Tool] = (), *, add_generation_prompt: bool
) -> str:
    """Return the conversation as the template writes it, with the control tokens in its messages hidden."""
    if not thinks(tokenizer):
        messages = [m if m.reasoning is None else replace(m, reasoning=None) for m in messages]
    return _write(tokenizer, messages, tools, add_generation_prompt=add_generation_prompt)


def _write(
    tokenizer: Any, messages: Sequence[Message], tools: Sequence[Tool] = (), *, add_generation_prompt: bool
) -> str:
    """Return the conversation as `_render`, its thoughts included."""
    from jinja2 import TemplateError

    if not tokenizer.chat_template:
        raise InputError(
            "the base model has no chat template",
            "choose an instruction-tuned base model (fetch_base in params.yaml)",
        )
    control = read_control_tokens(tokenizer)
    try:
        text = tokenizer.apply_chat_template(
            write_conversation(control, messages),
            tools=write_tools(control, tools),
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            chat_template=fix_day(str(tokenizer.chat_template)),
        )
    except Exception as error:  # a template computes with what is in the conversation, and fails as code does
        roles = ", ".join(m.role for m in messages)
        reason = error if isinstance(error, TemplateError) else f"{type(error).__name__}: {error}"
        raise TemplateRefusal(
            f"the base model's chat template refuses a conversation of {roles}: {reason}",
            suggest_for_refused([messages]),
        ) from None
    return str(text)


def suggest_for_refused(conversations: Iterable[Sequence[Message]]) -> str:
    """Return what can be done about conversations that the chat template refuses."""
    roles = (
        "leave the role out (for a system message: task.system_prompt: null), merge messages of one role "
        "that follow each other, or choose another base model (fetch_base in params.yaml)"
    )
    if any(len(message.tool_calls) > 1 for messages in conversations for message in messages):
        return (
            "set task.tools_template: default, whose notation has several calls in one turn, where the "
            f"model's own has one; if it is another part: {roles}"
        )
    return roles


def _tokens(tokenizer: Any, text: str) -> list[int]:
    return read_control_tokens(tokenizer).encode(tokenizer, text)
