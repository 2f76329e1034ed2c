"""The Bento service with vLLM against vLLM's own server, a change of version and two versions under load.

    python -m benchmarks.gpu.serving [--tiny] [--seconds 2] [--result FILE]

Both serve one random model with an adapter over HTTP to the same closed-loop clients, in turns, each with a
part of the GPU and with the same settings of vLLM; random weights do not end their answers, so all are of one
length. The service starts while the bare server still compiles, and each figure is written as soon as it is
there. Without vLLM the tiny run measures the service alone, with the engine `transformers`.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import inspect
import json
import os
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu.models import ROOT, make_config, make_model, make_tokenizer
from benchmarks.gpu.part import CannotRun, Note, need_gpu, run_part
from services.engines.vllm import VllmEngine, pick_rank
from stages.common.params.loading import load_params

ARCHITECTURE = "qwen3-4b"
CLIENTS = (1, 8, 64)
WORDS = 32_000
ROUNDS = 2
CHANGE_WITHIN_S, TINY_CHANGE_WITHIN_S = 30.0, 240.0  # of the versions that are served
SETTINGS = {
    "max_running: 32 #": "max_running: 64 #",
    "default_max_tokens: 256 #": "default_max_tokens: 128 #",
}
SHARE = 0.42  # of the GPU's memory for each of the two
VLLM_SETTINGS = {
    "kind: auto #": "kind: vllm #",
    "gpus: 0 #": "gpus: 1 #",
    "gpu_memory: 0.9 #": f"gpu_memory: {SHARE} #",
}
TINY_SETTINGS = {"context_tokens: 2048 #": "context_tokens: 512 #", "keep_loaded: 2 #": "keep_loaded: 3 #"}
PLACED = "KV cache size"  # in vLLM's log, once it has taken its part of the memory
Figures = dict[str, Any]


def measure(options: argparse.Namespace, note: Note) -> Figures:
    """Measure one after the other, and return all figures."""
    if options.store:
        return store(options.store)
    device = need_gpu(options.tiny)
    with_vllm = importlib.util.find_spec("vllm") is not None
    if not with_vllm and not options.tiny:
        raise CannotRun("vLLM is not installed in the environment that serves (PYTHON_VLLM, .venv-gpu)")
    if importlib.util.find_spec("bentoml") is None:
        raise CannotRun("BentoML is not installed in the environment that serves")
    os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")  # as the service has it: no nvcc
    if with_vllm and device.type != "cuda":
        one_gpu = str(ROOT / "tests" / "vllm" / "one_gpu")  # the service takes vLLM for a GPU only
        os.environ["PYTHONPATH"] = os.pathsep.join([one_gpu, os.environ.get("PYTHONPATH", "")])
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        return asyncio.run(_measure(Path(name), options, with_vllm, note))


async def _measure(folder: Path, options: argparse.Namespace, with_vllm: bool, note: Note) -> Figures:
    from benchmarks.serving_peers import NotStarted, Served, Workspace, free_port, start_service, until_ready

    place = Workspace(ROOT, folder)
    lay_out(folder, options.tiny, with_vllm)
    tokens = 16 if options.tiny else 128
    seconds = 1.0 if options.tiny else options.seconds
    clients = (1, 4) if options.tiny else CLIENTS
    found: Figures = {"engine": "vllm" if with_vllm else "transformers", "answer_tokens": tokens}
    served: dict[str, Served] = {}
    children = []
    try:
        bare = start_bare(place, free_port()) if with_vllm else None
        children += [bare.child] if bare else []
        output = await asyncio.to_thread(place.python, "benchmarks.gpu.serving", "--store", str(folder))
        tags = json.loads(output)["tags"]
        if bare:
            await until_placed(bare)
        port = free_port()
        children.append(start_service(place, port))
        ours = Served("ours", children[-1], port, make_requests(port, tokens))
        found["ready_s"] = round(await until_ready(ours.child, port, "/readyz"), 1)
        try:
            if bare:
                found["bare_ready_s"] = round(await until_ready(bare.child, bare.port, "/health"), 1)
                served["bare"] = Served(
                    "vllm", bare.child, bare.port, make_requests(bare.port, tokens, model="tuned")
                )
            else:
                found["bare"] = "not measured, as vLLM is not installed here"
        except NotStarted as error:
            found["bare"] = str(error)
        served["ours"] = ours
        note(found)
        found["throughput"] = {}
        for count in clients:
            found["throughput"][str(count)] = await compare(served, count, seconds, tokens)
            note(found)
        within_s = TINY_CHANGE_WITHIN_S if options.tiny else CHANGE_WITHIN_S
        found["swap"] = await swap(ours, folder, tags, clients[1], within_s)
        note(found)
        found["two_versions"] = await ask_two(ours, folder, tags, clients[1], tokens, seconds, within_s)
    finally:
        await asyncio.gather(*(asyncio.to_thread(child.end) for child in children))
    return found


@dataclass(frozen=True, slots=True)
class Starting:
    """vLLM's own server, before it is ready."""

    child: Any
    port: int


def start_bare(place: Any, port: int) -> Starting:
    """Start vLLM's own server."""
    from benchmarks.serving_peers import start

    return Starting(start(place, "vllm", vllm_command(place.folder, port)), port)


async def until_placed(bare: Starting) -> None:
    """Wait until the bare server has taken its memory, has ended, or is ready.

    vLLM measures what is free before it takes its part, so the two must not do that at the same time. What
    follows, the capture of graphs, takes little.
    """
    from benchmarks.serving_peers import START_WITHIN_S

    until = bare.child.started + START_WITHIN_S
    while time.monotonic() < until and bare.child.process.poll() is None:
        if PLACED in bare.child.log.read_text(encoding="utf-8", errors="replace"):
            return
        await asyncio.sleep(0.2)


def lay_out(folder: Path, tiny: bool, with_vllm: bool) -> None:
    """Write a model, two adapters, and the parameters, as the pipeline leaves them."""
    import torch

    from stages.common.artifacts import write_json

    text = (ROOT / "params.yaml").read_text(encoding="utf-8")
    engine = VLLM_SETTINGS if with_vllm else {"kind: auto #": "kind: transformers #"}
    for old, new in {**SETTINGS, **engine, **(TINY_SETTINGS if tiny else {})}.items():
        if text.count(old) != 1:
            raise RuntimeError(f"params.yaml has {text.count(old)} lines with {old!r}; there must be one")
        text = text.replace(old, new)
    (folder / "params.yaml").write_text(text, encoding="utf-8")
    words = 512 if tiny else WORDS
    config = make_config(
        ARCHITECTURE, tiny, vocab_size=words, initializer_range=0.1, tie_word_embeddings=False
    )
    cuda = torch.cuda.is_available()
    model = make_model(config, torch.bfloat16 if cuda else torch.float32, "cuda" if cuda else "cpu")
    artifacts = folder / "artifacts"
    model.save_pretrained(artifacts / "fetch_base")
    tokenizer, second = make_tokenizer(words), folder / "second" / "artifacts"
    tokenizer.save_pretrained(artifacts / "fetch_base")
    for place in (artifacts, second):
        for part in (tokenizer, config):
            part.save_pretrained(place / "export")
    write_adapters(model, [artifacts / "finetune", second / "finetune"])
    del model
    if cuda:
        torch.cuda.empty_cache()
    (second / "fetch_base").symlink_to(artifacts / "fetch_base")
    for place, version in ((artifacts, "a" * 12), (second, "b" * 12)):
        write_json(
            place / "export" / "serving.json",
            {
                "name": "random",
                "version": version,
                "base_model": "random",
                "system_prompt": None,
                "task": {"kind": "text", "label_key": None, "labels": None},
                "answer_schema": None,
                "adapter_sha256": "",
                "context_tokens": 512 if tiny else 2048,
            },
        )


def write_adapters(model: Any, folders: Sequence[Path]) -> None:
    """Write adapters with different random weights."""
    import torch
    from peft import LoraConfig, get_peft_model

    tuned = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
    for folder in folders:
        for name, weights in tuned.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weights, std=0.02)
        tuned.save_pretrained(folder)


def store(folder: Path) -> Figures:
    """Put both versions into the store of this workspace, and return their tags."""
    from services.versions.store import add_pipeline_output

    return {"tags": [add_pipeline_output(folder), add_pipeline_output(folder / "second")]}


def vllm_command(folder: Path, port: int) -> list[str]:
    """Return the command of vLLM's own server, with the settings that the service gives its engine.

    They are read from where the service has them: the folder's params.yaml, and the engine's defaults.
    """
    engine = load_params(folder / "params.yaml").services.engine
    adapter = folder / "artifacts" / "finetune"
    most = inspect.signature(VllmEngine).parameters["max_adapters"].default
    return [
        *(str(Path(sys.executable).with_name("vllm")), "serve", str(folder / "artifacts" / "fetch_base")),
        *("--host", "127.0.0.1", "--port", str(port)),
        *("--gpu-memory-utilization", str(engine.gpu_memory)),
        *("--max-model-len", str(engine.context_tokens), "--max-num-seqs", str(engine.max_running)),
        *("--enable-prefix-caching", "--disable-log-stats", "--disable-uvicorn-access-log"),
        *("--enable-lora", "--max-loras", str(most), "--max-lora-rank", str(pick_rank(adapter))),
        *("--lora-modules", f"tuned={adapter}"),
    ]


def make_requests(port: int, tokens: int, **more: Any) -> list[bytes]:
    """Return the bytes of streamed requests of different questions and users."""
    from benchmarks.serving_load import chat_request

    common = {"max_tokens": tokens, "temperature": 0, "stream": True, **more}
    return [
        chat_request(
            port,
            {
                "messages": [{"role": "user", "content": f"question {number}: " + "what is it? " * 12}],
                "user": f"user-{number}",
                **common,
            },
        )
        for number in range(256)
    ]


async def compare(served: dict[str, Any], clients: int, seconds: float, tokens: int) -> Figures:
    """Measure all in turns."""
    runs: dict[str, list[Figures]] = {name: [] for name in served}
    for number in range(ROUNDS):
        for name, one in served.items():
            run = await one.turn(clients, 37 * number, seconds, clients)
            runs[name].append(read_run(run, tokens))
    own: Figures = {
        name: {key: statistics.median(one[key] for one in some) for key in some[0]}
        for name, some in runs.items()
    }
    if "bare" in own:
        own["ratio"] = round(own["ours"]["tokens_per_second"] / own["bare"]["tokens_per_second"], 3)
    return own


def read_run(run: Any, tokens: int) -> Figures:
    """Return speed, waiting time and failures of a turn."""
    good = [answer for answer in run.answers if answer.ok]
    if not good:
        raise RuntimeError(f"no request was answered: {[a.error or a.status for a in run.answers][:3]}")
    last = max(answer.ended for answer in good)
    return {
        "tokens_per_second": round(tokens * len(good) / (last - run.started), 1),
        "first_text_s": round(statistics.median(a.first - a.sent for a in good if a.first is not None), 4),
        "failed": len(run.answers) - len(good),
        "shorter": sum(answer.finish_reason != "length" for answer in good),
    }


async def swap(ours: Any, folder: Path, tags: Sequence[str], clients: int, within_s: float) -> Figures:
    """Make the second version the champion while clients ask."""
    from benchmarks.serving_load import load
    from benchmarks.serving_peers import about
    from services.versions.aliases import ALIASES, Aliases, write_aliases

    write_aliases(folder / ALIASES, Aliases(tags[0]))
    stop = asyncio.Event()
    loading = asyncio.create_task(load(ours.port, ours.requests, clients, count_up(), 300.0, stop=stop))
    await asyncio.sleep(1.0)
    begun = time.monotonic()
    write_aliases(folder / ALIASES, Aliases(tags[1], history=(tags[0],)))
    version = tags[1].split(":")[1]
    until = begun + within_s
    while (now := (await about(ours.port)).get("version")) != version and time.monotonic() < until:
        await asyncio.sleep(0.1)
    await asyncio.sleep(1.0)
    stop.set()
    run = await loading
    news = [a.first - begun for a in run.answers if a.ok and a.version and version in a.version and a.first]
    return {
        "swapped": now == version,
        "answers": len(run.answers),
        "failed": sum(not answer.ok for answer in run.answers),
        "first_answer_of_the_new_s": round(min(news), 2) if news else None,
    }


async def ask_two(
    ours: Any, folder: Path, tags: Sequence[str], clients: int, tokens: int, seconds: float, within_s: float
) -> Figures:
    """Let two versions answer half of the users each."""
    from benchmarks.serving_load import get, load
    from services.versions.aliases import ALIASES, Aliases, Challenger, write_aliases

    write_aliases(folder / ALIASES, Aliases(tags[1], Challenger(tags[0], 0.5, "canary", time.time())))
    until = time.monotonic() + within_s
    while time.monotonic() < until:
        _, body = await get(ours.port, "/v1/models")
        if b"challenger" in body:
            break
        await asyncio.sleep(0.1)
    run = await load(ours.port, ours.requests, clients, count_up(), seconds, 4 * clients)
    shares = Counter(str(answer.version) for answer in run.answers if answer.ok)
    return {**read_run(run, tokens), "answers_by_version": dict(sorted(shares.items()))}


def count_up() -> Iterator[int]:
    """Return the numbers of rows, from 0 on."""
    from benchmarks.serving_children import from_row

    return from_row(0)


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seconds", type=float, default=2.0, help="of a turn")
    parser.add_argument("--store", type=Path, help=argparse.SUPPRESS)


if __name__ == "__main__":
    run_part(__doc__, measure, _add_arguments)
