"""Responses in OpenAI's formats, whole and streamed."""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from services.answering.request import Delta, Usage
from services.engines.calls.reading import CallPiece, Piece, join_pieces
from services.engines.protocol import TokenLogprob
from services.engines.token_bytes import TokenBytes
from services.errors import ApiError
from services.model_pool import LoadedModel


@dataclass(frozen=True, slots=True)
class Format:
    """What differs between the endpoints.

    Attributes:
        opening: makes the fields of the choice in the first chunk of a stream, as JSON, of the first delta
            that has its own chunk; None without such a chunk.
        delta: makes the fields of a chunk, as JSON, of its text and the delta.
        content: makes the fields of a whole response, of its text and all deltas.
        logprobs: makes the field `logprobs`, of tokens that begin at a character of the answer.
    """

    object: str
    chunk_object: str
    opening: Callable[[Delta], str] | None
    delta: Callable[[str, Delta], str]
    content: Callable[[str, Sequence[Delta]], dict[str, Any]]
    logprobs: Callable[[Sequence[TokenLogprob], TokenBytes, int], dict[str, Any]]


class ResponseFormatter:
    """Formats the answers to one request; each has the place of its prompt.

    Args:
        request_id: id of the response.
        model_name: as requested.
        wants_usage: a stream ends with a chunk for the usage.
    """

    def __init__(
        self,
        format: Format,
        request_id: str,
        model_name: str | None,
        wants_usage: bool,
        model: LoadedModel,
    ) -> None:
        self._format = format
        self._token_bytes = model.token_bytes
        self._wants_usage = wants_usage
        # Clients add the usage of all chunks up, so it is in one chunk alone.
        self._no_usage = ',"usage":null' if wants_usage else ""
        self._usages: list[Usage] = []  # of the answers that are complete
        self._lengths: Counter[int] = Counter()  # characters of the streamed answers so far
        self._common = {
            "id": request_id,
            "created": int(time.time()),
            "model": model_name or model.files.name,
            # The version that answered: equal seeds give equal answers only where this is equal.
            "system_fingerprint": model.files.version,
        }
        # The common part of all chunks is serialised once, so that a chunk costs little more than its text.
        common = {**self._common, "object": format.chunk_object}
        head = json.dumps(common, ensure_ascii=False, separators=(",", ":"))[:-1]
        self._head = f'data: {head},"choices":[{{"index":'

    def format_opening(self, first: Delta, place: int = 0) -> bytes:
        """Return the chunk before that of the first delta; empty where the format has none."""
        if self._format.opening is None:
            return b""
        return f"{self._head}{place},{self._format.opening(first)}}}]{self._no_usage}}}\n\n".encode()

    def format_chunk(self, delta: Delta, place: int = 0) -> bytes:
        """Return a chunk of a streamed answer."""
        text, entries = _join([delta])
        logprobs = json.dumps(self._format_logprobs(entries, self._lengths[place])) if entries else "null"
        self._lengths[place] += len(text)
        if delta.usage is not None:
            self._usages.append(delta.usage)
        reason = json.dumps(delta.finish_reason)
        rest = f'"logprobs": {logprobs}, "finish_reason": {reason}}}]{self._no_usage}}}'
        return f"{self._head}{place},{self._format.delta(text, delta)}, {rest}\n\n".encode()

    def format_end(self) -> bytes:
        """Return the end of a stream: the usage of all answers, if it was asked for, and the closing line."""
        return self._format_usage() + b"data: [DONE]\n\n"

    def format_error(self, error: ApiError) -> bytes:
        """Return the chunk that ends a stream early."""
        return b"data: " + json.dumps(error.body()).encode() + b"\n\n"

    def _format_usage(self) -> bytes:
        if not self._wants_usage:
            return b""
        own: dict[str, Any] = {
            "object": self._format.chunk_object,
            "choices": [],
            "usage": _format_usage(self._usages),
        }
        return f"data: {json.dumps({**self._common, **own}, ensure_ascii=False)}\n\n".encode()

    def format_whole(self, answers: Sequence[Sequence[Delta]]) -> bytes:
        """Return the body of a response that is not streamed."""
        head = json.dumps({**self._common, "object": self._format.object}, ensure_ascii=False)[:-1]
        # One by one, since no other thread runs while the encoder does.
        choices = ", ".join(
            json.dumps(self._format_choice(place, deltas), ensure_ascii=False)
            for place, deltas in enumerate(answers)
        )
        usage = _format_usage([deltas[-1].usage for deltas in answers if deltas[-1].usage is not None])
        return f'{head}, "choices": [{choices}], "usage": {json.dumps(usage)}}}'.encode()

    def _format_choice(self, place: int, deltas: Sequence[Delta]) -> dict[str, Any]:
        text, entries = _join(deltas)
        return {
            "index": place,
            **self._format.content(text, deltas),
            "logprobs": self._format_logprobs(entries, 0) if entries else None,
            "finish_reason": deltas[-1].finish_reason,
        }

    def _format_logprobs(self, entries: Sequence[TokenLogprob], offset: int) -> dict[str, Any]:
        return self._format.logprobs(entries, self._token_bytes, offset)


def _join(deltas: Sequence[Delta]) -> tuple[str, list[TokenLogprob]]:
    """Return the text and the tokens of pieces of an answer, after those of a repeated prompt.

    The prompt's first token has no log-probability, since nothing precedes it. Behind a repeated prompt the
    end of turn counts as a token: who scores texts expects one token of an answer at least.
    """
    text: list[str] = []
    entries: list[TokenLogprob] = []
    for delta in deltas:
        if delta.echo is not None:
            text.append(delta.echo.text)
            if delta.echo.logprobs is not None:
                entries += [TokenLogprob(delta.echo.token_ids[0], math.nan), *delta.echo.logprobs]
        text.append(delta.text)
        entries += delta.logprobs
        if delta.end is not None:
            entries.append(delta.end)
    return "".join(text), entries


def _chat_opening(first: Delta) -> str:
    # An answer that has no text has null in its place, as in a response that is not streamed.
    content = "null" if first.reasoning or first.calls else '""'
    return f'"delta": {{"role": "assistant", "content": {content}}}, "logprobs": null, "finish_reason": null'


def _chat_delta(text: str, delta: Delta) -> str:
    fields: dict[str, Any] = {"content": text} if text else {}
    if delta.reasoning:
        fields["reasoning_content"] = delta.reasoning
    if delta.calls:
        fields["tool_calls"] = [_describe_piece(call) for call in delta.calls]
    return f'"delta": {json.dumps(fields, ensure_ascii=False)}'


def _chat_content(text: str, deltas: Sequence[Delta]) -> dict[str, Any]:
    whole = join_pieces(Piece(reasoning=delta.reasoning, calls=delta.calls) for delta in deltas)
    has_text = bool(text) or not (whole.calls or whole.reasoning)
    message: dict[str, Any] = {"role": "assistant", "content": text if has_text else None, "refusal": None}
    if whole.reasoning:
        message["reasoning_content"] = whole.reasoning
    if whole.calls:
        calls = map(_describe_piece, whole.calls)
        message["tool_calls"] = [{key: call[key] for key in ("id", "type", "function")} for call in calls]
    return {"message": message}


def _describe_piece(call: CallPiece) -> dict[str, Any]:
    """Return a piece of a call as in a chunk: its first piece has id, type and name."""
    if call.id is None:
        return {"index": call.place, "function": {"arguments": call.arguments}}
    function = {"name": call.name, "arguments": call.arguments}
    return {"index": call.place, "id": call.id, "type": "function", "function": function}


def _chat_logprobs(entries: Sequence[TokenLogprob], tokens: TokenBytes, offset: int) -> dict[str, Any]:
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


def _completion_logprobs(entries: Sequence[TokenLogprob], tokens: TokenBytes, offset: int) -> dict[str, Any]:
    pieces = [tokens.get_bytes(entry.token_id) for entry in entries]
    text = b"".join(pieces)
    begins = [0, *accumulate(map(len, pieces))][: len(entries)]
    return {
        "tokens": [tokens.get_text(entry.token_id) for entry in entries],
        "token_logprobs": [None if math.isnan(entry.logprob) else entry.logprob for entry in entries],
        "top_logprobs": [
            None
            if math.isnan(entry.logprob)
            else {tokens.get_text(token): nats for token, nats in (*entry.alternatives, _own(entry))}
            for entry in entries
        ],
        "text_offset": [offset + len(text[:begin].decode(errors="ignore")) for begin in begins],
    }


def _own(entry: TokenLogprob) -> tuple[int, float]:
    return entry.token_id, entry.logprob


CHAT = Format(
    object="chat.completion",
    chunk_object="chat.completion.chunk",
    opening=_chat_opening,
    delta=_chat_delta,
    content=_chat_content,
    logprobs=_chat_logprobs,
)
COMPLETION = Format(
    object="text_completion",
    chunk_object="text_completion",
    opening=None,
    delta=lambda text, _: f'"text": {json.dumps(text, ensure_ascii=False)}',
    content=lambda text, _: {"text": text},
    logprobs=_completion_logprobs,
)


def _format_usage(usages: Sequence[Usage]) -> dict[str, int]:
    prompt = sum(usage.prompt_tokens for usage in usages)
    completion = sum(usage.completion_tokens for usage in usages)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
    }
