"""Take feedback on an answer: check it, and store it with the answer that it is about."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor

from services import errors
from services.answering.handler import ChatHandler
from services.events import Feedback, StoreUnavailable
from services.guard import policy

# Threads of its own: asyncio's are shared by all requests, and formatting a few large answers fills them.
_THREADS = ThreadPoolExecutor(4, thread_name_prefix="feedback")


async def take_feedback(given: Feedback, handler: ChatHandler) -> None:
    """Store feedback on an answer.

    Raises:
        ApiError: there is no such answer, the guard rejects the correction, or the store fails.
    """
    try:
        await asyncio.get_running_loop().run_in_executor(_THREADS, _check, given, handler)
        await handler.store.record(given)
    except StoreUnavailable:
        raise errors.store_unavailable() from None


def _check(given: Feedback, handler: ChatHandler) -> None:
    if given.correction:
        _check_correction(given.correction, handler)
    if handler.store.find_parameters(given.request_id) is None:
        raise errors.invalid_value("request_id", f"there is no answer with the id {given.request_id!r}")


def _check_correction(correction: str, handler: ChatHandler) -> None:
    """Reject a correction that the guard does not allow: it may become an answer that a model learns."""
    settings = handler.settings.guard
    for result in policy.check_correction(correction, handler.pool.champion.control_tokens, settings):
        if result.policy == "enforce" and not result.decision.allow:
            raise errors.content_refused(result.decision.reason or result.check, "correction")
