"""Responses in OpenAI's formats, whole and streamed."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from services.answering.request import Delta, GenerationRequest, Usage
from services.answering.token_bytes import TokenBytes
from services.engines.protocol import TokenLogprob
from services.model_pool import LoadedModel


@dataclass(frozen=True, slots=True)
class Format:
    """What differs between the endpoints.

    Attributes:
        opening: fields of the choice in the first chunk of a stream, as JSON; None without such a chunk.
        delta: makes the text field of a chunk, as JSON.
        content: makes the text field of a whole response.
        logprobs: makes the field `logprobs`.
    """

    object: str
    chunk_object: str
    opening: str | None
    delta: Callable[[str], str]
    content: Callable[[str], dict[str, Any]]
    logprobs: Callable[[Sequence[TokenLogprob], TokenBytes], dict[str, Any]]


class ResponseFormatter:
    """Formats the answer to one request."""

    def __init__(
        self,
        format: Format,
        request: GenerationRequest,
        model_name: str | None,
        wants_usage: bool,
        model: LoadedModel,
    ) -> None:
        self._format = format
        self._token_bytes = model.token_bytes
        self._wants_usage = wants_usage
        # Clients add up what the chunks say, so the numbers are in one chunk alone.
        self._no_usage = ',"usage":null' if wants_usage else ""
        self._common = {
            "id": request.request_id,
            "created": int(time.time()),
            "model": model_name or model.files.name,
            # The version that answered: equal seeds give equal answers only where this is equal.
            "system_fingerprint": model.files.version,
        }
        # The common part of all chunks is serialised once, so that a chunk costs little more than its text.
        common = {**self._common, "object": format.chunk_object}
        head = json.dumps(common, ensure_ascii=False, separators=(",", ":"))[:-1]
        self._head = f'data: {head},"choices":[{{"index":0,'

    def format_opening(self) -> bytes:
        """Return the first chunk of a stream; empty where the format has none."""
        if self._format.opening is None:
            return b""
        return f"{self._head}{self._format.opening}}}]{self._no_usage}}}\n\n".encode()

    def format_chunk(self, delta: Delta) -> bytes:
        """Return a chunk of a stream; after the last one also a chunk with the usage, if it was asked for."""
        logprobs = json.dumps(self._format_logprobs(delta.logprobs)) if delta.logprobs else "null"
        reason = json.dumps(delta.finish_reason)
        rest = f'"logprobs": {logprobs}, "finish_reason": {reason}}}]{self._no_usage}}}'
        text = f"{self._head}{self._format.delta(delta.text)}, {rest}\n\n"
        if delta.usage and self._wants_usage:
            own: dict[str, Any] = {
                "object": self._format.chunk_object,
                "choices": [],
                "usage": _format_usage(delta.usage),
            }
            text += f"data: {json.dumps({**self._common, **own}, ensure_ascii=False)}\n\n"
        return text.encode()

    def format_whole(self, deltas: Sequence[Delta]) -> bytes:
        """Return the body of a response that is not streamed."""
        text = "".join(delta.text for delta in deltas)
        logprobs = tuple(entry for delta in deltas for entry in delta.logprobs)
        last = deltas[-1]
        choice = {
            "index": 0,
            **self._format.content(text),
            "logprobs": self._format_logprobs(logprobs) if logprobs else None,
            "finish_reason": last.finish_reason,
        }
        own = {"object": self._format.object, "choices": [choice], "usage": _format_usage(last.usage)}
        return json.dumps({**self._common, **own}, ensure_ascii=False).encode()

    def _format_logprobs(self, entries: Sequence[TokenLogprob]) -> dict[str, Any]:
        return self._format.logprobs(entries, self._token_bytes)


def _chat_delta(text: str) -> str:
    return f'"delta": {{"content": {json.dumps(text, ensure_ascii=False)}}}' if text else '"delta": {}'


def _chat_content(text: str) -> dict[str, Any]:
    return {"message": {"role": "assistant", "content": text, "refusal": None}}


def _chat_logprobs(entries: Sequence[TokenLogprob], tokens: TokenBytes) -> dict[str, Any]:
    def describe(token_id: int, logprob: float) -> dict[str, Any]:
        return {
            "token": tokens.get_text(token_id),
            "logprob": logprob,
            "bytes": list(tokens.get_bytes(token_id)),
        }

    content = [
        {
            **describe(entry.token_id, entry.logprob),
            "top_logprobs": [describe(*alternative) for alternative in entry.alternatives],
        }
        for entry in entries
    ]
    return {"content": content, "refusal": None}


def _completion_logprobs(entries: Sequence[TokenLogprob], tokens: TokenBytes) -> dict[str, Any]:
    sizes = [len(tokens.get_bytes(entry.token_id)) for entry in entries]
    text = b"".join(tokens.get_bytes(entry.token_id) for entry in entries)
    begins = [0, *accumulate(sizes)][: len(entries)]
    return {
        "tokens": [tokens.get_text(entry.token_id) for entry in entries],
        "token_logprobs": [entry.logprob for entry in entries],
        "top_logprobs": [
            {tokens.get_text(token): logprob for token, logprob in entry.alternatives} for entry in entries
        ],
        "text_offset": [len(text[:begin].decode(errors="ignore")) for begin in begins],
    }


CHAT = Format(
    object="chat.completion",
    chunk_object="chat.completion.chunk",
    opening='"delta": {"role": "assistant", "content": ""}, "logprobs": null, "finish_reason": null',
    delta=_chat_delta,
    content=_chat_content,
    logprobs=_chat_logprobs,
)
COMPLETION = Format(
    object="text_completion",
    chunk_object="text_completion",
    opening=None,
    delta=lambda text: f'"text": {json.dumps(text, ensure_ascii=False)}',
    content=lambda text: {"text": text},
    logprobs=_completion_logprobs,
)


def _format_usage(usage: Usage | None) -> dict[str, int] | None:
    if usage is None:
        return None
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }
