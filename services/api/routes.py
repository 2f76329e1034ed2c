"""The ASGI application: OpenAI-compatible routes, feedback and the page."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException
from starlette.routing import Match, Route

from services import errors
from services.answering.embedding import EmbeddingRequest, embed_texts
from services.answering.feedback import take_feedback
from services.answering.handler import ChatHandler
from services.answering.request import make_request_id
from services.api.answer import AnswerResponse, make_error_response
from services.api.embeddings.schemas import EmbeddingsRequest, format_embeddings
from services.api.items.formatting import ItemFormatter
from services.api.items.parsing import parse_responses_request
from services.api.items.schemas import ResponsesRequest
from services.api.parsing import parse_chat_request, parse_completion_requests
from services.api.problems import convert_validation_error, describe_unread
from services.api.responses import CHAT, COMPLETION, ResponseFormatter
from services.api.schemas import ChatRequest, CompletionRequest, FeedbackRequest, list_prompts
from services.errors import ApiError
from services.events import Feedback
from services.keys.access import Caller
from services.model_pool import LoadedModel
from stages.common.chat.template import hash_template
from stages.common.page.shared import PAGE_FILES

PAGE = Path(__file__).parent / "page"
# The page loads nothing from other hosts, and model output must never run in it.
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; frame-ancestors 'self'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}

logger = logging.getLogger("services.api.routes")
GetHandler = Callable[[], ChatHandler]
GetCaller = Callable[[Request], Awaitable[Caller]]


def make_app(get_handler: GetHandler, get_caller: GetCaller) -> FastAPI:
    """Return the application.

    Args:
        get_handler: returns the handler; raises ApiError while the service is not ready.
        get_caller: authenticates a request; raises ApiError if it is not allowed.
    """
    app = FastAPI(title="Perennial", docs_url=None, redoc_url=None)
    _add_error_handlers(app)
    _add_page(app)
    caller, request_id = Depends(get_caller), Depends(get_request_id)

    @app.get("/v1/models", responses=_ERRORS)
    async def list_models(_: Caller = caller) -> dict[str, Any]:
        """List the models that can be requested."""
        models = get_handler().pool.get_models()
        return {"object": "list", "data": [_describe_model(alias, model) for alias, model in models.items()]}

    @app.get("/v1/models/{model}", responses=_ERRORS)
    async def retrieve_model(model: str, _: Caller = caller) -> dict[str, Any]:
        """Describe one model."""
        route = get_handler().pool.route(model, "")
        return _describe_model(route.role, route.model)

    @app.post("/v1/chat/completions", responses=_ERRORS, response_model=None)
    async def create_chat_completion(
        body: ChatRequest, request_id: str = request_id, caller: Caller = caller
    ) -> AnswerResponse:
        """Answer a conversation."""
        handler = get_handler()
        request = parse_chat_request(body, request_id, caller, handler)
        formatter = partial(ResponseFormatter, CHAT, request_id, body.model, body.wants_usage())
        return AnswerResponse(handler, [request], formatter, bool(body.stream))

    @app.post("/v1/completions", responses=_ERRORS, response_model=None)
    async def create_completion(
        body: CompletionRequest, request_id: str = request_id, caller: Caller = caller
    ) -> AnswerResponse:
        """Continue a text, without a chat template."""
        handler = get_handler()
        requests = parse_completion_requests(body, request_id, caller, handler)
        formatter = partial(ResponseFormatter, COMPLETION, request_id, body.model, body.wants_usage())
        return AnswerResponse(handler, requests, formatter, bool(body.stream))

    @app.post("/v1/responses", responses=_ERRORS, response_model=None)
    async def create_response(
        body: ResponsesRequest, request_id: str = request_id, caller: Caller = caller
    ) -> AnswerResponse:
        """Answer a conversation of items."""
        handler = get_handler()
        request = parse_responses_request(body, request_id, caller, handler)
        return AnswerResponse(handler, [request], partial(ItemFormatter, body, request), bool(body.stream))

    @app.post("/v1/embeddings", responses=_ERRORS, response_model=None)
    async def create_embeddings(
        body: EmbeddingsRequest, request_id: str = request_id, caller: Caller = caller
    ) -> Response:
        """Return texts as vectors."""
        texts = tuple(list_prompts(body.input))
        request = EmbeddingRequest(request_id, texts, caller, body.model, body.dimensions)
        found = await embed_texts(request, get_handler())
        content = await asyncio.to_thread(format_embeddings, found, body)
        return Response(content, media_type="application/json")

    @app.post("/v1/feedback", responses=_ERRORS)
    async def create_feedback(body: FeedbackRequest, caller: Caller = caller) -> dict[str, str]:
        """Store feedback on an answer: a thumb, a correction, a comment."""
        event = Feedback(
            feedback_id=f"fb_{uuid.uuid4().hex}",
            request_id=body.request_id,
            given_at=time.time(),
            key_id=caller.key,
            thumb={"up": 1, "down": -1, None: None}[body.thumb],
            correction=body.correction,
            comment=body.comment,
        )
        await take_feedback(event, get_handler())
        return {"feedback_id": event.feedback_id}

    @app.api_route("/v1/{path:path}", methods=_METHODS, include_in_schema=False)
    async def reject_unknown(request: Request) -> None:
        """Return 404 or 405 in OpenAI's format."""
        allowed = {
            method
            for route in app.routes
            if isinstance(route, Route) and route.path != "/v1/{path:path}"
            if route.matches(request.scope)[0] is not Match.NONE
            for method in route.methods or ()
        }
        path = request.url.path
        raise errors.method_not_allowed(request.method, path, allowed) if allowed else errors.not_found(path)

    return app


# What the load is shed of: the routes whose answers take the models' time.
LIMITED_PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/embeddings", "/ask")
_METHODS = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE"]
_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"description": text}
    for status, text in {
        400: "The body is not JSON, is too long for the model, or was rejected by the guard",
        401: "No valid API key",
        404: "No such model",
        408: "The body did not arrive in time",
        413: "The body is too large",
        415: "The body is not declared as JSON",
        422: "A value is not valid",
        429: "Too many requests; see Retry-After",
        503: "Not ready, or the event store cannot be written",
        504: "The answer did not begin in time",
    }.items()
}


def get_request_id(request: Request) -> str:
    """Return the id that the middleware gave a request."""
    return getattr(request.state, "request_id", None) or make_request_id()


def _describe_model(alias: str, model: LoadedModel) -> dict[str, Any]:
    about = model.files.about
    shown = {key: about.get(key) for key in ("task", "system_prompt", "answer_schema", "base_model")}
    return {
        "id": model.files.name if alias == "champion" else model.files.tag,
        "object": "model",
        "created": 0,
        "owned_by": "perennial",
        "perennial": {
            "alias": alias,
            "version": model.files.version,
            "engine": model.engine.name,
            "template_sha256": hash_template(model.tokenizer),
            "context_tokens": model.engine.context_tokens,
            "examples": about.get("examples") or [],
            "tools": about.get("tools") or [],
            **shown,
        },
    }


def _add_page(app: FastAPI) -> None:
    html = (PAGE / "index.html").read_bytes()  # here, as each access to a file waits for a thread twice

    @app.get("/", include_in_schema=False)
    async def page() -> HTMLResponse:
        return HTMLResponse(html, headers=PAGE_HEADERS)

    app.mount("/page/shared", StaticFiles(directory=PAGE_FILES), name="shared")
    app.mount("/page", StaticFiles(directory=PAGE), name="page")


def _add_error_handlers(app: FastAPI) -> None:
    async def api_error(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, ApiError)
        return make_error_response(error)

    async def validation(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        content_type = request.headers.get("content-type", "")
        return make_error_response(convert_validation_error(error, content_type))

    async def http(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        if error.status_code == 405:
            allowed = (error.headers or {}).get("Allow", "").split(", ")
            return make_error_response(errors.method_not_allowed(request.method, request.url.path, allowed))
        if error.status_code == 404:
            return make_error_response(errors.not_found(request.url.path))
        return make_error_response(errors.invalid_json(describe_unread(error, request.headers)))

    async def unexpected(request: Request, error: Exception) -> JSONResponse:
        logger.error(
            "%s: %s %s failed", get_request_id(request), request.method, request.url.path, exc_info=error
        )
        request_id = get_request_id(request)
        return make_error_response(errors.engine_failed(request_id), request_id)

    handlers: dict[type[Exception], Callable[[Request, Exception], Awaitable[JSONResponse]]] = {
        ApiError: api_error,
        RequestValidationError: validation,
        HTTPException: http,
        Exception: unexpected,
    }
    for kind, handler in handlers.items():
        app.add_exception_handler(kind, handler)
