"""Embed texts with the served model: the mean of its last hidden states over a text's tokens, of length 1."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from services import errors
from services.answering.failures import convert_failure
from services.answering.handler import ChatHandler
from services.answering.prompts import MAX_CHARS_PER_TOKEN
from services.engines.protocol import ContextOverflow, EngineError, Sampling, Unsupported
from services.errors import ApiError
from services.keys.access import Caller
from services.metrics import get_metrics
from services.model_pool import LoadedModel
from stages.common.chat.control_tokens import ControlTokenRefusal
from stages.common.chat.template import encode_text

ROUTE = "/v1/embeddings"
MAX_AT_ONCE = 8  # texts of one request in the engine, so that a list leaves room for other requests
SAMPLING = Sampling(max_tokens=1, embeds_prompt=True)

Text = str | tuple[int, ...]
Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class EmbeddingRequest:
    """Texts or token ids to embed.

    Attributes:
        caller: the sender, as authenticated.
        model: the requested model; None for the champion.
        dimensions: the requested size of a vector; None for that of the model.
    """

    request_id: str
    texts: tuple[Text, ...]
    caller: Caller
    model: str | None = None
    dimensions: int | None = None


@dataclass(frozen=True, slots=True)
class Embeddings:
    """The vectors of a request, shape (texts, size), each of length 1.

    Attributes:
        tokens: of all texts.
        model: what made them; only vectors of one version can be compared.
    """

    vectors: Floats
    tokens: int
    model: LoadedModel


async def embed_texts(request: EmbeddingRequest, handler: ChatHandler) -> Embeddings:
    """Return the vectors of a request's texts.

    Raises:
        ApiError: the model or the size is not there, a limit is exceeded, or the engine fails.
    """
    model = _pick_model(request.model, handler)
    status = 500
    try:
        with model.in_use():
            found = await _embed_within_quota(request, handler, model)
        status = 200
        return found
    except ApiError as error:
        status = error.status
        raise
    finally:
        get_metrics().requests.labels(ROUTE, str(status), model.files.version).inc()


def _pick_model(name: str | None, handler: ChatHandler) -> LoadedModel:
    """Return the model of a name; without one never a canary, whose vectors are not like the champion's."""
    champion = handler.pool.champion
    if name in (None, "", champion.files.name):
        return champion
    return handler.pool.route(name, "").model


async def _embed_within_quota(
    request: EmbeddingRequest, handler: ChatHandler, model: LoadedModel
) -> Embeddings:
    guard = handler.settings.guard
    if len(request.texts) > guard.max_prompts:
        problem = f"{len(request.texts)} texts; at most {guard.max_prompts} are allowed"
        raise errors.invalid_value("input", problem)
    _check_sizes(request.texts, guard.max_prompt_tokens)
    handler.access.count_further(request.caller, len(request.texts) - 1)
    prompts = await asyncio.to_thread(_encode, request.texts, model)
    limit = min(guard.max_prompt_tokens, model.engine.context_tokens - 1)
    longest = max(map(len, prompts))
    if longest > limit:
        raise errors.context_length_exceeded(longest, limit, "input")
    tokens = sum(map(len, prompts))
    handler.access.reserve(request.caller, tokens)
    used = 0
    try:
        if request.dimensions is not None:
            await _check_dimensions(request, prompts[0], model)
        vectors = await _embed_all(request, prompts, model)
        used = tokens
    finally:
        handler.access.settle(request.caller, tokens, used)
    return Embeddings(vectors, tokens, model)


async def _check_dimensions(request: EmbeddingRequest, prompt: list[int], model: LoadedModel) -> None:
    """Reject another size than that of the vector of one token, before all texts are embedded."""
    size = (await _embed_all(request, [prompt[:1]], model)).shape[1]
    if request.dimensions != size:
        problem = f"{request.dimensions} is not possible; the vectors of this model have {size} numbers"
        raise errors.unsupported_parameter("dimensions", problem)


def _check_sizes(texts: Sequence[Text], limit: int) -> None:
    """Reject a text that is longer than any of the limit's tokens, before it is tokenized."""
    for text in texts:
        count = len(text) // MAX_CHARS_PER_TOKEN if isinstance(text, str) else len(text)
        if count > limit:
            raise errors.context_length_exceeded(count, limit, "input")


def _encode(texts: Sequence[Text], model: LoadedModel) -> list[list[int]]:
    """Return the token ids of each text.

    Raises:
        ApiError: a token id is out of range, a text has no token, or holds a control token that the tokenizer
            cannot read as text.
    """
    size = len(model.tokenizer)
    prompts = []
    for place, text in enumerate(texts):
        try:
            ids = encode_text(model.tokenizer, text) if isinstance(text, str) else list(text)
        except ControlTokenRefusal:
            raise errors.content_refused("control_tokens", "input") from None
        wrong = next((number for number in ids if not 0 <= number < size), None)
        if wrong is not None:
            raise errors.invalid_value("input", f"{wrong} is not a token id; the range is 0 to {size - 1}")
        if not ids:
            raise errors.invalid_value("input", f"text {place} has no token")
        prompts.append(ids)
    return prompts


async def _embed_all(request: EmbeddingRequest, prompts: Sequence[list[int]], model: LoadedModel) -> Floats:
    room = asyncio.Semaphore(MAX_AT_ONCE)

    async def embed(prompt: list[int]) -> tuple[float, ...]:
        async with room, aclosing(model.engine.generate(prompt, SAMPLING)) as steps:  # type: ignore[type-var]
            async for step in steps:
                if step.embedding is not None:
                    return step.embedding
        raise EngineError("the engine gave no vector")

    tasks = [asyncio.ensure_future(embed(prompt)) for prompt in prompts]
    try:
        found = np.array(await asyncio.gather(*tasks), np.float64)
    except Unsupported as error:
        raise errors.unsupported_parameter("model", str(error)) from None
    except ContextOverflow:
        longest, limit = max(map(len, prompts)), model.engine.context_tokens
        raise errors.context_length_exceeded(longest, limit, "input") from None
    except EngineError as error:
        raise convert_failure(error, model, request.request_id) from None
    finally:
        for task in tasks:
            task.cancel()
    lengths = np.linalg.norm(found, axis=1, keepdims=True)
    return np.asarray(found / np.maximum(lengths, 1e-12), np.float32)
