"""The only place where a chat template is rendered: trainer, judge and server agree by construction."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from stages.common.errors import InputError
from stages.common.records import Message


@dataclass(frozen=True, slots=True)
class Encoded:
    """Token ids of a conversation; the first `prompt_length` of them are not learned."""

    input_ids: list[int]
    prompt_length: int


def encode_prompt(tokenizer: Any, messages: Sequence[Message]) -> list[int]:
    """Return the token ids after which the model writes its answer."""
    return _tokens(tokenizer, _render(tokenizer, messages, add_generation_prompt=True))


def encode_example(tokenizer: Any, messages: Sequence[Message]) -> Encoded:
    """Return the token ids of prompt, answer and end of turn.

    The prompt's ids are exactly those of `encode_prompt`, and the answer is tokenised on its own,
    so that the model learns the very boundary that it will see when it is asked.
    """
    prompt_text = _render(tokenizer, messages[:-1], add_generation_prompt=True)
    whole_text = _render(tokenizer, messages, add_generation_prompt=False)
    if not whole_text.startswith(prompt_text):
        raise InputError(
            "the base model's chat template writes the prompt differently once the answer is there",
            "choose a base model whose chat template only appends (fetch_base in params.yaml)",
        )
    prompt = _tokens(tokenizer, prompt_text)
    # Templates end a turn with the end-of-turn token and often a newline: no model generates that newline.
    answer = _tokens(tokenizer, whole_text[len(prompt_text) :].rstrip("\n"))
    return Encoded(prompt + answer, len(prompt))


def end_of_turn_ids(tokenizer: Any) -> list[int]:
    """Return the ids that end an answer: the template's end of turn and the tokenizer's end of sequence."""
    example = encode_example(tokenizer, [Message("user", "a"), Message("assistant", "b")])
    ids = {example.input_ids[-1]}
    if tokenizer.eos_token_id is not None:
        ids.add(tokenizer.eos_token_id)
    return sorted(ids)


def hash_template(tokenizer: Any) -> str:
    """Return the hash of the tokenizer's chat template: two that differ write different prompts."""
    return hashlib.sha256(str(tokenizer.chat_template).encode()).hexdigest()


def _render(tokenizer: Any, messages: Sequence[Message], *, add_generation_prompt: bool) -> str:
    if not tokenizer.chat_template:
        raise InputError(
            "the base model has no chat template",
            "choose an instruction-tuned base model (fetch_base in params.yaml)",
        )
    conversation = [{"role": m.role, "content": m.content} for m in messages]
    text = tokenizer.apply_chat_template(
        conversation, tokenize=False, add_generation_prompt=add_generation_prompt
    )
    return str(text)


def _tokens(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids
