"""Log lines, progress and exit codes of a stage, and the environment of its process."""

from __future__ import annotations

import errno
import logging
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from typing import NoReturn

from stages.common.artifacts import find_missing
from stages.common.errors import InputError

# Nothing phones home from a training machine. Set before the libraries are imported.
QUIET_ENVIRONMENT = {
    "DO_NOT_TRACK": "1",
    "BENTOML_DO_NOT_TRACK": "True",
    "FLWR_TELEMETRY_ENABLED": "0",
    "GX_ANALYTICS_ENABLED": "false",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "RAY_USAGE_STATS_ENABLED": "0",
    "TOKENIZERS_PARALLELISM": "false",
}

# What libraries import wherever it is installed, though nothing here uses it: peft bitsandbytes, and with it
# torch's compiler, a fifth of what finetune imports; transformers' trainer datasets, and with it pandas, a
# tenth. Only the method qlora, which shows bitsandbytes, and development install them.
HIDDEN_PACKAGES = ("bitsandbytes", "datasets")

KERNELS_KEPT = 128  # of oneDNN: a training step has some fifty products, each length of a batch its own

PROGRESS_INTERVAL_S = 1.0
ROWS_A_STEP = 500  # from one report of progress to the next, where a row takes little time

MORE_MEMORY = (
    "end other programs that take memory, choose a smaller base model, or use a machine with more memory"
)
# CUDA, Metal, cuBLAS, and torch's allocator on a CPU.
FULL_MEMORY = re.compile(
    r"out of memory|CUBLAS_STATUS_ALLOC_FAILED|(can't|cannot) allocate memory|not enough memory",
    re.IGNORECASE,
)


def get_logger(stage: str) -> logging.Logger:
    """Return the logger of a stage; its name is the stage's."""
    return logging.getLogger(stage)


def set_quiet_environment() -> None:
    """Switch off telemetry of every library we use, unless the user has set it."""
    for name, value in QUIET_ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def hide_packages() -> None:
    """Let no library of this process find `HIDDEN_PACKAGES`, as where they are not installed.

    None in place of a module is Python's own mark of one that cannot be found: an import raises
    ModuleNotFoundError, and `find_spec` returns None (Python's reference, 5.3.1, "The module cache").
    """
    for name in HIDDEN_PACKAGES:
        sys.modules.setdefault(name, None)  # type: ignore[arg-type]


def show_packages(names: Sequence[str] = HIDDEN_PACKAGES) -> None:
    """Let this process find hidden packages again; before a library looks for them, for some remember."""
    for name in names:
        if name in sys.modules and sys.modules[name] is None:
            del sys.modules[name]


def run_stage(main: Callable[[], None], when_memory_is_full: str = MORE_MEMORY) -> NoReturn:
    """Run a stage's `main` and exit: 0 done, 1 bad input, 2 bad parameters, else a traceback.

    A user's mistake gets its message and no traceback; full disks and memories are a user's matter too, as is
    a stage that is run before those whose files it reads.

    Args:
        when_memory_is_full: what the user can lower.
    """
    configure_process()
    try:
        main()
    except Exception as error:
        known = explain_failure(error, when_memory_is_full)
        if known is None:
            raise
        _leave(f"error: {known}", known.exit_code)
    sys.exit(0)


def configure_process() -> None:
    """Set the environment and the logs of a stage's process, before it imports libraries."""
    set_quiet_environment()
    hide_packages()
    # How long a thread of torch spins before it sleeps. The default is for a machine of one's own: next to
    # a service on the same cores a training was three times slower with it, and alone no faster.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    # By default oneDNN keeps the code of 1,024 products, and torch that of 1,024, too (LRU_CACHE_CAPACITY).
    # With rows of many lengths both are a gigabyte. Without torch's, a step is a third slower.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(KERNELS_KEPT))
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s", stream=sys.stderr)
    logging.captureWarnings(True)
    for noisy in ("httpx", "urllib3", "filelock", "great_expectations", "matplotlib", "py.warnings"):
        logging.getLogger(noisy).setLevel(logging.ERROR)


def explain_failure(error: Exception, when_memory_is_full: str = MORE_MEMORY) -> InputError | None:
    """Return an error that the user can fix, with the fix; None for any other.

    Besides bad input these are a missing file of an earlier stage, a full memory and a full disk.
    """
    if isinstance(error, InputError):
        return error
    if isinstance(error, FileNotFoundError) and (absent := find_missing(error)):
        return absent
    if is_full_memory(error):
        message = str(error).strip() or type(error).__name__
        return InputError(f"the memory is full: {message.splitlines()[0]}", when_memory_is_full)
    if not _is_full_disk(error):
        return None
    where = f" while writing {error.filename}" if isinstance(error, OSError) and error.filename else ""
    return InputError(
        f"the disk is full{where}",
        "free some space and run again; finished stages and checkpoints are kept",
    )


def is_full_memory(error: Exception) -> bool:
    """Return whether a GPU or the machine has no memory left; torch reports it in several ways."""
    if isinstance(error, MemoryError):
        return True
    return isinstance(error, RuntimeError) and FULL_MEMORY.search(str(error)) is not None


def _is_full_disk(error: Exception) -> bool:
    """Return whether the disk is full; libraries in Rust (safetensors) report it only as text."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return "os error 28" in str(error)


def _leave(message: str, code: int) -> NoReturn:
    sys.stderr.write(message + "\n")
    sys.stderr.flush()
    sys.exit(code)


class _Progress:
    """The bar on a terminal, or the time of the last progress line: one per process."""

    bar: object | None = None
    last_line_at: float = -PROGRESS_INTERVAL_S


def show_count(logger: logging.Logger, done: int, what: str) -> None:
    """Log how much is done where no one knows of how much: at most one line a second."""
    now = time.monotonic()
    if now - _Progress.last_line_at >= PROGRESS_INTERVAL_S:
        _Progress.last_line_at = now
        logger.info("%s %s", f"{done:,}", what)


def show_progress(logger: logging.Logger, done: int, total: int, note: str = "") -> None:
    """Show that `done` of `total` steps are finished.

    A terminal gets a bar. Elsewhere a line `progress 120/400 note` is logged, at most one a
    second and always the last one; the training flow reads these lines. A logger that shows no such lines, as
    that of one of several processes that train together, gets no bar either.
    """
    if not logger.isEnabledFor(logging.INFO):
        return
    if sys.stderr.isatty():
        _draw_bar(logger.name, done, total, note)
        return
    now = time.monotonic()
    if done < total and now - _Progress.last_line_at < PROGRESS_INTERVAL_S:
        return
    _Progress.last_line_at = now
    logger.info("progress %d/%d %s", done, total, note)


def _draw_bar(name: str, done: int, total: int, note: str) -> None:
    from tqdm import tqdm

    bar = _Progress.bar
    if not isinstance(bar, tqdm) or bar.total != total or done < bar.n:
        bar = tqdm(total=total, desc=name, file=sys.stderr, dynamic_ncols=True, initial=0)
        _Progress.bar = bar
    bar.set_postfix_str(note, refresh=False)
    bar.update(done - bar.n)
    if done >= total:
        bar.close()
        _Progress.bar = None
