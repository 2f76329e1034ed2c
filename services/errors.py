"""What a request can be told when it is not answered, in the shape that OpenAI's clients read.

Every error of the server is an `ApiError` from one of the functions here, so that a code has one status
and one type wherever it is raised.
"""

from __future__ import annotations

import math
from typing import Any

# code → (HTTP status, OpenAI's `type`). OpenAI's clients choose the exception to raise, and whether to try
# again, by the status; their users read the code.
CODES: dict[str, tuple[int, str]] = {
    "invalid_json": (400, "invalid_request_error"),
    "invalid_value": (422, "invalid_request_error"),
    "context_length_exceeded": (400, "invalid_request_error"),
    "content_refused": (400, "invalid_request_error"),
    "invalid_api_key": (401, "invalid_request_error"),
    "not_found": (404, "invalid_request_error"),
    "model_not_found": (404, "invalid_request_error"),
    "method_not_allowed": (405, "invalid_request_error"),
    "request_too_large": (413, "invalid_request_error"),
    "rate_limit_exceeded": (429, "requests"),
    "insufficient_quota": (429, "insufficient_quota"),
    "overloaded": (429, "server_error"),
    "engine_failed": (500, "server_error"),
    "store_unavailable": (503, "server_error"),
    "not_ready": (503, "server_error"),
}


class ApiError(Exception):
    """A request that is not answered, and why.

    Args:
        status: HTTP status.
        code: stable word for programs, a key of `CODES`.
        message: for people. Never holds a key, or text that the guard refused.
        param: the field of the request's body that is at fault.
        retry_after_s: seconds after which the same request can succeed.
        reason: the guard's reason code, with `content_refused`.
    """

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        param: str | None = None,
        *,
        retry_after_s: float | None = None,
        reason: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s
        self.reason = reason

    def body(self) -> dict[str, Any]:
        """Return OpenAI's error object; a reason, which OpenAI has not, stands beside its four keys."""
        kind = CODES[self.code][1] if self.code in CODES else "server_error"
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        if self.reason is not None:
            error["reason"] = self.reason
        return {"error": error}

    def headers(self) -> dict[str, str]:
        """Return the response's headers: whole seconds to wait (RFC 9110 10.2.3), the challenge of a 401."""
        headers = {}
        if self.retry_after_s is not None:
            headers["Retry-After"] = str(max(1, math.ceil(self.retry_after_s)))
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return headers


def _error(
    code: str,
    message: str,
    param: str | None = None,
    retry_after_s: float | None = None,
    reason: str | None = None,
) -> ApiError:
    status, _ = CODES[code]
    return ApiError(status, code, message, param, retry_after_s=retry_after_s, reason=reason)


def invalid_json(detail: str) -> ApiError:
    """Return the error for a body that is not JSON."""
    return _error("invalid_json", f"The body is not JSON: {detail}.")


def invalid_value(param: str | None, problem: str) -> ApiError:
    """Return the error for a field whose value cannot be taken; `problem` says what would be."""
    return _error("invalid_value", f"{param}: {problem}" if param else problem, param)


def context_length_exceeded(tokens: int, limit: int) -> ApiError:
    """Return the error for a prompt (with its answer) of more tokens than the model or the limit holds."""
    message = (
        f"The request needs {tokens} tokens, and at most {limit} fit. Shorten the messages or max_tokens."
    )
    return _error("context_length_exceeded", message, "messages")


def content_refused(reason: str, param: str | None = "messages") -> ApiError:
    """Return the error for content that the guard refused; `param` is None where it was the answer's."""
    whose = "answer" if param is None else "request"
    return _error("content_refused", f"The {whose} was refused: {reason}.", param, reason=reason)


def invalid_api_key() -> ApiError:
    """Return the error for a missing, unknown or revoked key: which of the three is nobody's business."""
    return _error("invalid_api_key", "No valid API key. Send one as `Authorization: Bearer KEY`.")


def not_found(path: str) -> ApiError:
    """Return the error for an address that does not exist."""
    return _error("not_found", f"There is nothing at {path}.")


def model_not_found(model: str, known: list[str]) -> ApiError:
    """Return the error for a model that is not served; the message lists those that are."""
    message = f"The model {model!r} is not served here. Served: {', '.join(known) or 'none'}."
    return _error("model_not_found", message, "model")


def method_not_allowed(method: str, path: str) -> ApiError:
    """Return the error for an address that exists and does not take this method."""
    return _error("method_not_allowed", f"{path} does not take {method}.")


def request_too_large(limit_bytes: int) -> ApiError:
    """Return the error for a body of more bytes than are read."""
    return _error("request_too_large", f"The body is larger than {limit_bytes} bytes.")


def rate_limit_exceeded(retry_after_s: float) -> ApiError:
    """Return the error for a client that asks too often."""
    message = f"Too many requests. Try again in {retry_after_s:.1f} s."
    return _error("rate_limit_exceeded", message, retry_after_s=retry_after_s)


def insufficient_quota(retry_after_s: float) -> ApiError:
    """Return the error for a key whose tokens of the day are used up; it ends at midnight UTC."""
    message = f"The key's tokens for today are used up. It has new ones in {retry_after_s:.0f} s."
    return _error("insufficient_quota", message, retry_after_s=retry_after_s)


def overloaded(retry_after_s: float) -> ApiError:
    """Return the error for a request that the queue has no room for."""
    message = f"The server is overloaded. Try again in {retry_after_s:.1f} s."
    return _error("overloaded", message, retry_after_s=retry_after_s)


def engine_failed(request_id: str) -> ApiError:
    """Return the error for an engine that broke; what broke is in the log, under `request_id`."""
    return _error("engine_failed", f"The model failed on this request. The log has more under {request_id}.")


def store_unavailable(retry_after_s: float = 5.0) -> ApiError:
    """Return the error for an event store that takes nothing: an answer that is not stored is not given."""
    return _error("store_unavailable", "The event store takes nothing now.", retry_after_s=retry_after_s)


def not_ready(why: str, retry_after_s: float = 5.0) -> ApiError:
    """Return the error for a server that is starting or ending."""
    return _error("not_ready", f"The server is not ready: {why}.", retry_after_s=retry_after_s)
