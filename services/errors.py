"""Errors of the API, in OpenAI's format.

Every error of the server is an `ApiError` made by one of these functions, so that each code has one status
and one type.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

# code → (HTTP status, OpenAI's `type`). OpenAI's clients pick the exception, and whether to retry, by status.
CODES: dict[str, tuple[int, str]] = {
    "invalid_json": (400, "invalid_request_error"),
    "invalid_value": (422, "invalid_request_error"),
    "unsupported_parameter": (422, "invalid_request_error"),
    "wrong_content_type": (415, "invalid_request_error"),
    "context_length_exceeded": (400, "invalid_request_error"),
    "content_refused": (400, "invalid_request_error"),
    "invalid_api_key": (401, "invalid_request_error"),
    "wrong_user": (403, "invalid_request_error"),
    "not_found": (404, "invalid_request_error"),
    "model_not_found": (404, "invalid_request_error"),
    "method_not_allowed": (405, "invalid_request_error"),
    "body_timed_out": (408, "invalid_request_error"),
    "request_too_large": (413, "invalid_request_error"),
    "rate_limit_exceeded": (429, "requests"),
    "insufficient_quota": (429, "insufficient_quota"),
    "overloaded": (429, "server_error"),
    "engine_failed": (500, "server_error"),
    "store_unavailable": (503, "server_error"),
    "not_ready": (503, "server_error"),
    "timed_out": (504, "server_error"),
}


class ApiError(Exception):
    """A request that failed or was rejected.

    Args:
        status: HTTP status.
        code: stable identifier for programs, a key of `CODES`.
        message: for people. Must not contain an API key, or text that the guard rejected.
        param: the invalid field of the request's body.
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
        self.allow: str | None = None  # methods that the path supports, with `method_not_allowed`

    def body(self) -> dict[str, Any]:
        """Return OpenAI's error object; `reason` is an addition to its four keys."""
        kind = CODES[self.code][1] if self.code in CODES else "server_error"
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        if self.reason is not None:
            error["reason"] = self.reason
        return {"error": error}

    def headers(self) -> dict[str, str]:
        """Return the headers: Retry-After in whole seconds, challenge of a 401, Allow of a 405 (RFC 9110)."""
        headers = {}
        if self.retry_after_s is not None:
            headers["Retry-After"] = str(max(1, math.ceil(self.retry_after_s)))
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        if self.allow is not None:
            headers["Allow"] = self.allow
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
    """Return the error for an invalid value of a field."""
    return _error("invalid_value", f"{param}: {problem}" if param else problem, param)


def unsupported_parameter(param: str, problem: str) -> ApiError:
    """Return the error for a field that would change the answer, and that this service does not have."""
    return _error("unsupported_parameter", f"{param}: {problem}", param)


def wrong_content_type(content_type: str) -> ApiError:
    """Return the error for a body that is not declared as JSON."""
    message = f"The Content-Type is {content_type[:100]!r}; send the body as application/json."
    return _error("wrong_content_type", message)


def context_length_exceeded(tokens: int, limit: int, param: str = "messages") -> ApiError:
    """Return the error for a prompt that exceeds the context or the prompt limit.

    Clients recognise the case by the code, or by the first words, which are OpenAI's.

    Args:
        param: the field with the prompt.
    """
    message = (
        f"This model's maximum context length is {limit} tokens. However, your {param} resulted in {tokens} "
        f"tokens. Please reduce the length of the {param}."
    )
    return _error("context_length_exceeded", message, param)


def content_refused(reason: str, param: str | None = "messages") -> ApiError:
    """Return the error for content that the guard rejected; `param` is None for an answer."""
    content = "answer" if param is None else "request"
    return _error("content_refused", f"The {content} was rejected: {reason}.", param, reason=reason)


def invalid_api_key() -> ApiError:
    """Return the error for a missing, unknown or revoked key; which of the three is not disclosed."""
    return _error("invalid_api_key", "No valid API key. Send one as `Authorization: Bearer KEY`.")


def wrong_user(fix: str) -> ApiError:
    """Return the error for a connection of another user of this machine, or of one that cannot be found."""
    message = "Only processes of the user who runs this server are answered, as no key is needed here."
    return _error("wrong_user", f"{message} fix: {fix}" if fix else message)


def not_found(path: str) -> ApiError:
    """Return the error for a path that does not exist."""
    return _error("not_found", f"There is nothing at {path}.")


def model_not_found(model: str, known: list[str]) -> ApiError:
    """Return the error for a model that is not served; the message lists the ones that are."""
    message = f"The model {model!r} is not served here. Served: {', '.join(known) or 'none'}."
    return _error("model_not_found", message, "model")


def method_not_allowed(method: str, path: str, allowed: Iterable[str]) -> ApiError:
    """Return the error for a path that does not support this method; `allowed` are those that it does."""
    supported = ", ".join(sorted(allowed))
    error = _error("method_not_allowed", f"{path} does not support {method}. It supports: {supported}.")
    error.allow = supported
    return error


def request_too_large(limit_bytes: int) -> ApiError:
    """Return the error for a body above the size limit."""
    return _error("request_too_large", f"The body is larger than {limit_bytes} bytes.")


def body_timed_out(limit_s: float) -> ApiError:
    """Return the error for a body that did not arrive in time."""
    return _error("body_timed_out", f"The body did not arrive within {limit_s:g} seconds.")


def timed_out(limit_s: float) -> ApiError:
    """Return the error for a request whose answer did not begin in time."""
    message = f"The answer did not begin within {limit_s:g} seconds. Ask again, or ask for less."
    return _error("timed_out", message)


def rate_limit_exceeded(retry_after_s: float) -> ApiError:
    """Return the error for a client above its rate limit."""
    message = f"Too many requests. Try again in {retry_after_s:.1f} s."
    return _error("rate_limit_exceeded", message, retry_after_s=retry_after_s)


def insufficient_quota(tokens: int, left: int, quota: int, retry_after_s: float) -> ApiError:
    """Return the error for a request that could exceed the daily quota, which is whole again at midnight UTC.

    Args:
        tokens: the most that the request can use.
        left: of today's quota.
    """
    if tokens > quota:  # however long the client waits
        message = f"The request can use up to {tokens} tokens, and the quota of a whole day is {quota}."
        return _error("insufficient_quota", f"{message} Lower max_tokens or shorten the prompt.")
    if left > 0:
        message = f"The request can use up to {tokens} tokens, and {left} of today's {quota} are left."
        message += f" Lower max_tokens, or wait {retry_after_s:.0f} s for the next day."
    else:
        message = f"The daily quota of {quota} tokens is used up. It resets in {retry_after_s:.0f} s."
    return _error("insufficient_quota", message, retry_after_s=retry_after_s)


def overloaded(retry_after_s: float) -> ApiError:
    """Return the error for a request when the queue is full."""
    message = f"The server is overloaded. Try again in {retry_after_s:.1f} s."
    return _error("overloaded", message, retry_after_s=retry_after_s)


def engine_failed(request_id: str) -> ApiError:
    """Return the error for a failed engine; the log has the cause under `request_id`."""
    return _error("engine_failed", f"The model failed on this request. See the log for {request_id}.")


def store_unavailable(retry_after_s: float = 5.0) -> ApiError:
    """Return the error for an event store that cannot be written: no answer is returned without its event."""
    return _error("store_unavailable", "The event store cannot be written.", retry_after_s=retry_after_s)


def not_ready(why: str, retry_after_s: float = 5.0) -> ApiError:
    """Return the error for a server that is starting or stopping."""
    return _error("not_ready", f"The server is not ready: {why}.", retry_after_s=retry_after_s)
