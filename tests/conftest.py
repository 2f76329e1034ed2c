"""What every test process needs, set before anything reads it, and which tests begin first."""

import os
import signal
from pathlib import Path

# One thread a process: the test models are tiny, and waiting threads slow a busy machine down.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A job in the background of a script ignores Ctrl-C, and so would every program that a test ends by it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

TESTS = Path(__file__).parent
# The files that take longest. They begin first: the last file of a run keeps one worker while the others wait.
LONGEST = (
    "flows/retrain/test_retrain_loop.py",
    "test_first_hour.py",
    "flows/training/test_training.py",
    "flows/test_deployments.py",
)


def pytest_configure(config):
    """Have pytest-xdist keep the order of the files; its own begins with those of the most tests."""
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False


def pytest_collection_modifyitems(items):
    """Put the tests of the longest files first."""
    ranks = {TESTS / name: rank for rank, name in enumerate(LONGEST)}
    items.sort(key=lambda item: ranks.get(item.path, len(ranks)))
