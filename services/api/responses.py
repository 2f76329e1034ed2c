"""Answers in OpenAI's shapes, whole and in chunks."""

from __future__ import annotations

import json
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Protocol

from services.answering import Part, Question, Usage
from services.engines.protocol import TokenLogprob
from services.model_pool import Served


class Shape(Protocol):
    """How an answer is written down."""

    def opening(self) -> bytes:
        """Return what a stream begins with."""
        ...

    def chunk(self, part: Part) -> bytes:
        """Return a piece of a stream."""
        ...

    def whole(self, parts: Sequence[Part]) -> bytes:
        """Return the whole answer."""
        ...


class _Shape(ABC):
    object: str
    chunk_object: str

    def __init__(self, question: Question, model: str | None, wants_usage: bool, served: Served) -> None:
        self._tokenizer = served.tokenizer
        self._wants_usage = wants_usage
        self._common = {
            "id": question.request_id,
            "created": int(time.time()),
            "model": model or served.files.name,
            # Which version wrote it: two answers of one seed compare only where this is the same.
            "system_fingerprint": served.files.version,
        }
        # What all chunks of a stream share is written once: a chunk costs little more than its text.
        head = json.dumps(
            {**self._common, "object": self.chunk_object}, ensure_ascii=False, separators=(",", ":")
        )[:-1]
        self._head = f'data: {head},"choices":[{{"index":0,'

    def opening(self) -> bytes:
        return b""

    def chunk(self, part: Part) -> bytes:
        """Return one event, and the usage as another where the stream was asked for it."""
        logprobs = json.dumps(self.logprobs(part.logprobs)) if part.logprobs else "null"
        reason = json.dumps(part.finish_reason)
        usage = f', "usage": {json.dumps(_usage(part.usage))}' if part.usage else ""
        rest = f'"logprobs": {logprobs}, "finish_reason": {reason}}}]{usage}}}'
        text = f"{self._head}{self.delta(part.text)}, {rest}\n\n"
        if part.usage and self._wants_usage:
            last = {**self._common, "object": self.chunk_object, "choices": [], "usage": _usage(part.usage)}
            text += f"data: {json.dumps(last, ensure_ascii=False)}\n\n"
        return text.encode()

    def whole(self, parts: Sequence[Part]) -> bytes:
        """Return the body of an answer that is not streamed."""
        text = "".join(part.text for part in parts)
        logprobs = tuple(entry for part in parts for entry in part.logprobs)
        last = parts[-1]
        choice = {
            "index": 0,
            **self.content(text),
            "logprobs": self.logprobs(logprobs) if logprobs else None,
            "finish_reason": last.finish_reason,
        }
        body = {**self._common, "object": self.object, "choices": [choice], "usage": _usage(last.usage)}
        return json.dumps(body, ensure_ascii=False).encode()

    @abstractmethod
    def delta(self, text: str) -> str:
        """Return a piece of text as the fields of a chunk, in JSON."""

    @abstractmethod
    def content(self, text: str) -> dict[str, Any]:
        """Return the whole text as the fields of a choice."""

    @abstractmethod
    def logprobs(self, entries: Sequence[TokenLogprob]) -> dict[str, Any]:
        """Return tokens with their log probabilities."""

    def token(self, token_id: int) -> str:
        """Return the text of one token."""
        text: str = self._tokenizer.decode([token_id])
        return text


class ChatShape(_Shape):
    """A message of the assistant."""

    object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def opening(self) -> bytes:
        """Return the chunk that says who speaks."""
        delta = (
            '"delta": {"role": "assistant", "content": ""}, "logprobs": null, "finish_reason": null}]}\n\n'
        )
        return (self._head + delta).encode()

    def delta(self, text: str) -> str:
        """Return the change of a chunk; the last has none."""
        return f'"delta": {{"content": {json.dumps(text, ensure_ascii=False)}}}' if text else '"delta": {}'

    def content(self, text: str) -> dict[str, Any]:
        """Return the message."""
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def logprobs(self, entries: Sequence[TokenLogprob]) -> dict[str, Any]:
        """Return each token with its log-probability and its alternatives."""
        return {
            "content": [
                {
                    **self._entry(entry.token_id, entry.logprob),
                    "top_logprobs": [self._entry(*alternative) for alternative in entry.alternatives],
                }
                for entry in entries
            ],
            "refusal": None,
        }

    def _entry(self, token_id: int, logprob: float) -> dict[str, Any]:
        token = self.token(token_id)
        return {"token": token, "logprob": logprob, "bytes": list(token.encode())}


class CompletionShape(_Shape):
    """The continuation of a text."""

    object = "text_completion"
    chunk_object = "text_completion"

    def delta(self, text: str) -> str:
        """Return the change of a chunk."""
        return f'"text": {json.dumps(text, ensure_ascii=False)}'

    def content(self, text: str) -> dict[str, Any]:
        """Return the text."""
        return {"text": text}

    def logprobs(self, entries: Sequence[TokenLogprob]) -> dict[str, Any]:
        """Return OpenAI's older form: lists beside each other."""
        tokens = [self.token(entry.token_id) for entry in entries]
        offsets = [sum(map(len, tokens[:index])) for index in range(len(tokens))]
        return {
            "tokens": tokens,
            "token_logprobs": [entry.logprob for entry in entries],
            "top_logprobs": [
                {self.token(token): logprob for token, logprob in entry.alternatives} for entry in entries
            ],
            "text_offset": offsets,
        }


def _usage(usage: Usage | None) -> dict[str, int] | None:
    if usage is None:
        return None
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }
