"""Compress: make smaller models of the exported one, measure each as it would be served, and choose one.

In: `artifacts/export`, `artifacts/fetch_base`, `artifacts/finetune`, `artifacts/split` (of test rows only
how long they are in a small vocabulary), `artifacts/curate/task.json`, `reports/fetch_base/metrics.json`.
Out: `artifacts/compress/chosen`, a folder like `artifacts/export`, if `compress.choose` takes one: then it is
evaluated, registered and served. `reports/compress/metrics.json`, in which only the throughput changes
between identical runs; `reports/compress/comparison` with `table.md` and `pareto.svg`.
Run: `python -m stages.compress`

What is compared, and chosen by, are answers to validation rows: the test rows judge the chosen model, which a
choice by them would flatter. Without `compress.variants` it makes nothing and takes no time.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Mapping, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any

from services.engines.offline import answer_limit
from services.engines.support import pick_engine
from stages.common.artifacts import (
    artifacts,
    atomic_dir,
    missing,
    read_json,
    reports,
    write_json,
    write_lines,
)
from stages.common.chat.fitting import select_askable
from stages.common.chat.turns import unroll
from stages.common.errors import InputError
from stages.common.gguf.quantization import HEALED
from stages.common.logs import get_logger, run_stage
from stages.common.model.exported import CHOSEN, GGUF, SERVING, compute_version, write_serving
from stages.common.model.generation import encode_questions
from stages.common.model.loading import count_context_tokens, load_tokenizer, read_config
from stages.common.model.results import Sampling
from stages.common.params.loading import Params, load_params
from stages.common.records import Row, read_rows, write_rows
from stages.common.spool import pick, view
from stages.common.statistics.sizes import choose_max_test_rows
from stages.common.task.kinds import read_task
from stages.compress.asking import Asked, ask_in_process
from stages.compress.plots import draw_fronts
from stages.compress.report import EXPORTED, build_report, choose_model, format_table
from stages.compress.variants import make_variant

logger = get_logger("compress")

NOTHING: dict[str, Any] = {"models": {}, "chosen": None, "choice": "compress.variants is empty."}


def complete_folder(folder: Path, variant: str, evidence: Mapping[str, Any]) -> str:
    """Make a folder with a GGUF one that can be served, with all that the export has; return its version."""
    exported = artifacts("export")
    for path in sorted(exported.iterdir()):
        if not (folder / path.name).exists() and path.name != SERVING:  # it may have a config.json of its own
            shutil.copyfile(path, folder / path.name)
    serving = read_json(exported / SERVING)
    compression = {"variant": variant, "made_from": serving["version"], "bytes": evidence["bytes"]}
    version = compute_version(folder, artifacts("fetch_base"), artifacts("finetune"))
    write_serving(folder / SERVING, serving | {"compression": compression, "version": version})
    return version


def draw_compared(params: Params, tokenizer: Any) -> Sequence[Row]:
    """Return the validation rows that are asked: those that fit, and at most as many as test rows are.

    A row for each learned turn, as `split` makes of the test side.

    Raises:
        InputError: there are none.
    """
    context = count_context_tokens(read_config(artifacts("fetch_base")))
    rows = unroll(read_rows(artifacts("split") / "validation.parquet"), params.task.turns)
    askable, _ = select_askable(tokenizer, rows, params.ask_base.max_new_tokens, context)
    if not askable:
        raise InputError(
            "compress.variants are compared on validation rows, and there are none that can be asked",
            "raise split.validation_fraction, or set compress.variants: []",
        )
    count = min(len(askable), choose_max_test_rows(params.ask_base.max_rows) or len(askable))
    chosen = sorted(random.Random(params.compress.seed).sample(range(len(askable)), count))
    return pick(view(askable, itemgetter(0)), chosen)


def compare_variants(params: Params, folder: Path) -> dict[str, Any]:
    """Make every variant in a folder of its own, ask all, and return the report."""
    settings, base = params.compress, artifacts("fetch_base")
    if pick_engine(params.ask_base.engine, base, params.export.gguf) != "paged":
        raise InputError(
            "compress.variants are GGUF files for CPUs, and transformers answers the test questions here",
            "set compress.variants: [], or run on a machine without a GPU and with ask_base.engine: auto",
        )
    tokenizer = load_tokenizer(base)
    rows, file = draw_compared(params, tokenizer), folder / "asked.parquet"
    files = {EXPORTED: artifacts("export") / GGUF}
    size = files[EXPORTED].stat().st_size
    evidence = {EXPORTED: {"bytes": size, "quantization": params.export.quantization}}
    for variant in sorted(settings.variants, key=HEALED.__contains__):  # a training comes last
        evidence[variant] = make_variant(variant, params, folder / variant)
    files |= {variant: folder / variant / GGUF for variant in settings.variants}
    questions = encode_questions(tokenizer, rows)
    limit = answer_limit(questions, params.ask_base.max_new_tokens)
    write_rows(file, rows)
    asked: dict[str, Asked] = {}
    for name, path in files.items():
        logger.info("asking %s %d validation rows", name, len(rows))
        asked[name] = ask_in_process(name, path, file, limit, params.ask_base)
    file.unlink()
    sampling = Sampling(params.evaluate.confidence, params.evaluate.resamples, params.evaluate.seed)
    report = build_report(rows, questions, asked, evidence, read_task(), sampling)
    chosen, reason = choose_model(report, settings.choose, settings.max_lost_points)
    return {**report, "chosen": chosen, "choice": reason}


def main() -> None:
    """Make the variants, measure them, and keep the one that is chosen."""
    if not (artifacts("export") / SERVING).exists():
        raise missing(artifacts("export") / SERVING)
    params = load_params()
    report = NOTHING
    with atomic_dir(artifacts("compress")) as folder:
        if params.compress.variants:
            report = compare_variants(params, folder)
        if chosen := report["chosen"]:
            version = complete_folder(folder / chosen, chosen, report["models"][chosen])
            (folder / chosen).rename(folder / CHOSEN.name)
            report = report | {"version": version}
        for variant in params.compress.variants:
            shutil.rmtree(folder / variant, ignore_errors=True)
        write_json(folder / "choice.json", {"chosen": report["chosen"]})
    with atomic_dir(reports("compress") / "comparison") as comparison:
        write_lines(comparison / "table.md", format_table(report))
        if report["models"]:
            draw_fronts(comparison / "pareto.svg", report)
    write_json(reports("compress") / "metrics.json", report)
    for name, one in report["models"].items():
        best = one["results"][report["primary"]]
        logger.info("%s: %s %.3f, %.0f MiB", name, report["primary"], best["value"], one["bytes"] / 2**20)
    logger.info("%s", report["choice"])


if __name__ == "__main__":
    run_stage(main, "take variants out of compress.variants, or choose a smaller base model")
