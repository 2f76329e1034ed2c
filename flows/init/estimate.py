"""What `make run` will do with the rows, and how long it takes on this machine."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.common.machine.products import measure_product_speed
from stages.common.model.loading import pick_device, pick_dtype
from stages.common.run_estimate.seconds import count_processes, read_model_size
from stages.common.run_estimate.seconds import estimate_run as estimate_stages
from stages.common.run_estimate.work import Work, count_asked_rows, count_batches
from stages.common.sources.detection.survey import Survey
from stages.common.statistics.sizes import choose_max_test_rows

# Without the base model. Most tokenizers have one token for four characters of English; that of the packaged
# model has 1.4 for a character of Hindi, and 1.9 for one of Chinese.
CHARS_PER_TOKEN = 4.0
TOKENS_PER_WIDE_CHAR = 1.6
FIXED_MINUTES = 2.0  # the stages that neither train nor answer
DEFAULT_ASKED = 32  # finetune.validation_rows, where params.yaml does not have it
TEMPLATE_TOKENS = 25  # that a chat template puts around a row
SHARED_TOKENS = 17  # of these, with a short system prompt: those with which all rows begin


@dataclass(frozen=True, slots=True)
class RunEstimate:
    """The size of a run: rows and tokens to train on, rows to test on, minutes, and GPUs that train."""

    train_rows: int
    test_rows: int
    train_tokens: int
    dtype: str
    minutes: float
    gpus: int = 1


def make_token_counter(base: Path) -> tuple[Callable[[str], int], bool]:
    """Return a function that counts the tokens of a text, and whether it is exact: if the base is there."""
    file = base / "tokenizer.json"
    if not file.is_file():
        return estimate_tokens, False
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(file))
    return lambda text: len(tokenizer.encode(text, add_special_tokens=False).ids), True


def estimate_tokens(text: str) -> int:
    """Return about how many tokens a text takes, by how many of its characters are ASCII."""
    narrow = len(text.encode("ascii", "ignore"))
    return round(narrow / CHARS_PER_TOKEN + (len(text) - narrow) * TOKENS_PER_WIDE_CHAR)


def estimate_run(survey: Survey, params: Mapping[str, Any], base: Path) -> RunEstimate:
    """Return the estimate of a run from the survey of its rows and the raw parameters."""
    split, finetune = params["split"], params["finetune"]
    usable = survey.rows - survey.duplicates - survey.long_rows
    test_rows = max(1, round(usable * split["test_fraction"]))
    validation_rows = round(usable * split["validation_fraction"])
    train_rows = max(1, usable - test_rows - validation_rows)
    tokens_per_row = survey.row_tokens.total / survey.sampled + TEMPLATE_TOKENS
    train_tokens = round(train_rows * tokens_per_row * finetune["epochs"])
    device = pick_device()
    dtype = str(pick_dtype(device, finetune["dtype"])).removeprefix("torch.")
    answer_tokens = survey.answer_tokens.total / survey.sampled
    trained = train_rows * finetune["epochs"]
    batches = count_batches(trained, finetune["batch_size"])
    asked = min(test_rows, choose_max_test_rows(params["ask_base"]["max_rows"]) or test_rows)
    validated = count_asked_rows(
        finetune.get("validate_every"), finetune.get("validation_rows", DEFAULT_ASKED), validation_rows
    )
    work = Work(
        train_rows=train_rows,
        train_tokens=train_tokens,
        train_answer_tokens=round(train_rows * answer_tokens * finetune["epochs"]),
        test_rows=asked,
        test_tokens=round(asked * tokens_per_row),
        longest_answer=min(survey.answer_tokens.largest, params["ask_base"]["max_new_tokens"]),
        validation_tokens=round(validated * tokens_per_row),
        validation_answer_tokens=round(validated * answer_tokens),
        train_repeated=SHARED_TOKENS * (trained - batches),
        test_repeated=SHARED_TOKENS * (asked - 1),
    )
    speed = measure_product_speed(dtype, device.type)
    size, is_paged = read_model_size(base), device.type == "cpu"
    processes = count_processes(finetune.get("devices", "auto"), finetune["batch_size"], device.type)
    gpus = processes if device.type == "cuda" else 1
    seconds = estimate_stages(work, size, dtype, speed, is_paged, gpus=gpus).sum_of()
    return RunEstimate(train_rows, test_rows, train_tokens, dtype, FIXED_MINUTES + seconds / 60, gpus)
