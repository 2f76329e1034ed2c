"""The service: `bentoml serve services.generation:Generation`, or `make serve`.

Everything it does is set under `services` in params.yaml. It serves the newest model of the pipeline.
"""

from __future__ import annotations

import asyncio
import logging
import sys
from contextlib import aclosing
from typing import Annotated, Any, cast

import bentoml
import psutil
from fastapi import Request
from pydantic import Field

from services import errors
from services.answering import Answerer, Part, Question, new_request_id
from services.api.middleware import BodyLimit, Crowd, listens_beyond_loopback
from services.api.routes import error_response, make_app
from services.api.schemas import Answer
from services.engines.protocol import Sampling
from services.engines.select import check_gpus, load_engine
from services.errors import ApiError
from services.events import StoreUnavailable
from services.keys.access import Caller
from services.model_pool import Served
from services.startup import Running, start, stop
from services.versions.__main__ import ModelFiles, newest_as_champion, stored
from stages.common.errors import InputError
from stages.common.logs import set_quiet_environment
from stages.common.models import load_tokenizer
from stages.common.params.loading import load_params
from stages.common.records import Message

set_quiet_environment()
# The engine's thread wants the interpreter back for a moment after every step; Python's 5 ms of patience
# with the thread that has it are a third of a step.
sys.setswitchinterval(0.0005)
SETTINGS = load_params().services

logger = logging.getLogger("services.generation")


class _Process:
    """What runs in this process; its routes find it here."""

    running: Running | None = None
    problem: str | None = None  # why it was not ready when it was last asked


_process = _Process()


def load_served(tag: str) -> Served:
    """Load a stored version: its tokenizer, and the engine that suits the machine."""
    files = stored(tag)
    tokenizer = load_tokenizer(files.tokenizer)
    return Served(files, tokenizer, load_engine(files, tokenizer, SETTINGS.engine))


def end_server() -> None:
    """End BentoML's parent process, which would start this one again and again to the same error."""
    parent = psutil.Process().parent()
    if parent is not None and "bentoml" in " ".join(parent.cmdline()):
        parent.terminate()


def get_answerer() -> Answerer:
    """Return what answers in this process.

    Raises:
        ApiError: the service is still starting, or ending.
    """
    if _process.running is None:
        raise errors.not_ready("it is starting")
    return _process.running.answerer


async def get_caller(request: Request) -> Caller:
    """Return who sends a request.

    Raises:
        ApiError: they may not, or too often.
    """
    address = request.client.host if request.client else ""
    return get_answerer().access.admit(request.headers.get("authorization"), address)


@bentoml.service(
    name="perennial",
    workers=1,  # one engine fills the machine; a second would halve its batches and double its memory
    traffic={"timeout": SETTINGS.request_timeout_s},
    resources={"gpu": SETTINGS.engine.gpus} if SETTINGS.engine.gpus else {},
    http={"host": SETTINGS.host, "port": SETTINGS.port},
    # Neither spans nor log lines for what the event store keeps in full: for each piece of a stream they
    # cost as much as writing it.
    tracing={"excluded_urls": "/v1/.*"},
    logging={"access": {"enabled": False}},
)
@bentoml.asgi_app(make_app(get_answerer, get_caller), path="/")
class Generation:
    """Answers with the champion, and keeps every exchange."""

    @bentoml.on_startup
    async def start(self) -> None:
        """Name the champion and begin to load it: alive at once, and ready when it answers."""
        try:
            check_gpus(SETTINGS.engine)
            champion = await asyncio.to_thread(newest_as_champion, SETTINGS.versions.follow_pipeline)
            _process.running = await start(SETTINGS, load_served, listens_beyond_loopback())
        except (InputError, StoreUnavailable) as error:
            logger.error("the service cannot start\n%s", error)
            end_server()
            return
        logger.info("the champion is %s", champion)

    @bentoml.on_shutdown
    async def stop(self) -> None:
        """Let what is running end, and close what is open."""
        running, _process.running = _process.running, None
        if running is not None:
            await stop(running)

    async def __is_ready__(self) -> bool:
        """Return whether a request would be answered now."""
        if _process.running is None:
            return False
        problem = _process.running.answerer.health()
        if problem != _process.problem:
            logger.info("not ready: %s", problem) if problem else logger.info("ready")
            _process.problem = problem
        return problem is None

    @bentoml.api(route="/ask")
    async def ask(
        self,
        ctx: bentoml.Context,
        question: Annotated[str, Field(min_length=1, description="what the user says")],
        max_tokens: Annotated[int, Field(ge=1)] = SETTINGS.answers.default_max_tokens,
        user: Annotated[str, Field(max_length=256)] | None = None,
    ) -> Answer:
        """Answer one question with the model's own system prompt, and say whether the answer is valid."""
        request_id = new_request_id()
        try:
            answerer, caller = get_answerer(), await get_caller(ctx.request)
            asked = Question(
                request_id=request_id,
                route="/ask",
                messages=(Message("user", question),),
                sampling=Sampling(max_tokens=min(max_tokens, SETTINGS.answers.max_tokens)),
                caller=caller,
                user=user,
            )
            choice = answerer.fleet.pick(asked.model, asked.asker)
            async with aclosing(answerer.answer(asked, choice)) as parts:
                gathered = [part async for part in parts]
        except ApiError as error:
            ctx.response.status_code = error.status  # BentoML passes responses on, but for their status
            return cast(Answer, error_response(error, request_id))
        return native_answer(asked, gathered, choice.served.files)


def native_answer(asked: Question, parts: list[Part], files: ModelFiles) -> Answer:
    """Return the pieces of an answer as the native endpoint gives it."""
    last, text = parts[-1], "".join(part.text for part in parts)
    assert last.usage is not None
    return Answer(
        request_id=asked.request_id,
        text=text,
        parsed=_parsed(text) if files.about["answer_format"] == "json" else None,
        valid=last.valid,
        model=files.name,
        version=files.version,
        finish_reason=last.finish_reason or "stop",
        prompt_tokens=last.usage.prompt_tokens,
        completion_tokens=last.usage.completion_tokens,
        mean_logprob=last.mean_logprob,
    )


def _parsed(text: str) -> Any:
    import json

    try:
        return json.loads(text)
    except ValueError:
        return None


_ANSWERING = ("/v1/chat/completions", "/v1/completions", "/ask")
_AT_ONCE = SETTINGS.engine.max_running + SETTINGS.engine.max_waiting
cast(Any, Generation).add_asgi_middleware(Crowd, paths=_ANSWERING, limit=_AT_ONCE)
cast(Any, Generation).add_asgi_middleware(BodyLimit, max_bytes=SETTINGS.guard.max_body_bytes)
