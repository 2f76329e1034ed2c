"""Export: base model and adapter merged into one GGUF file, with the files that a server reads next to it.

In: `artifacts/fetch_base`, `artifacts/finetune`, `artifacts/split/train.parquet` for the system prompt and
the schema of the answers.
Out: `artifacts/export` with `model.gguf` and a `Modelfile` for Ollama (neither with export.gguf: false),
the tokenizer's files and `serving.json`; `reports/export/metrics.json` with what was checked: every tensor
and the token ids of every training conversation, as read back from the file.
Run: `python -m stages.export`
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from stages.common.artifacts import (
    artifacts,
    atomic_dir,
    hash_file,
    read_json,
    reports,
    write_json,
    write_text,
)
from stages.common.chat.fitting import find_refused
from stages.common.chat.template import end_of_turn_ids
from stages.common.errors import InputError
from stages.common.gguf.architectures import find_architecture
from stages.common.gguf.checked import write_checked
from stages.common.logs import get_logger, run_stage
from stages.common.model.adapter import count_virtual_tokens, find_weights
from stages.common.model.draft_corpus import CORPUS, encode_corpus, write_corpus
from stages.common.model.exported import GGUF, SERVING, TOKENIZER_FILES, compute_version, write_serving
from stages.common.model.loading import count_context_tokens, load_tokenizer, load_tuned, read_config
from stages.common.params.loading import load_params
from stages.common.records import Row, read_rows
from stages.common.spool import pick
from stages.common.task.kinds import read_task
from stages.common.task.protocol import Schema, Task
from stages.export.modelfile import format_modelfile, read_chat_format

logger = get_logger("export")


@dataclass(frozen=True, slots=True)
class Answers:
    """What the training answers show about answers.

    Attributes:
        schema: None where answers are free text.
        checked: how many answers were held against it.
    """

    schema: Schema | None
    labels: int
    keys: int
    checked: int


def learn_answers(rows: Sequence[Row], task: Task) -> Answers:
    """Derive the schema of the answers and hold every one of them against it.

    Raises:
        InputError: an answer does not fit, which is a fault of ours.
    """
    schema = task.derive_schema([row.answer for row in rows])
    if schema is None:
        return Answers(None, 0, 0, 0)
    for row in rows:
        if not task.fits(schema, row.answer):
            raise InputError(
                f"the answer of row {row.id} does not fit the schema derived from it: {row.answer[:200]}",
                "report it with this row",
            )
    properties = schema.get("properties", {})
    if schema == {"type": "object"}:
        logger.warning("the answers' keys have no common order: the schema allows any JSON object")
    labels = {label for row in rows if (label := task.read_class(row.answer)) is not None}
    return Answers(schema, len(labels), len(properties), len(rows))


def find_common_system_prompt(rows: Sequence[Row]) -> str | None:
    """Return the system message that all rows begin with, or None if they differ or have none."""
    prompts = (row.messages[0].content if row.messages[0].role == "system" else None for row in rows)
    first = next(prompts, None)
    return first if all(prompt == first for prompt in prompts) else None


def find_common_tools(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Return the tools that all rows offer, in their order; none if the rows differ or have none."""
    offered = [row.tools for row in rows]
    first = offered[0] if offered else ()
    return [tool.value for tool in first] if all(tools == first for tools in offered) else []


def copy_tokenizer(base: Path, into: Path) -> None:
    """Copy what `load_tokenizer` needs of the base model, byte by byte."""
    for name in TOKENIZER_FILES:
        if (base / name).is_file():
            shutil.copyfile(base / name, into / name)


def export_gguf(
    base: Path, adapter: Path, rows: Sequence[Row], quantization: str, name: str, path: Path
) -> tuple[dict[str, Any], dict[str, float]]:
    """Write the merged model as GGUF, read it back and compare; return the evidence and the speed.

    Raises:
        InputError: GGUF cannot carry this model, or what was written is not this model.
    """
    import torch

    find_architecture(read_config(base))  # before the weights are read: a refusal should come at once
    # On the CPU and in float32: the sum of base and adapter is rounded once, into the file's own type.
    model = load_tuned(base, adapter, torch.float32, torch.device("cpu"))
    return write_checked(model, load_tokenizer(base), rows, quantization, name, path, logger)


def write_modelfile(folder: Path, system_prompt: str | None) -> bool:
    """Write the Modelfile; return whether it holds the chat template, too."""
    tokenizer = load_tokenizer(folder)
    chat_format = read_chat_format(tokenizer)
    if chat_format is None:
        logger.warning("the chat template cannot be translated for Ollama, which will guess one")
    stops = tokenizer.convert_ids_to_tokens(end_of_turn_ids(tokenizer))
    write_text(folder / "Modelfile", format_modelfile(GGUF, system_prompt, chat_format, stops))
    return chat_format is not None


def main() -> None:
    """Merge, write, check, and describe what is to be served."""
    params = load_params()
    settings, name = params.export, params.model_card.name
    base, adapter = artifacts("fetch_base"), artifacts("finetune")
    tokenizer = load_tokenizer(base)  # raises InputError if there is no base model yet
    fetched = read_json(reports("fetch_base") / "metrics.json")
    # Without the rows that the chat template refuses: nothing was learned from them.
    train = read_rows(artifacts("split") / "train.parquet")
    refused = find_refused(tokenizer, train)
    rows = pick(train, [number for number, row in enumerate(train) if row.id not in refused])
    task = read_task()
    answers = learn_answers(rows, task)
    system_prompt = find_common_system_prompt(rows)
    gguf: dict[str, Any] | None = None
    speed: dict[str, float] = {}
    with atomic_dir(artifacts("export")) as folder:
        copy_tokenizer(base, folder)
        if settings.gguf:
            gguf, speed = export_gguf(base, adapter, rows, settings.quantization, name, folder / GGUF)
            gguf["ollama_template"] = write_modelfile(folder, system_prompt)
        corpus = encode_corpus(tokenizer, rows, settings.draft_rows)
        write_corpus(folder / CORPUS, corpus)
        serving = {
            "adapter_sha256": hash_file(find_weights(adapter)),
            "answer_schema": answers.schema,
            "base_model": fetched["name"],
            "base_revision": fetched["revision"],
            "base_sha256": fetched["sha256"],
            "context_tokens": count_context_tokens(read_config(base), count_virtual_tokens(adapter)),
            "name": name,
            "normalize": list(params.curate.normalize),
            "system_prompt": system_prompt,
            "task": task.describe(),
            "tools": find_common_tools(rows),
            "version": compute_version(folder, base, adapter),
        }
        write_serving(folder / SERVING, serving)
    evidence = {key: value for key, value in asdict(answers).items() if key != "schema"}
    write_json(
        reports("export") / "metrics.json",
        {
            "answers": {**evidence, "schema": answers.schema is not None},
            "draft_rows": len(corpus),
            "gguf": gguf,
            "system_prompt": system_prompt is not None,
            "throughput": speed,
            "version": serving["version"],
        },
    )
    size = f"{gguf['bytes'] / 2**20:.0f} MiB of {gguf['quantization']}" if gguf else "no GGUF"
    logger.info("%s version %s: %s", name, serving["version"], size)


if __name__ == "__main__":
    run_stage(main)
