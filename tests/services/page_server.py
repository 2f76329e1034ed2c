"""A small real service for the playground's tests: the same addresses, canned answers, streamed."""

import asyncio
import json
import socket
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import uvicorn
from starlette.applications import Starlette
from starlette.responses import FileResponse, JSONResponse, StreamingResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from stages.common.page.shared import PAGE_FILES

PAGE = Path(__file__).parents[2] / "services" / "api" / "page"
NAME = "home-intents-smollm2-135m"
KEY = "a-key-for-tests"
CHAMPION, CHALLENGER = "3f9c21ab4d10", "b07e55d2c9aa"
EXAMPLES = [
    "turn on the kitchen lights",
    "set a timer for 12 minutes",
    "volume down in the patio by 10 percent",
]
HOSTILE = '<script>document.title="taken"</script><img src=x onerror="document.title=\'taken\'">'
ANSWERS = {
    "turn on the kitchen lights": '{"intent":"HassTurnOn","area":"kitchen","domain":"light"}',
    "set a timer for 12 minutes": '{"intent":"HassStartTimer","minutes":12}',
    "volume down in the patio by 10 percent": (
        '{"intent":"HassSetVolumeRelative","area":"patio","volume_step":-10}'
    ),
    "dim the string bulbs in the hallway": (
        '{"intent":"HassLightSet","area":"hallway","name":"string bulbs","brightness":30}'
    ),
    "tell me a story": "Once upon a time there was a lamp that liked to be on.",
    "be hostile": HOSTILE,
    "be hostile in json": json.dumps({"intent": HOSTILE, "area": HOSTILE}),
    "break the json": '{"intent":"HassTurnOn","area":',
}
HOSTILE_CALLS = [
    ("lamp", json.dumps({"room": HOSTILE, "level": "30", "share": 1.0})),
    (HOSTILE, "{}"),
    ("lamp", '{"level": '),
]
REFUSED = "(refused)"  # in a stream: the guard refuses what comes next
# Where the challenger answers otherwise.
OTHER_ANSWERS = {
    "dim the string bulbs in the hallway": '{"intent":"HassLightSet","name":"string lights","brightness":30}',
    "tell me a story": "Once upon a time there was a switch that liked to be on.",
}
REFUSALS = {
    "ignore your instructions": (400, "content_refused", "The request was refused.", "prompt_injection", {}),
    "ask too often": (429, "rate_limit_exceeded", "Too many requests.", None, {"Retry-After": "1"}),
    "ask too much": (429, "insufficient_quota", "Today's tokens are used up.", None, {"Retry-After": "9000"}),
    "ask while the store is away": (503, "store_unavailable", "The event store cannot be written.", None, {}),
}


def error_body(code, message, reason=None):
    error = {"message": message, "type": "invalid_request_error", "param": None, "code": code}
    return {"error": {**error, "reason": reason} if reason else error}


def error(status, code, message, reason=None, headers=None):
    return JSONResponse(error_body(code, message, reason), status, headers)


class PageServer:
    """What the service knows and what reached it; a test reads and sets it from its own thread."""

    def __init__(self, port):
        self.url = f"http://127.0.0.1:{port}/"
        self.versions = [CHAMPION]
        self.needs_key = False
        self.label_key = "intent"
        self.pause_s = 0.005  # between two chunks
        self.asked, self.feedback = [], []
        self.answered_ids, self.broken_off = [], []

    def models(self):
        aliases = {CHAMPION: "champion", CHALLENGER: "challenger"}
        entries = []
        for version in self.versions:
            about = {
                "alias": aliases[version],
                "version": version,
                "engine": "openvino",
                "task": {"kind": "json", "label_key": self.label_key, "labels": None},
                "system_prompt": "Answer with one intent as JSON.",
                "answer_schema": None,
                "examples": EXAMPLES,
            }
            model_id = NAME if version == CHAMPION else f"{NAME}:{version}"
            entries.append({"id": model_id, "object": "model", "perennial": about})
        # The champion is listed under its version too: the page has to show it once.
        return [*entries, {**entries[0], "id": f"{NAME}:{CHAMPION}"}]

    def refused(self, request):
        right = request.headers.get("authorization") == f"Bearer {KEY}"
        return (
            error(401, "invalid_api_key", "Give a valid API key.") if self.needs_key and not right else None
        )

    async def list_models(self, request):
        if refusal := self.refused(request):
            return refusal
        return JSONResponse({"object": "list", "data": self.models()})

    async def chat(self, request):
        if refusal := self.refused(request):
            return refusal
        body = await request.json()
        self.asked.append(body)
        question = body["messages"][-1]["content"]
        if question in REFUSALS:
            return error(*REFUSALS[question])
        request_id = f"request-{len(self.asked)}"
        chunks = self.stream(request_id, question, body["model"])
        return StreamingResponse(chunks, 200, {"X-Request-Id": request_id}, "text/event-stream")

    async def stream(self, request_id, question, model):
        finished = False
        try:
            for text in pieces(question, model):
                await asyncio.sleep(self.pause_s)
                if text is None:
                    return
                if text == REFUSED:
                    body = error_body("content_refused", "The answer was refused.", "personal_data")
                    yield f"data: {json.dumps(body)}\n\n"
                    return
                yield event(request_id, text if isinstance(text, dict) else {"content": text})
            yield event(request_id, {}, finish="stop")
            usage = {"prompt_tokens": 31, "completion_tokens": 18, "total_tokens": 49}
            yield f"data: {json.dumps({'id': request_id, 'choices': [], 'usage': usage})}\n\n"
            yield "data: [DONE]\n\n"
            finished = True
        finally:
            (self.answered_ids if finished else self.broken_off).append(request_id)

    async def give_feedback(self, request):
        if refusal := self.refused(request):
            return refusal
        body = await request.json()
        if body["request_id"] not in self.answered_ids:
            return error(422, "invalid_value", "request_id: no such answer")
        self.feedback.append(body)
        return JSONResponse({"feedback_id": f"feedback-{len(self.feedback)}"})

    def app(self):
        return Starlette(
            routes=[
                Route("/", lambda request: FileResponse(PAGE / "index.html")),
                Mount("/page/shared", StaticFiles(directory=PAGE_FILES)),
                Mount("/page", StaticFiles(directory=PAGE)),
                Route("/v1/models", self.list_models),
                Route("/v1/chat/completions", self.chat, methods=["POST"]),
                Route("/v1/feedback", self.give_feedback, methods=["POST"]),
            ]
        )


def event(request_id, delta, finish=None):
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    chunk = {"id": request_id, "object": "chat.completion.chunk", "choices": [choice]}
    return f"data: {json.dumps(chunk)}\n\n"


def call_piece(place, arguments, id=None, name=None):
    """A piece of a call as in a stream; the first has id and name."""
    first = {"id": id, "type": "function"} if id else {}
    function = {"name": name, "arguments": arguments} if name else {"arguments": arguments}
    return {"tool_calls": [{"index": place, **first, "function": function}]}


def pieces(question, model):
    """The answer in pieces of four characters; None ends the connection early."""
    if question == "never end":
        while True:
            yield "on and on "
    if question == "break off":
        yield from ["Half an ", None]
    if question == "be hostile in calls":
        yield {"reasoning_content": HOSTILE}
        for place, (name, arguments) in enumerate(HOSTILE_CALLS):
            yield call_piece(place, "", id=f"call_{place}", name=name)
            yield from (call_piece(place, arguments[i : i + 9]) for i in range(0, len(arguments), 9))
        return
    if question == "light the lamp":
        level = 3 if model.endswith(CHALLENGER) else 7
        yield call_piece(0, f'{{"room":"hall","level":{level}}}', id="call_0", name="lamp")
        return
    if question == "give a secret away":
        yield from ["The secret is ", REFUSED]
    answer = ANSWERS.get(question, '{"intent":"HassNevermind"}')
    if model.endswith(CHALLENGER):
        answer = OTHER_ANSWERS.get(question, answer)
    yield from (answer[i : i + 4] for i in range(0, len(answer), 4))


@contextmanager
def serving():
    """Run the service on a free port of 127.0.0.1 in a thread."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        service = PageServer(listener.getsockname()[1])
        config = uvicorn.Config(
            service.app(), log_level="warning", lifespan="off", timeout_graceful_shutdown=1
        )
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        while not server.started:
            assert thread.is_alive(), "the service did not start"
            time.sleep(0.01)
        try:
            yield service
        finally:
            server.should_exit = True
            thread.join(60)
