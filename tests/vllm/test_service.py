"""The whole service, as `bentoml serve` starts it, with the engine `vllm` on vLLM itself."""

import signal
import sqlite3
import threading
from pathlib import Path

import httpx
import psutil
import pytest

from tests.services.bento import serving_bento
from tests.vllm.models import SHAPE

pytest.importorskip("vllm", reason="vLLM has an environment of its own: make test-vllm")
pytestmark = [pytest.mark.slow, pytest.mark.vllm, pytest.mark.timeout(1200)]

CHANGES = {
    "kind: auto #": "kind: vllm #",
    "gpus: 0 #": "gpus: 1 #",
    "gpu_memory: 0.9 #": "gpu_memory: 0.1 #",
    "context_tokens: 2048 #": "context_tokens: 512 #",
}
ONE_GPU = Path(__file__).with_name("one_gpu")  # the service takes vLLM for a GPU only
CLIENTS = 4


def ask(url, seed, started):
    """Stream a long answer; return the reason for which it finished, and whether the stream was whole."""
    body = {
        "messages": [{"role": "user", "content": f"question {seed}"}],
        "max_tokens": 400,
        "temperature": 1.0,
        "seed": seed,
        "stream": True,
    }
    reason, whole = None, False
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=300) as response:
        assert response.status_code == 200
        for line in response.iter_lines():
            started.release()
            if line.startswith("data: {"):
                reason = httpx.Response(200, content=line[6:]).json()["choices"][0]["finish_reason"] or reason
            whole |= line == "data: [DONE]"
    return reason, whole


def test_answers_and_their_events_are_whole_after_sigterm(tmp_path):
    with serving_bento(tmp_path, CHANGES, 900, [ONE_GPU], **SHAPE) as (process, url, log):
        assert httpx.get(f"{url}/readyz").status_code == 200
        children = psutil.Process(process.pid).children(recursive=True)
        assert any("VLLM" in " ".join(child.cmdline() or [child.name()]) for child in children), children
        results, started = [], threading.Semaphore(0)
        clients = [
            threading.Thread(target=lambda seed=seed: results.append(ask(url, seed, started)))
            for seed in range(CLIENTS)
        ]
        for client in clients:
            client.start()
        for _ in range(CLIENTS):  # so many lines have come, and none of the answers has ended
            assert started.acquire(timeout=120)
        process.send_signal(signal.SIGTERM)
        for client in clients:
            client.join(300)
        assert len(results) == CLIENTS and all(
            reason in ("stop", "length") and whole for reason, whole in results
        ), (results, log.read_text()[-3000:])
        process.wait(120)
        _, alive = psutil.wait_procs(children, timeout=60)
        assert not alive
    with sqlite3.connect(tmp_path / ".perennial" / "events.db") as connection:
        stored = connection.execute("SELECT status, finish_reason FROM exchanges").fetchall()
    assert len(stored) == CLIENTS and all(status == 200 for status, _ in stored)
