"""What a client is told of an engine's failure."""

from __future__ import annotations

import logging

from services import errors
from services.engines.protocol import EngineError, QueueFull
from services.model_pool import RESTARTING, LoadedModel

logger = logging.getLogger("services.answering")


def convert_failure(error: EngineError, model: LoadedModel, request_id: str) -> errors.ApiError:
    """Return the error of a request that the engine did not finish."""
    if isinstance(error, QueueFull):
        return errors.overloaded(retry_after_s=1.0)
    if model.engine.broken is not None:  # the pool starts it again
        return errors.not_ready(RESTARTING)
    logger.error("%s: the engine failed", request_id, exc_info=error)
    return errors.engine_failed(request_id)
