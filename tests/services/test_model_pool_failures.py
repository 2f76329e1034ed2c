"""Versions that cannot be loaded, and engines that die: what of the pool goes on, and when it tries again."""

import asyncio

import pytest

from services.engines.protocol import EngineError
from services.errors import ApiError
from services.load_failures import MAX_ATTEMPTS, LoadFailures
from services.model_pool import ModelPool
from services.versions.aliases import Aliases, Challenger, write_aliases
from tests.services.serving import ask, load_tiny, serving, tiny_files


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


class Machine:
    """Loads tiny versions, except those that `errors` has something to raise for."""

    def __init__(self, folder, *names):
        self.files = {f"tiny:{name * 12}": tiny_files(folder / name, name * 12) for name in names}
        self.errors = {}
        self.tried, self.loaded = [], []
        self.clock = Clock()
        self.aliases = folder / "aliases.json"
        self.pool = ModelPool(self.load, path=self.aliases, _failures=LoadFailures(self.clock))

    def load(self, tag):
        self.tried.append(tag)
        if tag in self.errors:
            raise self.errors[tag]
        self.loaded.append(load_tiny(self.files[tag]))
        return self.loaded[-1]

    async def sync(self, seconds):
        """Let the pool follow for this long, by the clock of its pauses."""
        for _ in range(seconds):
            await self.pool.sync()
            self.clock.now += 1


@pytest.fixture
def machine(tmp_path):
    made = Machine(tmp_path, "a", "b")
    yield made
    made.pool.close()


A, B = "tiny:" + "a" * 12, "tiny:" + "b" * 12


@pytest.mark.parametrize(
    "error", [RuntimeError("CUDA out of memory"), EngineError("no"), ValueError(), KeyError("x")]
)
def test_a_challenger_that_cannot_be_loaded_leaves_the_champion_answering(machine, error):
    machine.errors[B] = error
    write_aliases(machine.aliases, Aliases(A, Challenger(B, 1.0, "canary")))
    asyncio.run(machine.sync(300))
    pool = machine.pool
    assert pool.find_problem() is None and not pool.is_dead()
    assert pool.route(None, "anyone").model.files.tag == A
    with pytest.raises(ApiError) as refused:
        pool.route(B, "anyone")
    assert refused.value.status == 503 and f"{B} is not served" in refused.value.message
    assert machine.tried == [A] + [B] * MAX_ATTEMPTS, "each attempt costs the champion memory and time"


def test_a_changed_file_gives_a_challenger_new_attempts(machine):
    machine.errors[B] = RuntimeError("CUDA out of memory")
    write_aliases(machine.aliases, Aliases(A, Challenger(B, 1.0, "canary")))
    asyncio.run(machine.sync(100))
    del machine.errors[B]
    write_aliases(machine.aliases, Aliases(A, Challenger(B, 1.0, "canary")))
    asyncio.run(machine.sync(1))
    assert machine.pool.route(None, "anyone").model.files.tag == B


def test_a_champion_that_cannot_be_loaded_is_told_and_tried_after_growing_pauses(machine):
    machine.errors[A] = RuntimeError("Engine core initialization failed\nmore")
    write_aliases(machine.aliases, Aliases(A))
    asyncio.run(machine.sync(150))
    assert machine.tried == [A] * 8  # after 0, 1, 3, 7, 15, 31, 63 and 123 s
    problem = machine.pool.find_problem()
    assert "Engine core initialization failed (failure 8 in a row" in problem and "60 s" in problem
    with pytest.raises(ApiError, match="initialization failed"):
        machine.pool.route(None, "anyone")
    del machine.errors[A]
    asyncio.run(machine.sync(60))
    assert machine.pool.find_problem() is None


def test_a_new_champion_that_cannot_be_loaded_leaves_the_old_one(machine):
    write_aliases(machine.aliases, Aliases(A))
    asyncio.run(machine.sync(1))
    machine.errors[B] = RuntimeError("CUDA out of memory")
    write_aliases(machine.aliases, Aliases(B, history=(A,)))
    asyncio.run(machine.sync(5))
    assert machine.pool.route(None, "anyone").model.files.tag == A
    assert machine.pool.find_problem() is None
    del machine.errors[B]
    asyncio.run(machine.sync(5))
    assert machine.pool.route(None, "anyone").model.files.tag == B


def test_a_load_that_ends_a_shared_engine_is_not_tried_again(machine):
    def end_both(tag):
        machine.tried.append(tag)
        if tag == B:
            machine.loaded[-1].engine._broken = "the shared process has ended"
            raise EngineError("the shared process has ended")
        machine.loaded.append(load_tiny(machine.files[tag]))
        return machine.loaded[-1]

    machine.pool.load = end_both
    write_aliases(machine.aliases, Aliases(A, Challenger(B, 1.0, "canary")))
    asyncio.run(machine.sync(300))
    assert machine.tried == [A, B, A]
    assert machine.pool.find_problem() is None
    assert machine.pool.route(None, "anyone").model.files.tag == A


def test_users_of_a_challenger_whose_engine_died_get_the_champion(machine):
    write_aliases(machine.aliases, Aliases(A, Challenger(B, 1.0, "canary")))
    asyncio.run(machine.sync(1))
    assert machine.pool.route(None, "anyone").role == "challenger"
    machine.pool.get_models()["challenger"].engine._broken = "it died"
    assert machine.pool.route(None, "anyone").role == "champion"


def test_an_engine_that_does_not_come_back_is_dead(machine):
    write_aliases(machine.aliases, Aliases(A))
    asyncio.run(machine.sync(1))
    machine.errors[A] = EngineError("the GPU is lost")
    machine.loaded[-1].engine._broken = "it died"
    asyncio.run(machine.sync(10))
    assert "the GPU is lost" in machine.pool.find_problem()
    assert not machine.pool.is_dead(), "it may come back"
    asyncio.run(machine.sync(60))
    assert machine.pool.is_dead()
    del machine.errors[A]
    asyncio.run(machine.sync(60))
    assert not machine.pool.is_dead() and machine.pool.find_problem() is None


def test_a_stopping_service_starts_no_engine(machine):
    write_aliases(machine.aliases, Aliases(A))
    asyncio.run(machine.sync(1))
    machine.loaded[-1].engine._broken = "SIGTERM reached it"
    machine.pool.stopping = True
    asyncio.run(machine.sync(100))
    assert machine.tried == [A]


def test_a_model_that_gives_no_answer_is_closed(machine):
    def broken(running):
        raise RuntimeError("out of luck")

    def load(tag):
        machine.loaded.append(load_tiny(machine.files[tag]))
        machine.loaded[-1].engine._advance = broken
        return machine.loaded[-1]

    machine.pool.load = load
    write_aliases(machine.aliases, Aliases(A))
    asyncio.run(machine.sync(1))
    (model,) = machine.loaded
    assert model.engine._closed
    assert machine.pool.find_problem() is not None


def test_a_service_answers_while_its_challenger_fails(tmp_path):
    first, second = (tiny_files(tmp_path / name, name * 12) for name in "ab")

    def load(files):
        if files is second:
            raise RuntimeError("CUDA out of memory")
        return load_tiny(files)

    with serving(tmp_path, first, second, load=load) as server, server.client() as client:
        write_aliases(server.aliases, Aliases(first.tag, Challenger(second.tag, 1.0, "canary")))
        while "CUDA out of memory" not in (answer := ask(client, max_tokens=1, model=second.tag)).text:
            assert answer.status_code in (404, 503), answer.text  # not known yet, or loading
        assert answer.status_code == 503
        assert ask(client, max_tokens=1, user="anyone").json()["system_fingerprint"] == first.version
