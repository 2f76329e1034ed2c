"""Child processes of the serving benchmark: peers' servers, and engines without a server.

    python -m benchmarks.serving_children transformers --port 8000
    python -m benchmarks.serving_children llama --port 8000 --gguf model.gguf
    python -m benchmarks.serving_children engine --kind openvino
    python -m benchmarks.serving_children ctranslate2 --merged FOLDER
    python -m benchmarks.serving_children quantize --type q8_0 --gguf model.gguf
    python -m benchmarks.serving_children second-version

Started by `benchmarks.serving` in a folder with the pipeline's `artifacts` and `params.yaml`. Servers end
when their standard input is closed. Engines read one turn per line there (JSON)
and write its answers as one line.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import json
import os
import random
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Sequence
from contextlib import aclosing
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO, cast

from benchmarks.serving_load import Answer, Run, closed_loop
from stages.common.artifacts import artifacts, read_json, reports, write_json
from stages.common.chat.template import encode_prompt, end_of_turn_ids
from stages.common.logs import set_quiet_environment
from stages.common.model.loading import load_tokenizer, load_tuned
from stages.common.params.loading import load_params
from stages.common.records import Row, read_rows

LLAMA_SLOTS = 32
LLAMA_SLOT_TOKENS = 512
SEED = 7  # of the rows' order


def rows_in_order() -> list[Row]:
    """Return the test rows in the order in which every contender gets them."""
    rows = list(read_rows(artifacts("split") / "test.parquet"))
    random.Random(SEED).shuffle(rows)
    return rows


def answer_limit() -> int:
    """Return the maximum length of an answer in the stage evaluate, in tokens."""
    return int(read_json(reports("evaluate") / "metrics.json")["answer_limit_tokens"])


def tuned_model() -> Any:
    """Return the tuned model, merged, in the data type of the saved base model."""
    import torch

    config = read_json(artifacts("fetch_base") / "config.json")
    dtype = getattr(torch, config.get("dtype") or config.get("torch_dtype") or "float32")
    return load_tuned(artifacts("fetch_base"), artifacts("finetune"), dtype, torch.device("cpu"))


def serve_transformers(options: argparse.Namespace) -> None:
    """Serve `model.generate` in the usual simple way: one request after the other, streamed."""
    import uvicorn
    from fastapi import FastAPI
    from fastapi.responses import StreamingResponse
    from transformers import TextIteratorStreamer

    tokenizer, model, lock = load_tokenizer(artifacts("fetch_base")), tuned_model(), threading.Lock()
    app = FastAPI()

    def write(body: dict[str, Any]) -> Iterator[str]:
        with lock:
            inputs = tokenizer.apply_chat_template(
                body["messages"], add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
            streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
            wanted = {"max_new_tokens": body["max_tokens"], "do_sample": False, "streamer": streamer}
            thread = threading.Thread(target=model.generate, kwargs={**inputs, **wanted})
            thread.start()
            for text in streamer:
                if text:
                    yield f"data: {json.dumps({'choices': [{'delta': {'content': text}}]})}\n\n"
            thread.join()
        yield "data: [DONE]\n\n"

    @app.get("/health")
    def health() -> dict[str, bool]:
        return {"ready": True}

    @app.post("/v1/chat/completions")
    def chat(body: dict[str, Any]) -> StreamingResponse:
        return StreamingResponse(write(body), media_type="text/event-stream")

    uvicorn.run(app, host="127.0.0.1", port=options.port, log_level="warning")


def serve_llama(options: argparse.Namespace) -> None:
    """Serve a GGUF with llama.cpp's own server, with a slot for each of 32 clients."""
    llama = importlib.import_module("xllamacpp")
    params = llama.CommonParams()
    params.model.path = str(options.gguf)
    params.hostnames = ["127.0.0.1"]
    params.port = options.port
    params.n_parallel = LLAMA_SLOTS
    params.n_ctx = LLAMA_SLOTS * LLAMA_SLOT_TOKENS
    params.n_threads_http = LLAMA_SLOTS + 4  # a thread each: httplib keeps one for every connection
    for cpu in (params.cpuparams, params.cpuparams_batch):
        cpu.n_threads = os.cpu_count() or 1
        cpu.poll = 0  # threads that spin while they wait would slow down whoever has the next turn
    server = llama.Server(params)
    print(server.listening_address, file=sys.stderr)
    threading.Event().wait()


Turn = Callable[[dict[str, Any]], Awaitable[Run[Answer]]]


async def take_turns(turn: Turn, wire: TextIO, about: dict[str, Any]) -> None:
    """Report that the engine is ready, then read turns from standard input until it ends."""
    wire.write(json.dumps(about) + "\n")
    wire.flush()
    while line := await asyncio.to_thread(sys.stdin.readline):
        run: Run[Answer] = await turn(json.loads(line))
        wire.write(json.dumps(asdict(run)) + "\n")
        wire.flush()


def own_wire() -> TextIO:
    """Return standard output for our own use; output of libraries goes to standard error."""
    wire = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return wire


def from_row(first: int) -> Iterator[int]:
    """Count from a row on; callers take the count modulo the number of rows."""
    while True:
        yield first
        first += 1


def run_engine(options: argparse.Namespace) -> None:
    """Use our engine in this process, without a server."""
    asyncio.run(_run_engine(options.kind))


async def _run_engine(kind: str) -> None:
    from services.engines.protocol import Sampling, Step
    from services.engines.select import load_engine
    from services.versions.store import add_pipeline_output, get_version

    wire = own_wire()
    files = get_version(add_pipeline_output())
    settings = load_params().services.engine
    tokenizer = load_tokenizer(files.tokenizer)
    chosen = settings if kind == "auto" else settings.model_copy(update={"kind": kind})
    engine = load_engine(files, tokenizer, chosen)
    rows, limit = rows_in_order(), answer_limit()
    prompts = [encode_prompt(tokenizer, row.prompt) for row in rows]

    async def ask(_: int, row: int) -> tuple[int, float, float | None, float, list[int]]:
        sent, first, ids = time.monotonic(), None, list[int]()
        steps = engine.generate(prompts[row % len(prompts)], Sampling(max_tokens=limit))
        async with aclosing(cast(AsyncGenerator[Step], steps)):
            async for step in steps:
                if first is None and step.token_ids:
                    first = time.monotonic()
                ids += step.token_ids
        return row, sent, first, time.monotonic(), ids

    async def turn(wanted: dict[str, Any]) -> Run[Answer]:
        rows_from = from_row(wanted["first"])
        run = await closed_loop(ask, wanted["clients"], rows_from, wanted["seconds"], wanted["at_least"])
        answers = [
            Answer(row, 200, sent, first, ended, tokenizer.decode(ids, skip_special_tokens=True))
            for row, sent, first, ended, ids in run.answers
        ]
        return Run(run.clients, run.started, run.stopped, run.cpu_s, answers)

    try:
        await take_turns(turn, wire, {"engine": engine.name})
    finally:
        engine.close()


def run_ctranslate2(options: argparse.Namespace) -> None:
    """Use CTranslate2 in int8, in static batches: a batch begins when the last one is complete."""
    wire = own_wire()
    ctranslate2 = importlib.import_module("ctranslate2")
    converters = importlib.import_module("ctranslate2.converters")
    tokenizer = load_tokenizer(artifacts("fetch_base"))
    with tempfile.TemporaryDirectory(dir=options.work) as folder:
        merged, converted = Path(folder) / "merged", Path(folder) / "converted"
        tuned_model().save_pretrained(merged)
        tokenizer.save_pretrained(merged)
        converters.TransformersConverter(str(merged)).convert(str(converted))
        generator = ctranslate2.Generator(
            str(converted), device="cpu", compute_type="int8", intra_threads=os.cpu_count() or 1
        )
    prompts = [
        tokenizer.convert_ids_to_tokens(encode_prompt(tokenizer, row.prompt)) for row in rows_in_order()
    ]
    ends, limit = end_of_turn_ids(tokenizer), answer_limit()

    def batch(first: int, size: int) -> list[Answer]:
        sent, numbers = time.monotonic(), range(first, first + size)
        results = generator.generate_batch(
            [prompts[row % len(prompts)] for row in numbers],
            max_length=limit,
            sampling_topk=1,
            end_token=ends,
            include_prompt_in_result=False,
        )
        ended = time.monotonic()
        texts = [tokenizer.decode(result.sequences_ids[0], skip_special_tokens=True) for result in results]
        return [Answer(row, 200, sent, ended, ended, text) for row, text in zip(numbers, texts, strict=True)]

    async def turn(wanted: dict[str, Any]) -> Run[Answer]:
        return in_batches(batch, wanted)

    asyncio.run(take_turns(turn, wire, {"engine": "ctranslate2"}))


def in_batches(batch: Callable[[int, int], Sequence[Answer]], wanted: dict[str, Any]) -> Run[Answer]:
    """Ask batch after batch for a given time."""
    answers: list[Answer] = []
    started, cpu = time.monotonic(), time.process_time()
    while time.monotonic() - started < wanted["seconds"] or len(answers) < wanted["at_least"]:
        answers += batch(wanted["first"] + len(answers), wanted["clients"])
    return Run(wanted["clients"], started, time.monotonic(), time.process_time() - cpu, answers)


def quantize(options: argparse.Namespace) -> None:
    """Write the tuned model as GGUF in another type of weights."""
    from stages.export.__main__ import export_gguf

    name = load_params().model_card.name
    export_gguf(artifacts("fetch_base"), artifacts("finetune"), [], options.type, name, options.gguf)


def second_version(options: argparse.Namespace) -> None:
    """Store the pipeline's model a second time under another version, and print both tags."""
    from services.versions.store import add_pipeline_output

    first = add_pipeline_output()
    root = options.work / "second"
    (root / "artifacts").mkdir(parents=True, exist_ok=True)
    for stage in ("fetch_base", "finetune"):
        (root / artifacts(stage)).unlink(missing_ok=True)
        (root / artifacts(stage)).symlink_to(artifacts(stage).resolve())
    shutil.copytree(artifacts("export"), root / artifacts("export"), dirs_exist_ok=True)
    about = read_json(artifacts("export") / "serving.json")
    write_json(root / artifacts("export") / "serving.json", about | {"version": about["version"][::-1]})
    print(json.dumps([first, add_pipeline_output(root)]))


def end_with_parent() -> None:
    """End this process when its parent is gone."""

    def wait() -> None:
        while sys.stdin.readline():
            pass
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()


def main() -> None:
    """Run the command that the arguments name."""
    set_quiet_environment()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("what", choices=sorted(_JOBS))
    parser.add_argument("--port", type=int)
    parser.add_argument("--gguf", type=Path)
    parser.add_argument("--type", default="q8_0")
    parser.add_argument("--kind", default="auto")
    parser.add_argument("--work", type=Path, default=Path(), help="a folder for what is written meanwhile")
    options = parser.parse_args()
    if options.port:
        end_with_parent()
    _JOBS[options.what](options)


_JOBS = {
    "transformers": serve_transformers,
    "llama": serve_llama,
    "engine": run_engine,
    "ctranslate2": run_ctranslate2,
    "quantize": quantize,
    "second-version": second_version,
}


if __name__ == "__main__":
    main()
