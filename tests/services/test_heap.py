"""What a full collection of garbage visits once the service has loaded its model."""

import gc
import os
import subprocess
import sys
import weakref

import pytest

from services.heap import settle_heap
from tests.services.serving import ROOT
from tests.services.tiny_checkout import make_checkout

SERVE = """
import gc
from importlib.util import find_spec
from types import SimpleNamespace
from bentoml._internal.server.base_app import BaseAppFactory
from services.generation import load_model
from services.versions.store import find_served

model = load_model(find_served("tiny", follow_pipeline=True))
print(len(gc.get_objects()), gc.get_freeze_count())
(limit,) = BaseAppFactory.middlewares.fget(SimpleNamespace(timeout=1.0, max_concurrency=None))
print(limit.cls(print, **limit.kwargs) is print, any(map(find_spec, ("bitsandbytes", "datasets"))))
"""


class Cycle:
    def __init__(self):
        self.own = self


@pytest.fixture(autouse=True)
def unfrozen():
    """Nothing is left out at the start of a test; afterwards all is, as `tests/conftest.py` has it."""
    gc.unfreeze()
    yield
    gc.freeze()


def test_a_full_collection_visits_only_what_came_later():
    before = len(gc.get_objects())
    settle_heap()
    assert len(gc.get_objects()) < 0.01 * before
    assert gc.get_freeze_count() > 0.5 * before


def test_garbage_in_cycles_goes_with_the_next_call():
    kept = Cycle()
    found = weakref.ref(kept)
    settle_heap()
    del kept
    gc.collect()
    assert found() is not None  # else the collection has visited it
    settle_heap()
    assert found() is None


@pytest.mark.slow
def test_a_loaded_model_is_left_out_no_timer_outlives_its_request_and_hidden_packages_stay(tmp_path):
    root = make_checkout(tmp_path)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "BENTOML_HOME": str(tmp_path / "bentoml")}
    done = subprocess.run(
        [sys.executable, "-c", SERVE], cwd=root, env=environment, capture_output=True, text=True, check=True
    )
    visited, left_out, without_timer, finds_hidden = done.stdout.split()[-4:]
    assert int(left_out) > 100_000
    assert int(visited) < 10_000
    assert without_timer == "True"  # BentoML's own middleware is left out
    assert finds_hidden == "False"  # what no service needs is not imported
