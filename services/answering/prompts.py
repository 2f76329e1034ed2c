"""Check the prompt of a request, and turn it into token ids: that of a long one outside the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from services import errors
from services.answering.request import GenerationRequest
from services.answering.state import GenerationState
from services.guard.policy import CheckResult, check_prompt
from services.metrics import get_metrics
from services.model_pool import LoadedModel
from stages.common.chat.control_tokens import ControlTokenRefusal
from stages.common.chat.template import TemplateRefusal, encode_text
from stages.common.params.services import Guard

# No token of a known vocabulary is longer than this, so a longer prompt is rejected before it is tokenized.
MAX_CHARS_PER_TOKEN = 32
# So many characters are checked and tokenized in 2 ms, the 49,152 that a prompt may have in 80 ms (one core
# of an AMD EPYC); two changes of threads take 0.2 to 2 ms.
MAX_INLINE_CHARS = 1000
# Threads of its own: asyncio's are shared by all requests. They share tokenizers, templates and classifiers,
# which do not change once their model is loaded.
_THREADS = ThreadPoolExecutor(2, thread_name_prefix="prompt")

Texts = Sequence[Mapping[str, str]]
Result = TypeVar("Result")


def read_texts(request: GenerationRequest, state: GenerationState, max_tokens: int) -> Texts:
    """Return all texts of the prompt under the roles of who wrote them.

    Raises:
        ApiError: they are too long for any tokenizer to make `max_tokens` of them.
    """
    texts = request.as_texts(state.model.decode_prompt)
    chars = _count_chars(texts)
    if chars > max_tokens * MAX_CHARS_PER_TOKEN:
        state.unread = True
        tokens = chars // MAX_CHARS_PER_TOKEN
        raise errors.context_length_exceeded(tokens, max_tokens, request.prompt_param)
    return texts


async def encode_prompt(
    texts: Texts, request: GenerationRequest, state: GenerationState, guard: Guard
) -> list[int]:
    """Return the token ids of the prompt, after the guard has checked its texts.

    Raises:
        ApiError: the prompt is too long, or the guard or the chat template rejects it.
    """
    model, is_short = state.model, _count_chars(texts) <= MAX_INLINE_CHARS
    if isinstance(request.raw, tuple):  # ids are no text: only here can a client write a control token
        guard = guard.model_copy(update={"control_tokens": "enforce"})
    checked = await _work(is_short, lambda: _check(texts, model, guard))
    apply_guard(state, checked, request.prompt_param)
    prompt = await _work(is_short, lambda: _tokenize(request, model))
    state.prompt_tokens = len(prompt)
    if len(prompt) > guard.max_prompt_tokens:
        raise errors.context_length_exceeded(len(prompt), guard.max_prompt_tokens, request.prompt_param)
    return prompt


def apply_guard(state: GenerationState, results: Iterable[CheckResult], param: str | None) -> None:
    """Record the results of checks, and reject where an enforced one does not allow the text.

    Args:
        param: the field of the request that was checked; None for an answer.

    Raises:
        ApiError: content_refused.
    """
    for result in results:
        decision = result.decision
        state.decisions[result.check] = decision
        get_metrics().decisions.labels(result.check, decision.reason or "allow", state.version).inc()
        if result.rejects:
            raise errors.content_refused(decision.reason or result.check, param)


async def _work(is_short: bool, do: Callable[[], Result]) -> Result:
    return do() if is_short else await asyncio.get_running_loop().run_in_executor(_THREADS, do)


def _check(texts: Texts, model: LoadedModel, guard: Guard) -> list[CheckResult]:
    """Return the results of the checks up to the first that rejects the prompt."""
    results = []
    for result in check_prompt(texts, model.control_tokens, guard):
        results.append(result)
        if result.rejects:
            break
    return results


def _tokenize(request: GenerationRequest, model: LoadedModel) -> list[int]:
    if isinstance(request.raw, tuple):
        return list(request.raw)
    try:
        if request.raw is not None:
            return encode_text(model.tokenizer, request.raw)
        return model.encode_chat(request.messages, request.tools)
    except TemplateRefusal as error:
        raise errors.invalid_value(request.prompt_param, error.what) from None
    except ControlTokenRefusal:
        raise errors.content_refused("control_tokens", request.prompt_param) from None


def _count_chars(texts: Texts) -> int:
    return sum(len(text["content"]) for text in texts)
