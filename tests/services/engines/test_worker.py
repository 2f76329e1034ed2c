"""The thread itself, with engines that count."""

import asyncio
import threading

import pytest

from services.engines.protocol import EngineError, Load, Sampling, Step
from services.engines.worker import Worker


class Counting(Worker):
    """Writes 1, 2, 3, ... to each request."""

    name = "counting"

    def __init__(self, fails_at=None, **settings):
        super().__init__(context_tokens=10**9, max_waiting=100, end_ids=[0], **settings)
        self.fails_at = fails_at
        self.steps = 0
        self.left = []
        self.gate = threading.Event()
        self.gate.set()
        self._start()

    def _enter(self, request):
        if request.prompt == [1013]:
            raise ZeroDivisionError("no thirteen")
        request.state = 0

    def _leave(self, request):
        self.left.append(request.prompt[0])

    def _advance(self, running):
        self.gate.wait()
        self.steps += 1
        if self.steps == self.fails_at:
            raise RuntimeError("out of memory")
        outcomes = []
        for request in running:
            if request.prompt == [1014] and request.state == 3:
                outcomes.append((request, EngineError("three is enough")))
                continue
            request.state += 1
            reason = "length" if request.state == request.max_tokens else None
            outcomes.append((request, Step((request.state,), reason)))
        return outcomes


async def count(engine, number, limit):
    return [token async for step in engine.generate([number], Sampling(limit)) for token in step.token_ids]


def test_each_request_gets_its_own_tokens_in_order():
    engine = Counting(max_running=3)

    async def ask():
        return await asyncio.gather(*(count(engine, n, n) for n in range(1, 20)))

    assert asyncio.run(ask()) == [list(range(1, n + 1)) for n in range(1, 20)]
    engine.close()


def test_no_more_run_than_may():
    engine = Counting(max_running=2)
    engine.gate.clear()

    async def ask():
        tasks = [asyncio.create_task(count(engine, n, 3)) for n in range(5)]
        while engine.load() != Load(3, 2):
            await asyncio.sleep(0.001)
        engine.gate.set()
        await asyncio.gather(*tasks)

    asyncio.run(ask())
    assert engine.load() == Load(0, 0)
    engine.close()


def test_a_step_that_fails_ends_all_and_the_engine_says_why():
    engine = Counting(max_running=2, fails_at=3)

    async def ask():
        ended = await asyncio.gather(*(count(engine, n, 50) for n in range(4)), return_exceptions=True)
        assert all(isinstance(one, EngineError) for one in ended)
        with pytest.raises(EngineError, match="out of memory"):
            await count(engine, 1, 1)

    asyncio.run(ask())
    assert "out of memory" in engine.broken
    engine.close()


def test_what_fails_for_one_request_ends_that_request_alone():
    engine = Counting(max_running=3)

    async def ask():
        return await asyncio.gather(*(count(engine, n, 5) for n in range(1010, 1018)), return_exceptions=True)

    answers = asyncio.run(ask())
    assert [n for n, one in enumerate(answers, 1010) if one != [1, 2, 3, 4, 5]] == [1013, 1014]
    assert all(isinstance(one, EngineError) for one in answers[3:5])
    assert "no thirteen" in str(answers[3]) and "three is enough" in str(answers[4])
    assert (engine.broken, engine.load(), engine.left) == (None, Load(0, 0), [])
    engine.close()


def test_an_aborted_request_leaves_before_the_next_step():
    engine = Counting(max_running=2)

    async def ask():
        steps = engine.generate([7], Sampling(10**8))
        await anext(steps)
        engine.gate.clear()
        await steps.aclose()
        before = engine.steps
        engine.gate.set()
        while engine.load() != Load(0, 0) or not engine.left:
            await asyncio.sleep(0.001)
        return engine.steps - before

    assert asyncio.run(ask()) <= 2  # the one that was being computed, and the one in which it leaves
    assert engine.left == [7]
    engine.close()


async def until_running(engine):
    while not engine.load().running:
        await asyncio.sleep(0.001)


def test_a_loop_that_is_gone_harms_no_caller():
    engine = Counting(max_running=2)
    engine.gate.clear()
    loop = asyncio.new_event_loop()
    steps = engine.generate([1], Sampling(10**8))
    task = loop.create_task(anext(steps))
    loop.run_until_complete(until_running(engine))
    task.cancel()
    loop.run_until_complete(asyncio.gather(task, return_exceptions=True))
    loop.close()
    engine.gate.set()
    assert asyncio.run(count(engine, 2, 3)) == [1, 2, 3]
    engine.close()


def test_a_closed_engine_can_be_closed_again():
    engine = Counting(max_running=1)
    engine.close()
    engine.close()
    assert engine.broken
