"""`params.yaml`, typed and checked before any work.

Run `perennial params` to check the file and print nothing but its problems.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import Field

from stages.common.errors import ParamsError
from stages.common.model.adapter import HEAD, MERGED_METHODS, VLLM_METHODS
from stages.common.params.checked_yaml import (
    Document,
    Problem,
    Section,
    check_section,
    describe_unknown_key,
    find_duplicate_keys,
    parse,
)
from stages.common.params.compress import Compress
from stages.common.params.finetune import Finetune
from stages.common.params.loop import Flows, Monitoring
from stages.common.params.packaged import find_packaged_words
from stages.common.params.services import Services
from stages.common.params.stages import (
    AskBase,
    CheckBias,
    Collect,
    Curate,
    Evaluate,
    Export,
    FetchBase,
    ModelCard,
    Preflight,
    Split,
    Validate,
)
from stages.common.task.settings import TaskSettings

# The environment's word for a key of params.yaml.
ENVIRONMENT = {
    "PERENNIAL_EVENTS_URL": ("services", "events", "url"),
    "PERENNIAL_KEYS_FILE": ("services", "access", "keys_file"),
    "PERENNIAL_HOSTS": ("services", "access", "hosts"),  # with commas between them
    "PERENNIAL_TRACKING_URL": ("flows", "tracking", "tracking_url"),
}


class Params(Section):
    """All of `params.yaml`."""

    task: TaskSettings
    fetch_base: FetchBase
    collect: Collect
    curate: Curate
    validate_: Validate = Field(alias="validate")
    check_bias: CheckBias
    split: Split
    preflight: Preflight
    ask_base: AskBase
    finetune: Finetune
    export: Export
    compress: Compress
    evaluate: Evaluate
    model_card: ModelCard
    services: Services
    monitoring: Monitoring
    flows: Flows


def load_params(path: str | Path = "params.yaml") -> Params:
    """Read and check `params.yaml`.

    Where a service runs elsewhere, a variable of `ENVIRONMENT` takes the place of a key:
    a container gets its secrets and mounted folders from its environment.

    Raises:
        ParamsError: with every problem of the file: line, key, value, and the nearest right key.
    """
    path = Path(path)
    document = parse(path)
    _from_environment(document)
    models = {field.alias or name: field.annotation for name, field in Params.model_fields.items()}
    found = list(find_duplicate_keys(document.root))
    found += [describe_unknown_key(document, (key,), models) for key in document.values if key not in models]
    sections = {}
    for key, model in models.items():
        if key not in document.values:
            found.append((1, f"{key}: missing section"))
            continue
        sections[key], problems = check_section(document, key, model)
        found += problems
    found += _conflicts_across(document, sections)
    if found:
        lines = "\n".join(f"{path}:{line}: {text}" for line, text in sorted(found))
        count = "1 problem" if len(found) == 1 else f"{len(found)} problems"
        raise ParamsError(
            f"{count} in {path}\n{lines}", "correct the lines above; docs/reference/params.md has every key"
        )
    return Params.model_validate(sections)


def _from_environment(document: Document) -> None:
    for name, (section, part, key) in ENVIRONMENT.items():
        values = document.values.get(section, {}).get(part)
        if name in os.environ and isinstance(values, dict):
            value = os.environ[name]
            values[key] = tuple(value.split(",")) if isinstance(values.get(key), tuple) else value


def _conflicts_across(document: Document, sections: dict[str, Any]) -> Iterator[Problem]:
    """Yield what contradicts the value of another section."""
    if {"collect", "task", "model_card"} <= sections.keys() and all(
        sections[name] for name in ("collect", "task", "model_card")
    ):
        words = find_packaged_words(sections["collect"], sections["task"], sections["model_card"])
        for key, problem in words:
            yield document.line(key), f"{'.'.join(key)} {problem}"
    finetune, services = sections.get("finetune"), sections.get("services")
    if finetune and services and services.engine.kind == "vllm" and finetune.method not in VLLM_METHODS:
        yield (
            document.line(("finetune", "method")),
            f"finetune.method: {finetune.method} makes no adapter that vLLM loads "
            f"(services.engine.kind: vllm): use {' or '.join(VLLM_METHODS)}, "
            "or set services.engine.kind: auto",
        )
    yield from _conflicts_of_variants(document, sections)
    export = sections.get("export")
    if finetune and export and export.gguf and finetune.method not in MERGED_METHODS:
        yield (
            document.line(("finetune", "method")),
            f"finetune.method: {finetune.method} has no weights that a GGUF could hold "
            "(export.gguf: true): set export.gguf: false and services.engine.kind: transformers, "
            "which serves it",
        )
    yield from _conflicts_of_head(document, finetune, sections.get("task"))
    ask_base, split = sections.get("ask_base"), sections.get("split")
    if not ask_base or not split or "auto" in (ask_base.min_test_rows, split.min_test_rows):
        return
    if ask_base.min_test_rows > split.min_test_rows:
        yield (
            document.line(("ask_base", "min_test_rows")),
            f"ask_base.min_test_rows: {ask_base.min_test_rows} is above split.min_test_rows "
            f"({split.min_test_rows}): the split could pass and ask_base stop; use one number for both",
        )


def _conflicts_of_variants(document: Document, sections: dict[str, Any]) -> Iterator[Problem]:
    """Yield what keeps smaller models from being made, measured or served: they are GGUF files for CPUs."""
    compress, export, ask_base, services = (
        sections.get(name) for name in ("compress", "export", "ask_base", "services")
    )
    if not compress or not compress.variants or not (export and ask_base and services):
        return
    line = document.line(("compress", "variants"))
    if not export.gguf:
        yield line, "compress.variants are GGUF files, and export.gguf is false; set it to true"
    if ask_base.engine == "transformers":
        yield (
            line,
            "compress.variants are measured by the engine paged, and ask_base.engine is transformers; "
            "set it to auto",
        )
    engine = services.engine
    if compress.choose and (engine.gpus or engine.kind in ("vllm", "transformers")):
        why = f"kind: {engine.kind}" if engine.kind in ("vllm", "transformers") else f"gpus: {engine.gpus}"
        yield (
            document.line(("compress", "choose")),
            f"compress.choose: {compress.choose} is a GGUF file for CPUs, and services.engine.{why} serves "
            "another format; set choose: null, or serve on the CPU (docs/how-to/compress.md: on a GPU)",
        )


def _conflicts_of_head(document: Document, finetune: Any, task: Any) -> Iterator[Problem]:
    if not finetune or not task or finetune.method != HEAD:
        return
    if task.kind != "label":
        yield (
            document.line(("finetune", "method")),
            "finetune.method: head answers with one of a closed set of labels, and task.kind is "
            f"{task.kind}: set task.kind: label, or another method",
        )
    elif task.turns != "last":
        yield (
            document.line(("task", "learned_turns")),
            f"task.learned_turns: {task.learned_turns}, and finetune.method: head learns the last answer of "
            "a row: set it to auto or last",
        )


def main() -> None:
    """Check `params.yaml` and exit 2 with all its problems, or 0."""
    parser = argparse.ArgumentParser(prog="perennial params", description="Check params.yaml; run nothing.")
    parser.add_argument("file", nargs="?", type=Path, default=Path("params.yaml"))
    try:
        load_params(parser.parse_args().file)
    except ParamsError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(error.exit_code)
