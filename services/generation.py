"""The service: `bentoml serve services.generation:Generation`, or `make serve`.

Configured by `services` in params.yaml. Serves the champion.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import sys
from contextlib import aclosing
from functools import cache
from types import FrameType
from typing import Annotated, Any, cast

import bentoml
import psutil
from bentoml._internal.server.http import traffic
from fastapi import Request
from pydantic import Field
from starlette.types import Scope
from uvicorn.protocols.http import auto

from services import errors
from services.answering.handler import ChatHandler
from services.answering.request import Delta, GenerationRequest
from services.api.answer import make_error_response
from services.api.ask import AskCheck
from services.api.bodies import BodyLimit
from services.api.heads import make_protocol
from services.api.middleware import ConcurrencyLimit, Deadline, RequestIds, listens_beyond_loopback
from services.api.routes import LIMITED_PATHS, get_request_id, make_app
from services.api.same_origin import SameOrigin
from services.api.schemas import Answer
from services.engines.protocol import Sampling
from services.engines.select import check_gpus, load_engine
from services.errors import ApiError
from services.events import StoreUnavailable
from services.heap import settle_heap
from services.keys.access import Caller
from services.log_tracebacks import hide_messages
from services.model_pool import LoadedModel, ModelPool
from services.peers.own_user import OwnUser
from services.startup import RunningService, start, stop
from services.versions.store import ModelFiles, find_served, get_version
from stages.common.chat.template import encode_text
from stages.common.errors import InputError
from stages.common.logs import hide_packages, set_quiet_environment
from stages.common.machine.parent import end_with_parent
from stages.common.messages import Message
from stages.common.model.loading import load_tokenizer
from stages.common.params.loading import load_params
from stages.common.task.kinds import make_task

set_quiet_environment()
hide_packages()
hide_messages()
# The engine's thread needs the interpreter briefly after every step; Python's default switch interval of 5 ms
# is a third of a step.
sys.setswitchinterval(0.0005)
PARAMS = load_params()
SETTINGS = PARAMS.services
# Read by Uvicorn when BentoML's worker starts it; its default would believe any proxy on this machine.
os.environ["FORWARDED_ALLOW_IPS"] = ",".join(SETTINGS.access.proxies)
# BentoML passes no protocol to Uvicorn, which then takes this one.
auto.AutoHTTPProtocol = make_protocol(SETTINGS.body_timeout_s)
# BentoML's limit would keep a timer for each request until it is over, however soon the response has begun:
# tens of thousands of objects in each collection of garbage. `Deadline` is the limit.
cast(Any, traffic).TimeoutMiddleware = lambda app, timeout: app

ADD_KEY = "the user who runs the service adds a key with `perennial keys add NAME`"
WORKER = "_bentoml_impl.worker.service"  # BentoML's module that runs the service in a process of its own

logger = logging.getLogger("services.generation")


class _Process:
    """State of this process, which the routes share."""

    running: RunningService | None = None
    problem: str | None = None  # of the last readiness probe, so that changes are logged once


_process = _Process()


def load_model(tag: str) -> LoadedModel:
    """Load a stored version: its tokenizer, and the engine for this machine."""
    files = get_version(tag)
    tokenizer = load_tokenizer(files.tokenizer)
    # Now, as it takes a second with a large vocabulary: no request should wait for it.
    encode_text(tokenizer, "".join(tokenizer.all_special_tokens))
    engine = load_engine(files, tokenizer, SETTINGS.engine, SETTINGS.request_timeout_s)
    model = LoadedModel(files, tokenizer, engine)
    settle_heap()
    return model


def find_server() -> psutil.Process | None:
    """Return BentoML's parent process, which starts this one again when it ends; None without one.

    Known by this process's own module: a parent may rename itself, and does where setproctitle is installed.
    """
    module = sys.modules["__main__"].__spec__
    return psutil.Process().parent() if module is not None and module.name == WORKER else None


def terminate_server() -> None:
    """Terminate BentoML's parent process, which would restart this one endlessly with the same error."""
    if (server := find_server()) is not None:
        server.terminate()


def stop_loading_on_sigterm(pool: ModelPool) -> None:
    """Have SIGTERM end the loading of models, besides what it does already.

    BentoML sends it to the processes of engines too. They finish their answers and end, and must not be
    started again while the service does the same.
    """
    former = signal.getsignal(signal.SIGTERM)

    def note(number: int, frame: FrameType | None) -> None:
        pool.stopping = True
        if callable(former):
            former(number, frame)

    signal.signal(signal.SIGTERM, note)


def get_handler() -> ChatHandler:
    """Return the request handler of this process.

    Raises:
        ApiError: the service is starting or stopping.
    """
    if _process.running is None:
        raise errors.not_ready("it is starting")
    return _process.running.handler


async def get_caller(request: Request) -> Caller:
    """Authenticate a request.

    Raises:
        ApiError: the key is not valid, or the rate limit is exceeded.
    """
    address = request.client.host if request.client else ""
    return get_handler().access.admit(request.headers.get("authorization"), address)


@bentoml.service(
    name="perennial",
    workers=1,  # one engine uses the whole machine; a second would halve its batches and double the memory
    # `Deadline` responds first, in OpenAI's format.
    traffic={"timeout": SETTINGS.request_timeout_s + SETTINGS.body_timeout_s + 30},
    resources={"gpu": SETTINGS.engine.gpus} if SETTINGS.engine.gpus else {},
    http={"host": SETTINGS.host, "port": SETTINGS.port},
    # No spans and no access log for requests that the event store records: per chunk of a stream they cost as
    # much as sending it.
    tracing={"excluded_urls": "/v1/.*"},
    logging={"access": {"enabled": False}},
)
@bentoml.asgi_app(make_app(get_handler, get_caller), path="/")
class Generation:
    """Answers with the champion, and stores every exchange."""

    @bentoml.on_startup
    async def start(self) -> None:
        """Start loading the champion: the process is live at once, and ready once the model answers."""
        if (server := find_server()) is not None:
            end_with_parent(server.pid)  # else this one would keep the port, and no one could end it by name
        try:
            check_gpus(SETTINGS.engine)
            served = await asyncio.to_thread(
                find_served, PARAMS.model_card.name, SETTINGS.versions.follow_pipeline
            )
            _process.running = await start(SETTINGS, load_model, listens_beyond_loopback(), initial=served)
        except (InputError, StoreUnavailable) as error:
            logger.error("the service cannot start\n%s", error)
            terminate_server()
            return
        stop_loading_on_sigterm(_process.running.handler.pool)
        logger.info("serving %s", served)
        if not _process.running.handler.access.needs_keys():
            logger.warning(
                "no API key is needed: only processes of user %d and root are answered (for others: %s)",
                os.geteuid(),
                ADD_KEY,
            )

    @bentoml.on_shutdown
    async def stop(self) -> None:
        """Finish pending work and close everything."""
        running, _process.running = _process.running, None
        if running is not None:
            await stop(running)

    async def __is_alive__(self) -> bool:
        """Return False once the champion's engine has failed and could not be started again."""
        return _process.running is None or not _process.running.handler.pool.is_dead()

    async def __is_ready__(self) -> bool:
        """Return whether requests can be answered now."""
        if _process.running is None:
            return False
        problem = _process.running.handler.find_problem()
        if problem != _process.problem:
            logger.info("not ready: %s", problem) if problem else logger.info("ready")
            _process.problem = problem
        return problem is None

    @bentoml.api(route="/ask")
    async def ask(
        self,
        ctx: bentoml.Context,
        question: Annotated[str, Field(min_length=1, description="the user's message")],
        max_tokens: Annotated[int, Field(ge=1)] = SETTINGS.answers.default_max_tokens,
        user: Annotated[str, Field(max_length=256)] | None = None,
    ) -> Answer:
        """Answer one question under the model's own system prompt, and report whether the answer is valid."""
        request_id = get_request_id(ctx.request)
        try:
            handler, caller = get_handler(), ctx.request.state.caller  # by AskCheck
            request = GenerationRequest(
                request_id=request_id,
                route="/ask",
                messages=(Message("user", question),),
                sampling=Sampling(max_tokens=min(max_tokens, SETTINGS.answers.max_tokens)),
                caller=caller,
                user=user,
            )
            route = handler.pool.route(request.model, request.assignment_key)
            async with aclosing(handler.generate(request, route)) as stream:
                deltas = [delta async for delta in stream]
        except ApiError as error:
            ctx.response.status_code = error.status  # BentoML returns responses unchanged, but for the status
            return cast(Answer, make_error_response(error, request_id))
        return build_answer(request, deltas, route.model.files)


def build_answer(request: GenerationRequest, deltas: list[Delta], files: ModelFiles) -> Answer:
    """Return the response of the native endpoint."""
    last, text = deltas[-1], "".join(delta.text for delta in deltas)
    assert last.usage is not None
    return Answer(
        request_id=request.request_id,
        text=text,
        parsed=_parse_json(text) if make_task(files.about["task"]).answers_are_json else None,
        valid=last.valid,
        model=files.name,
        version=files.version,
        finish_reason=last.finish_reason or "stop",
        prompt_tokens=last.usage.prompt_tokens,
        completion_tokens=last.usage.completion_tokens,
        mean_logprob=last.mean_logprob,
    )


def _parse_json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None


def check_key(scope: Scope) -> None:
    """Reject a request without the key that it needs, before its body is read.

    Raises:
        ApiError: the service is starting, the key is not valid, or the rate limit is exceeded.
    """
    request = Request(scope)
    address = request.client.host if request.client else ""
    get_handler().access.check_key(request.headers.get("authorization"), address)


def needs_own_user() -> bool:
    """Return whether only the user who runs the service may ask: as long as no key is needed."""
    return _process.running is not None and not _process.running.handler.access.needs_keys()


_MIDDLEWARE: tuple[tuple[type, dict[str, Any]], ...] = (  # the outermost first
    (RequestIds, {}),
    (
        SameOrigin,
        {
            "hosts": SETTINGS.access.hosts,
            "is_public": cache(listens_beyond_loopback),
            "setting": "services.access.hosts",
        },
    ),
    (OwnUser, {"is_needed": needs_own_user, "fix": f"{ADD_KEY}; requests with a key are answered"}),
    (
        BodyLimit,
        {
            "max_bytes": SETTINGS.guard.max_body_bytes,
            "timeout_s": SETTINGS.body_timeout_s,
            "check_key": check_key,
        },
    ),
    (Deadline, {"timeout_s": SETTINGS.request_timeout_s, "stall_s": SETTINGS.body_timeout_s}),
    (
        ConcurrencyLimit,
        {"paths": LIMITED_PATHS, "limit": SETTINGS.engine.max_running + SETTINGS.engine.max_waiting},
    ),
    (AskCheck, {"get_caller": get_caller}),
)
for _middleware, _options in _MIDDLEWARE:
    cast(Any, Generation).add_asgi_middleware(_middleware, **_options)
