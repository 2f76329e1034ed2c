"""Ask a model the validation questions in a process of its own, which shows how much memory it takes."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from statistics import median

from services.engines.offline import ModelAnswers, ModelFolders, ask_model, load_asker, prepare_asking
from stages.common.artifacts import artifacts
from stages.common.errors import InputError
from stages.common.machine.memory import read_peak_memory
from stages.common.machine.parent import end_with_parent
from stages.common.model.generation import EvalPrompt
from stages.common.params.stages import AskBase
from stages.common.records import read_rows

SPEED_ROWS = 32  # as many as answer together in a busy service
ROUNDS = 3  # of which the median counts


@dataclass(frozen=True, slots=True)
class Asked:
    """A model's answers, and what they took.

    Attributes:
        peak_bytes: the most memory of the process, Python and its libraries included.
        alone_tokens_per_s: of requests one after the other, without a reference as draft.
        together_tokens_per_s: of `SPEED_ROWS` requests at once.
    """

    found: ModelAnswers
    peak_bytes: int
    alone_tokens_per_s: float
    together_tokens_per_s: float


def ask_in_process(name: str, gguf: Path, asked: Path, limit: int, settings: AskBase) -> Asked:
    """Return what a model answers to some rows, by the paged engine in a process of its own.

    Args:
        name: of the model, for an error.
        gguf: beside its tokenizer.
        asked: file of the rows.
        limit: of the base model's answers (`prepare_asking`).

    Raises:
        InputError: the process was ended, mostly because memory ran out.
    """
    context = get_context("spawn")
    with ProcessPoolExecutor(1, context, initializer=end_with_parent, initargs=(os.getpid(),)) as pool:
        try:
            return pool.submit(_ask, gguf, asked, limit, settings).result()
        except BrokenProcessPool:
            raise InputError(
                f"the process that asked {name} was ended from outside, mostly because memory ran out",
                "end what else runs, or take it out of compress.variants",
            ) from None


def _ask(gguf: Path, asked: Path, limit: int, settings: AskBase) -> Asked:
    own = prepare_asking(gguf.parent, read_rows(asked), limit, settings.max_new_tokens)
    questions, dtype = own.questions, settings.dtype
    model = ModelFolders(artifacts("fetch_base"), artifacts("finetune"), gguf)
    found = ask_model(model, "paged", own.tokenizer, questions, 1, own.limit, dtype)
    peak = read_peak_memory()
    some = list(questions[:: max(1, len(questions) // SPEED_ROWS)])[:SPEED_ROWS]
    ask = load_asker(model, "paged", own.tokenizer, 1, own.limit, dtype)

    def measure(batches: Sequence[Sequence[EvalPrompt]]) -> float:
        start = time.perf_counter()
        tokens = sum(answer.tokens + answer.complete for batch in batches for answer in ask(batch))
        return tokens / (time.perf_counter() - start)

    ask(some)  # compiles the kernels of its sizes
    together = median(measure([some]) for _ in range(ROUNDS))
    alone = median(measure([[question] for question in some]) for _ in range(ROUNDS))
    return Asked(found, peak, alone, together)
