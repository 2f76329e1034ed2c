"""The body of the native route `/ask`, checked before BentoML reads it.

BentoML checks a body itself, but before the key, and logs a traceback with the values that it rejects.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from services import errors
from services.api.bodies import replay_body
from services.errors import ApiError
from services.keys.access import Caller


class AskRequest(BaseModel):
    """The body of /ask."""

    model_config = ConfigDict(extra="forbid")

    question: Annotated[str, Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1, strict=True)] | None = None
    user: Annotated[str, Field(max_length=256)] | None = None


class AskCheck:
    """Check key and body of `/ask`; the route finds the caller in the request's state.

    Args:
        get_caller: authenticates a request and counts it; raises ApiError if it is not allowed.
    """

    def __init__(self, app: ASGIApp, get_caller: Callable[[Request], Awaitable[Caller]]) -> None:
        self._app = app
        self._get_caller = get_caller

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a valid request on, with a body that BentoML can read; reject any other."""
        if scope["type"] != "http" or scope["path"] != "/ask" or scope["method"] != "POST":
            return await self._app(scope, receive, send)
        request = Request(scope, receive)
        try:
            request.state.caller = await self._get_caller(request)
            body = parse_ask_request(await request.body()).model_dump_json(exclude_none=True).encode()
        except ApiError as error:
            response = JSONResponse(error.body(), error.status, error.headers())
            return await response(scope, receive, send)
        return await self._app(scope, replay_body(body, receive), send)


def parse_ask_request(body: bytes) -> AskRequest:
    """Return the checked body.

    Raises:
        ApiError: it is not JSON, or a value is not valid; the message holds nothing of the body but names.
    """
    try:
        return AskRequest.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False, include_context=False)[0]
    if first["type"] == "json_invalid":
        raise errors.invalid_json(_find_json_problem(body))
    if not first["loc"]:
        raise errors.invalid_value(None, "The body must be a JSON object.")
    raise errors.invalid_value(".".join(str(part) for part in first["loc"])[:100], first["msg"])


def _find_json_problem(body: bytes) -> str:
    try:
        json.loads(body)
    except UnicodeDecodeError:
        return "it is not UTF-8"
    except json.JSONDecodeError as error:
        return f"{error.msg}, line {error.lineno}, column {error.colno}"
    except (RecursionError, ValueError):
        pass
    return "it cannot be read"
