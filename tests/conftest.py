"""What every test process needs, set before anything reads it, and which worker runs which file when."""

import gc
import os
import signal
import time
from pathlib import Path

import pytest

# One thread a process: the test models are tiny, and waiting threads slow a busy machine down.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A job in the background of a script ignores Ctrl-C, and so would every program that a test ends by it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

STARTED = time.monotonic()
TESTS = Path(__file__).parent
# Files that share what takes long to make run in one worker.
TOGETHER = {
    "one Prefect server": (
        "flows/training/test_training.py",
        "flows/training/test_task_params.py",
        "flows/training/test_dvc_locks.py",
        "flows/common/test_prefect_api.py",
        "flows/common/test_notifications.py",
        "flows/watch/test_watch_run.py",
        "flows/test_deployments.py",
        "flows/sweep/test_sweep_run.py",
    ),
    "the packaged conversations": (
        "stages/common/sources/home_tools/test_collect.py",
        "stages/common/sources/home_tools/test_home.py",
        "stages/evaluate/test_simulation.py",
    ),
}
# What takes longest begins first: the last file keeps one worker while the others have ended.
LONGEST = (
    "flows/retrain/test_retrain_loop.py",
    *TOGETHER["one Prefect server"],
    "test_first_hour.py",
    *TOGETHER["the packaged conversations"],
)


def pytest_addoption(parser):
    parser.addoption(
        "--minutes",
        type=float,
        help="begin no test after so many minutes; those left are skipped, and counted",
    )


def pytest_runtest_setup(item):
    """Skip what is left once the minutes of `--minutes` are over; each worker has a clock of its own."""
    limit = item.config.getoption("--minutes")
    if limit is not None and time.monotonic() - STARTED >= limit * 60:
        pytest.skip(f"not begun after {limit:g} minutes")


def pytest_configure(config):
    """Have pytest-xdist keep the order of the files; its own begins with those of the most tests."""
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Give a worker whole files, as `--dist loadfile` does, and those of `TOGETHER` at once."""
    if config.getvalue("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    groups = {f"tests/{file}": name for name, files in TOGETHER.items() for file in files}

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid):
            file = super()._split_scope(nodeid)
            return groups.get(file, file)

    return Scheduling(config, log)


def pytest_collection_modifyitems(items):
    """Put the tests of the longest files first, then those of stages: a slow machine skips the last."""
    ranks = {TESTS / name: rank for rank, name in enumerate(LONGEST)}
    stages = TESTS / "stages"
    items.sort(key=lambda item: ranks.get(item.path, len(ranks) + (stages not in item.path.parents)))


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """Collect no garbage while everything is imported, and leave it out of later collections.

    Each whole one would take half a second, and a training asks for several.
    """
    gc.disable()
    try:
        return (yield)
    finally:
        gc.collect()
        gc.freeze()
        gc.set_threshold(10_000)
        gc.enable()
