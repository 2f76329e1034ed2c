"""Ask a model the test questions, with the engine that serves it where that computes the model on this CPU.

Elsewhere (on a GPU, for other architectures, without a GGUF) transformers writes the answers. Base and tuned
model are asked by the same engine; which one is part of the evidence.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from services.engines.support import EngineName
from stages.common.chat.calls import read_answer
from stages.common.chat.fitting import limit_answer
from stages.common.chat.template import end_of_turn_ids
from stages.common.errors import InputError
from stages.common.model.generation import (
    Answer,
    EvalPrompt,
    answer_questions,
    check_fit,
    encode_questions,
    measure_latencies,
)
from stages.common.model.loading import (
    load_base,
    load_tokenizer,
    load_tuned,
    pick_device,
    pick_dtype,
    read_position_limit,
)
from stages.common.model.virtual_tokens import count_virtual_tokens
from stages.common.records import Row
from stages.common.spool import view

if TYPE_CHECKING:
    from services.engines.paged.model import PagedModel
    from services.engines.paged.offline import Completion

# Asked one by one for the latency: enough for a median, and no more than a few seconds on a CPU.
LATENCY_ROWS = 10


KV_CACHE_MIB = 512  # some 20,000 tokens of the default model: more sequences than are computed together


@dataclass(frozen=True, slots=True)
class ModelFolders:
    """A base model alone, or with an adapter and the GGUF in which both are merged."""

    base: Path
    adapter: Path | None = None
    gguf: Path | None = None


@dataclass(frozen=True, slots=True)
class Asking:
    """Questions in the tokens of a model's own vocabulary.

    Attributes:
        limit: tokens after which an answer is cut.
    """

    tokenizer: Any
    questions: Sequence[EvalPrompt]
    limit: int


@dataclass(frozen=True, slots=True)
class ModelAnswers:
    """A model's answers, and how they were computed.

    Attributes:
        seconds: of all answers together.
        latencies: seconds of some questions, asked one after the other.
    """

    answers: list[Answer]
    engine: EngineName
    dtype: str
    seconds: float
    latencies: list[float]


def answer_limit(questions: Sequence[EvalPrompt], max_new_tokens: int) -> int:
    """Return after how many tokens an answer is cut: room for the longest reference, within the limit."""
    return limit_answer(max(len(q.reference) for q in questions), max_new_tokens)


def prepare_asking(folder: Path, rows: Sequence[Row], limit: int, max_new_tokens: int) -> Asking:
    """Return rows in the tokens of the tokenizer in a folder.

    Args:
        limit: of the base model's answers; where the references take more tokens than there, there is more.
        max_new_tokens: the most that it may be.
    """
    tokenizer = load_tokenizer(folder)
    questions = encode_questions(tokenizer, rows)
    return Asking(tokenizer, questions, max(limit, answer_limit(questions, max_new_tokens)))


def ask_model(
    model: ModelFolders,
    engine: EngineName,
    tokenizer: Any,
    questions: Sequence[EvalPrompt],
    batch_size: int,
    max_new_tokens: int,
    dtype: str = "auto",
    on_progress: Callable[[int], None] = lambda done: None,
) -> ModelAnswers:
    """Return a model's greedy answers, the loss of each reference, and the latency of a few questions.

    Args:
        batch_size: questions that transformers answers at once.
        max_new_tokens: where an answer is cut.
        dtype: `auto`, `bfloat16` or `float32`; the paged engine takes bfloat16 only where
            the processor has it.
        on_progress: called with the number of questions answered so far.

    Raises:
        InputError: a question does not fit into the model's context.
    """
    ask = _ask_paged if engine == "paged" else _ask_transformers
    return ask(model, tokenizer, questions, batch_size, max_new_tokens, dtype, on_progress)


def _ask_paged(
    model: ModelFolders,
    tokenizer: Any,
    questions: Sequence[EvalPrompt],
    _batch_size: int,
    max_new_tokens: int,
    dtype: str,
    on_progress: Callable[[int], None],
) -> ModelAnswers:
    from services.engines.paged.offline import answer_offline

    paged = _load_paged(model, dtype)
    check_fit(questions, max_new_tokens, paged.shape.context)
    ends = end_of_turn_ids(tokenizer)
    prompts = view(questions, attrgetter("prompt"))
    references = view(questions, attrgetter("reference"))
    start = time.perf_counter()
    found = answer_offline(paged, prompts, references, ends, max_new_tokens, on_progress)
    seconds = time.perf_counter() - start
    latencies = measure_latencies(
        lambda question: answer_offline(paged, [question.prompt], None, ends, max_new_tokens),
        _some(questions),
    )
    return ModelAnswers(_read_answers(tokenizer, found, questions), "paged", paged.dtype, seconds, latencies)


def _load_paged(model: ModelFolders, dtype: str) -> PagedModel:
    from services.engines.paged.model import PagedModel
    from services.engines.protocol import EngineError

    try:
        return PagedModel(
            model.gguf or model.base,
            cache_mib=KV_CACHE_MIB,
            precision="float32" if dtype == "float32" else "auto",
        )
    except EngineError as error:
        raise InputError(
            f"the engine paged does not start: {error}", "set ask_base.engine: transformers"
        ) from None


def _read_answers(
    tokenizer: Any, found: Sequence[Completion], questions: Sequence[EvalPrompt]
) -> list[Answer]:
    return [
        Answer(
            read_answer(tokenizer, one.token_ids, question.has_tools),
            len(one.token_ids),
            one.ended,
            one.reference_nll,
        )
        for one, question in zip(found, questions, strict=True)
    ]


def _ask_transformers(
    model: ModelFolders,
    tokenizer: Any,
    questions: Sequence[EvalPrompt],
    batch_size: int,
    max_new_tokens: int,
    wanted_dtype: str,
    on_progress: Callable[[int], None],
) -> ModelAnswers:
    loaded, dtype = _load_transformers(model, wanted_dtype)
    positions = read_position_limit(loaded.config, count_virtual_tokens(loaded))
    check_fit(questions, max_new_tokens, positions)
    start = time.perf_counter()
    answers = answer_questions(loaded, tokenizer, questions, batch_size, max_new_tokens, on_progress)
    seconds = time.perf_counter() - start
    latencies = measure_latencies(
        lambda question: answer_questions(loaded, tokenizer, [question], 1, max_new_tokens), _some(questions)
    )
    return ModelAnswers(answers, "transformers", str(dtype).removeprefix("torch."), seconds, latencies)


def _load_transformers(model: ModelFolders, wanted_dtype: str) -> tuple[Any, Any]:
    device = pick_device()
    dtype = pick_dtype(device, wanted_dtype)
    if model.adapter is None:
        return load_base(model.base, dtype, device), dtype
    return load_tuned(model.base, model.adapter, dtype, device), dtype


def load_asker(
    model: ModelFolders,
    engine: EngineName,
    tokenizer: Any,
    batch_size: int,
    max_new_tokens: int,
    dtype: str = "auto",
) -> Callable[[Sequence[EvalPrompt]], list[Answer]]:
    """Load a model to be asked again and again; return what asks it for greedy answers.

    The arguments are those of `ask_model`. The losses of the references are of no use.
    """
    if engine == "paged":
        from services.engines.paged.offline import answer_offline

        paged, ends = _load_paged(model, dtype), end_of_turn_ids(tokenizer)

        def ask(questions: Sequence[EvalPrompt]) -> list[Answer]:
            prompts = [question.prompt for question in questions]
            found = answer_offline(paged, prompts, None, ends, max_new_tokens)
            return _read_answers(tokenizer, found, questions)

        return ask
    loaded, _ = _load_transformers(model, dtype)
    return lambda questions: answer_questions(loaded, tokenizer, questions, batch_size, max_new_tokens)


def score_references(
    model: ModelFolders,
    engine: EngineName,
    tokenizer: Any,
    questions: Sequence[EvalPrompt],
    batch_size: int,
    dtype: str = "auto",
) -> list[float]:
    """Return the summed negative log-likelihood of each reference in nats, with no more than a token written.

    The arguments are those of `ask_model`, whose answers have the same losses.

    Raises:
        InputError: a question does not fit into the model's context.
    """
    if engine == "paged":
        from services.engines.paged.offline import answer_offline

        paged = _load_paged(model, dtype)
        check_fit(questions, 1, paged.shape.context)
        prompts = view(questions, attrgetter("prompt"))
        references = view(questions, attrgetter("reference"))
        found = answer_offline(paged, prompts, references, end_of_turn_ids(tokenizer), 1)
        return [one.reference_nll for one in found]
    loaded, _ = _load_transformers(model, dtype)
    check_fit(questions, 1, read_position_limit(loaded.config, count_virtual_tokens(loaded)))
    answers = answer_questions(loaded, tokenizer, questions, batch_size, 1)
    return [answer.reference_loss for answer in answers]


def _some(questions: Sequence[EvalPrompt]) -> list[EvalPrompt]:
    step = max(1, len(questions) // LATENCY_ROWS)
    return list(questions[::step])[:LATENCY_ROWS]


def compute_throughput(asked: ModelAnswers) -> dict[str, float]:
    """Return how fast a model answered: rows and tokens a second together, and the latency of one request."""
    import numpy as np

    tokens = sum(answer.tokens for answer in asked.answers)
    return {
        "seconds": round(asked.seconds, 2),
        "rows_per_s": round(len(asked.answers) / asked.seconds, 2),
        "tokens_per_s": round(tokens / asked.seconds, 1),
        "latency_rows": len(asked.latencies),
        "latency_p50_s": round(float(np.quantile(asked.latencies, 0.5)), 3),
        "latency_p95_s": round(float(np.quantile(asked.latencies, 0.95)), 3),
    }
