"""vLLM's CPU build, in the environment of `make test-vllm`."""

import asyncio
import os
import threading

import pytest

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # the machine may have other work


@pytest.fixture(scope="module")
def run():
    """Return a function that runs a coroutine, all in one event loop: a vLLM belongs to one."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    yield lambda work: asyncio.run_coroutine_threadsafe(work, loop).result(600)
    loop.call_soon_threadsafe(loop.stop)
    thread.join(10)
