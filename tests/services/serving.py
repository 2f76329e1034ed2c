"""The whole service around a tiny model, reached by HTTP: real engine, real store, real sockets."""

import asyncio
import json
import ssl
import threading
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import httpx
import uvicorn
from fastapi import Request
from uvicorn.loops.auto import auto_loop_factory

from services.api.bodies import BodyLimit
from services.api.heads import make_protocol
from services.api.middleware import ConcurrencyLimit, Deadline, RequestIds
from services.api.routes import LIMITED_PATHS, make_app
from services.engines.paged.engine import PagedEngine
from services.engines.transformers import TransformersEngine
from services.model_pool import LoadedModel
from services.startup import start, stop
from services.versions.aliases import Aliases, write_aliases
from services.versions.store import ModelFiles
from stages.common.model.loading import load_tokenizer
from stages.common.params.loading import load_params
from tests.tiny import save_model

ROOT = Path(__file__).resolve().parents[2]
ADDRESS = "127.0.0.1"
# Nothing here speaks TLS, and to read the machine's certificates takes longer than most requests.
NO_CERTIFICATES = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)


def settings(folder: Path, **changes):
    """Return the settings of params.yaml with a store in `folder`, changed as `guard={"max_messages": 3}`.

    A number of the section itself is changed as `body_timeout_s=0.5`.
    """
    services = load_params(ROOT / "params.yaml").services
    own = {
        "events": {"url": f"sqlite:///{folder / 'events.db'}"},
        "access": {"keys_file": str(folder / "keys.json")},
        "answers": {"default_max_tokens": 16},
    }
    numbers = {key: value for key, value in changes.items() if not isinstance(value, dict)}
    services = services.model_copy(update=numbers)
    for section in {**own, **changes}.keys() - numbers.keys():
        values = {**own.get(section, {}), **changes.get(section, {})}
        values = {"schema_" if key == "schema" else key: value for key, value in values.items()}
        services = services.model_copy(update={section: getattr(services, section).model_copy(update=values)})
    return services


def tiny_files(folder: Path, version: str = "a" * 12, seed: int = 0, **about) -> ModelFiles:
    """Save a tiny model and return it as a version's files."""
    # Untied and with large weights: a tiny tied model repeats one token.
    save_model(folder, seed, tie_word_embeddings=False, initializer_range=0.5)
    told = {
        "name": "tiny",
        "version": version,
        "system_prompt": None,
        "answer_schema": None,
        "task": {"kind": "text", "label_key": None, "labels": None},
    }
    return ModelFiles(
        "tiny",
        version,
        folder,
        None,
        folder,
        None,
        {**told, "base_model": "tiny", **about},
    )


def load_tiny(files: ModelFiles) -> LoadedModel:
    """Load a tiny version exactly, in one thread."""
    tokenizer = load_tokenizer(files.tokenizer)
    engine = TransformersEngine(
        files.base, None, tokenizer, device="cpu", precision="float32", max_running=8, threads=1
    )
    return LoadedModel(files, tokenizer, engine)


def paged_files(folder: Path) -> ModelFiles:
    """Save a tiny model also as GGUF, for the engine that serves by default."""
    import torch

    from stages.common.gguf.model import write_gguf
    from stages.common.gguf.vocabulary import read_vocabulary
    from stages.common.model.loading import load_base

    files = tiny_files(folder)
    merges = (("a", "b"), ("t", "h"))  # GGUF holds no vocabulary without merges
    save_model(folder, merges=merges, tie_word_embeddings=False, initializer_range=0.5)
    model = load_base(folder, torch.float32, torch.device("cpu"))
    vocabulary = read_vocabulary(load_tokenizer(folder), model.config.vocab_size)
    write_gguf(folder / "model.gguf", model, vocabulary, "f16", "tiny")
    return replace(files, gguf=folder / "model.gguf")


def load_paged(files: ModelFiles) -> LoadedModel:
    """Load a tiny version into the engine that serves by default."""
    tokenizer = load_tokenizer(files.tokenizer)
    engine = PagedEngine(files.gguf, tokenizer, kv_cache_mib=16, max_running=8, threads=1)
    return LoadedModel(files, tokenizer, engine)


def load_openvino(files: ModelFiles) -> LoadedModel:
    """Load a tiny version into the engine for architectures that the paged engine does not know."""
    from services.engines.openvino import OpenvinoEngine

    tokenizer = load_tokenizer(files.tokenizer)
    config = files.gguf.parent / "config.json"
    engine = OpenvinoEngine(files.gguf, config, tokenizer, kv_cache_mib=16, max_running=8, threads=1)
    return LoadedModel(files, tokenizer, engine)


@dataclass
class Server:
    """A running service: where it is, and what is inside."""

    url: str
    handler: object
    aliases: Path
    loop: asyncio.AbstractEventLoop

    def client(self, **options) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=60.0, verify=NO_CERTIFICATES, **options)

    def run(self, coroutine):
        """Run something in the service's own loop."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(60)


@contextmanager
def serving(folder: Path, *versions: ModelFiles, load=load_tiny, keys_required=False, **changes):
    """Serve the versions, the first of them as champion, until the block ends."""
    by_tag = {files.tag: files for files in versions}
    chosen = settings(folder, **changes)
    aliases = folder / "aliases.json"
    write_aliases(aliases, Aliases(versions[0].tag))
    ready, over, state = threading.Event(), threading.Event(), {}

    async def run() -> None:
        running = await start(chosen, lambda tag: load(by_tag[tag]), keys_required, aliases)
        state.update(running=running, loop=asyncio.get_running_loop())

        async def caller(request: Request):
            address = request.client.host
            return running.handler.access.admit(request.headers.get("authorization"), address)

        app = wrap(make_app(lambda: running.handler, caller), chosen, running.handler.access)
        http = make_protocol(chosen.body_timeout_s)
        config = uvicorn.Config(app, ADDRESS, 0, log_level="warning", lifespan="off", ws="none", http=http)
        server = uvicorn.Server(config)
        serve = asyncio.create_task(server.serve())
        while not (server.started and running.handler.find_problem() is None):
            if serve.done():
                raise RuntimeError("the server ended before it was ready")
            await asyncio.sleep(0.01)
        state["port"] = server.servers[0].sockets[0].getsockname()[1]
        ready.set()
        await asyncio.to_thread(over.wait)
        server.should_exit = True
        await serve
        await stop(running)

    def target() -> None:
        try:
            with asyncio.Runner(loop_factory=auto_loop_factory()) as runner:  # the real service's loop
                runner.run(run())
        except BaseException as error:
            state["error"] = error
            ready.set()

    thread = threading.Thread(target=target, daemon=True)
    thread.start()
    assert ready.wait(60), "the service is not ready after a minute"
    try:
        if "error" in state:
            raise state["error"]
        yield Server(f"http://{ADDRESS}:{state['port']}", state["running"].handler, aliases, state["loop"])
    finally:
        over.set()
        thread.join(60)
    assert "error" not in state, state.get("error")


@contextmanager
def serving_unbroken(folder: Path, files: ModelFiles, **answers):
    """Serve a version by the default engine, for random input; check that the engine never starts again."""
    guard = {"max_schema_cpu_s": 0.3}
    with serving(folder, files, load=load_paged, answers=answers, guard=guard) as running:
        engine = running.handler.pool.champion.engine
        yield running
        assert running.handler.pool.champion.engine is engine, "the engine was started again"
        assert engine.broken is None


def wrap(app, settings, access):
    """Return the application in the middleware that the service has."""

    def check_key(scope):
        request = Request(scope)
        access.check_key(request.headers.get("authorization"), request.client.host)

    limit = settings.engine.max_running + settings.engine.max_waiting
    app = ConcurrencyLimit(app, LIMITED_PATHS, limit)
    app = Deadline(app, settings.request_timeout_s, settings.body_timeout_s)
    return RequestIds(BodyLimit(app, settings.guard.max_body_bytes, settings.body_timeout_s, check_key))


def ask(client: httpx.Client, content: str = "Hello", **fields):
    """Ask one question and return the response."""
    body = {"messages": [{"role": "user", "content": content}], **fields}
    return client.post("/v1/chat/completions", json=body)


def stream(client: httpx.Client, path: str, **fields) -> list[dict]:
    """Stream an answer and return its chunks."""
    with client.stream("POST", path, json={"stream": True, **fields}) as response:
        assert response.status_code == 200, response.read()
        lines = [line for line in response.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
