"""The OpenAI-compatible routes, feedback and the page, as an ASGI application."""

from __future__ import annotations

import asyncio
import json
import logging
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from functools import partial
from pathlib import Path
from typing import Any

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, Response
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from services import errors
from services.answering import Answerer, Part, Question, new_request_id
from services.api.responses import ChatShape, CompletionShape, Shape
from services.api.schemas import ChatRequest, CompletionRequest, FeedbackRequest, ResponseFormat
from services.engines.protocol import Sampling
from services.errors import ApiError
from services.events import Feedback, StoreUnavailable
from services.keys.access import Caller
from services.model_pool import Served
from stages.common.chat import template_sha256
from stages.common.records import Message

PAGE = Path(__file__).parent / "page"
# The page needs nothing from elsewhere, and nothing that the model wrote may run in it.
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; frame-ancestors 'self'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
STREAM_HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",  # nginx would gather the chunks
}

logger = logging.getLogger("services.api.routes")
GetAnswerer = Callable[[], Answerer]
GetCaller = Callable[[Request], Awaitable[Caller]]
MakeShape = Callable[[Served], Shape]


class AnswerResponse(Response):
    """An answer as it comes: one JSON body, or server-sent events.

    A client that goes away ends the work at once, also while its request still waits for a place.
    """

    def __init__(self, answerer: Answerer, question: Question, make_shape: MakeShape, stream: bool) -> None:
        super().__init__()
        self._answerer, self._question, self._make_shape, self._stream = (
            answerer,
            question,
            make_shape,
            stream,
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Write the answer."""
        work = asyncio.ensure_future(self._write(scope, receive, send))
        gone = asyncio.ensure_future(_disconnected(receive))
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
            if gone.done():
                work.cancel()
            await work
        except (asyncio.CancelledError, OSError):
            if not gone.done():
                raise
        finally:
            work.cancel()
            gone.cancel()

    async def _write(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            choice = self._answerer.fleet.pick(self._question.model, self._question.asker)
            shape = self._make_shape(choice.served)
            async with aclosing(self._answerer.answer(self._question, choice)) as parts:
                first = await anext(parts)
                if self._stream:
                    await self._send_stream(shape, first, parts, send)
                    return
                gathered = [first, *[part async for part in parts]]
        except ApiError as error:
            await error_response(error, self._question.request_id)(scope, receive, send)
            return
        headers = {"X-Request-Id": self._question.request_id}
        await Response(shape.whole(gathered), 200, headers, "application/json")(scope, receive, send)

    async def _send_stream(self, shape: Shape, first: Part, parts: AsyncIterator[Part], send: Send) -> None:
        headers = {**STREAM_HEADERS, "X-Request-Id": self._question.request_id}
        raw = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
        await send({"type": "http.response.start", "status": 200, "headers": raw})
        part, opening = first, shape.opening()
        try:
            while part.finish_reason is None:
                await _send_body(send, opening + shape.chunk(part))
                part, opening = await anext(parts), b""
            end = opening + shape.chunk(part) + b"data: [DONE]\n\n"
        except ApiError as error:  # too late for a status: the stream ends with the error, and without [DONE]
            end = b"data: " + json.dumps(error.body()).encode() + b"\n\n"
        await _send_body(send, end, more=False)


async def _send_body(send: Send, body: bytes, more: bool = True) -> None:
    await send({"type": "http.response.body", "body": body, "more_body": more})


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def error_response(error: ApiError, request_id: str | None = None) -> JSONResponse:
    """Return an error as OpenAI's clients read it."""
    headers = error.headers()
    if request_id:
        headers["X-Request-Id"] = request_id
    return JSONResponse(error.body(), error.status, headers)


def make_app(get_answerer: GetAnswerer, get_caller: GetCaller) -> FastAPI:
    """Return the application.

    Args:
        get_answerer: what answers; raises ApiError while nothing can.
        get_caller: who asks; raises ApiError for who may not.
    """
    app = FastAPI(title="Perennial", docs_url=None, redoc_url=None)
    _add_error_handlers(app)
    _add_page(app)
    caller = Depends(get_caller)

    @app.get("/v1/models", responses=_ERRORS)
    async def models(_: Caller = caller) -> dict[str, Any]:
        """List the models that can be asked for."""
        served = get_answerer().fleet.served()
        return {"object": "list", "data": [_model(alias, version) for alias, version in served.items()]}

    @app.get("/v1/models/{model}", responses=_ERRORS)
    async def model(model: str, _: Caller = caller) -> dict[str, Any]:
        """Describe one model."""
        choice = get_answerer().fleet.pick(model, "")
        return _model(choice.role, choice.served)

    @app.post("/v1/chat/completions", responses=_ERRORS, response_model=None)
    async def chat(body: ChatRequest, caller: Caller = caller) -> AnswerResponse:
        """Answer a conversation."""
        answerer = get_answerer()
        question = chat_question(body, caller, answerer)
        shape = partial(ChatShape, question, body.model, body.wants_usage())
        return AnswerResponse(answerer, question, shape, bool(body.stream))

    @app.post("/v1/completions", responses=_ERRORS, response_model=None)
    async def completions(body: CompletionRequest, caller: Caller = caller) -> AnswerResponse:
        """Continue a text, with no chat template around it."""
        answerer = get_answerer()
        question = completion_question(body, caller, answerer)
        shape = partial(CompletionShape, question, body.model, body.wants_usage())
        return AnswerResponse(answerer, question, shape, bool(body.stream))

    @app.post("/v1/feedback", responses=_ERRORS)
    async def feedback(body: FeedbackRequest, caller: Caller = caller) -> dict[str, str]:
        """Keep what a person thinks of an answer: a thumb, a better answer, a comment."""
        store = get_answerer().store
        thumb = {"up": 1, "down": -1, None: None}[body.thumb]
        given = Feedback(
            f"fb_{uuid.uuid4().hex}",
            body.request_id,
            time.time(),
            caller.key,
            thumb,
            body.correction,
            body.comment,
        )
        try:
            if not await store.answer_exists(body.request_id):
                raise errors.invalid_value("request_id", f"no answer has the id {body.request_id!r}")
            await store.record(given)
        except StoreUnavailable:
            raise errors.store_unavailable() from None
        return {"feedback_id": given.feedback_id}

    @app.api_route("/v1/{path:path}", methods=_METHODS, include_in_schema=False)
    async def unknown(request: Request) -> None:
        """Say what is wrong with an address in the shape that clients of /v1 read."""
        known = [
            route.path for route in app.routes if isinstance(route, Route) and route.path != "/v1/{path:path}"
        ]
        path = request.url.path
        raise errors.method_not_allowed(request.method, path) if path in known else errors.not_found(path)

    return app


_METHODS = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE"]
_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"description": text}
    for status, text in {
        400: "The body is not JSON, too long for the model, or refused by the guard",
        401: "No valid API key",
        404: "No such model",
        413: "The body is too large",
        422: "A value cannot be taken",
        429: "Too many requests; Retry-After says when",
        503: "Not ready, or the event store takes nothing",
    }.items()
}


def chat_question(body: ChatRequest, caller: Caller, answerer: Answerer) -> Question:
    """Return what a chat request asks.

    Raises:
        ApiError: the messages cannot be a conversation, or more is asked than may be.
    """
    limit = answerer.settings.guard.max_messages
    if len(body.messages) > limit:
        raise errors.invalid_value("messages", f"{len(body.messages)} messages; at most {limit} are read")
    messages = tuple(
        Message("system" if message.role == "developer" else message.role, message.text())
        for message in body.messages
    )
    if all(message.role != "user" for message in messages):
        raise errors.invalid_value("messages", "no message is the user's")
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    sampling = _sampling(body, body.max_completion_tokens or body.max_tokens, logprobs, answerer)
    return _question("/v1/chat/completions", body, caller, sampling, messages, None)


def completion_question(body: CompletionRequest, caller: Caller, answerer: Answerer) -> Question:
    """Return what a completion request asks.

    Raises:
        ApiError: a token id is none of the model's, or more is asked than may be.
    """
    prompt = body.prompt
    if not isinstance(prompt, str):
        size = len(answerer.fleet.champion.tokenizer)
        if wrong := next((token for token in prompt if not 0 <= token < size), None):
            raise errors.invalid_value("prompt", f"{wrong} is no token id; they go from 0 to {size - 1}")
        prompt = tuple(prompt)  # type: ignore[assignment]
    sampling = _sampling(body, body.max_tokens, body.logprobs, answerer)
    return _question("/v1/completions", body, caller, sampling, (), prompt)  # type: ignore[arg-type]


def _question(
    route: str,
    body: ChatRequest | CompletionRequest,
    caller: Caller,
    sampling: Sampling,
    messages: tuple[Message, ...],
    raw: str | tuple[int, ...] | None,
) -> Question:
    return Question(
        request_id=new_request_id(),
        route=route,
        messages=messages,
        raw=raw,
        sampling=sampling,
        stops=body.stops(),
        model=body.model or None,
        caller=caller,
        user=body.user,
        session=body.session,
    )


def _sampling(
    body: ChatRequest | CompletionRequest, max_tokens: int | None, logprobs: int | None, answerer: Answerer
) -> Sampling:
    answers = answerer.settings.answers
    if max_tokens is not None and max_tokens > answers.max_tokens:
        raise errors.invalid_value("max_tokens", f"{max_tokens} is above the limit of {answers.max_tokens}")
    return Sampling(
        max_tokens=max_tokens or answers.default_max_tokens,
        temperature=body.temperature or 0.0,
        top_p=body.top_p or 1.0,
        seed=body.seed,
        frequency_penalty=body.frequency_penalty or 0.0,
        presence_penalty=body.presence_penalty or 0.0,
        logprobs=logprobs,
        json_schema=_json_schema(body.response_format),
    )


def _json_schema(wanted: ResponseFormat | None) -> str | None:
    if wanted is None or wanted.type == "text":
        return None
    if wanted.json_schema is None:
        return '{"type": "object"}'
    # Keys stay in their order: it is the order in which the answer is written.
    return json.dumps(wanted.json_schema.schema_)


def _model(alias: str, served: Served) -> dict[str, Any]:
    about = served.files.about
    shown = {key: about.get(key) for key in ("label_key", "system_prompt", "answer_schema", "base_model")}
    return {
        "id": served.files.name if alias == "champion" else served.files.tag,
        "object": "model",
        "created": 0,
        "owned_by": "perennial",
        "perennial": {
            "alias": alias,
            "version": served.files.version,
            "engine": served.engine.name,
            "template_sha256": template_sha256(served.tokenizer),
            "context_tokens": served.engine.context_tokens,
            "examples": about.get("examples") or [],
            **shown,
        },
    }


def _add_page(app: FastAPI) -> None:
    @app.get("/", include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(PAGE / "index.html", headers=PAGE_HEADERS)

    app.mount("/page", StaticFiles(directory=PAGE), name="page")


def _add_error_handlers(app: FastAPI) -> None:
    async def refused(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, ApiError)
        return error_response(error)

    async def invalid(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        return error_response(validation_error(error))

    async def http(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        if error.status_code == 405:
            return error_response(errors.method_not_allowed(request.method, request.url.path))
        if error.status_code == 404:
            return error_response(errors.not_found(request.url.path))
        return error_response(errors.invalid_json(str(error.detail)))

    async def unexpected(request: Request, error: Exception) -> JSONResponse:
        logger.error("%s %s failed", request.method, request.url.path, exc_info=error)
        return error_response(errors.engine_failed("this time"))

    handlers: dict[type[Exception], Callable[[Request, Exception], Awaitable[JSONResponse]]] = {
        ApiError: refused,
        RequestValidationError: invalid,
        HTTPException: http,
        Exception: unexpected,
    }
    for kind, handler in handlers.items():
        app.add_exception_handler(kind, handler)


def validation_error(error: RequestValidationError) -> ApiError:
    """Return the first problem of a body as an error: 400 if it is not JSON at all, 422 for a wrong value."""
    first = error.errors()[0]
    if first["type"] == "model_attributes_type":
        return errors.invalid_value(None, "The body must be a JSON object.")
    if first["type"] == "json_invalid":
        return errors.invalid_json(str(first.get("ctx", {}).get("error", first["msg"])))
    where = ".".join(str(part) for part in first["loc"] if part != "body")
    return errors.invalid_value(where or None, first["msg"])
