"""Preflight: stop if something cannot work, before anything costly runs; count the tokens of every row.

In: `artifacts/split/{train,validation,test}.parquet`, `artifacts/fetch_base/`, `artifacts/curate/task.json`;
`reports/fetch_base/metrics.json`; `artifacts/initial_adapter/`.
Out: `artifacts/preflight/{train,validation,test}.jsonl` (each row that later stages exclude, with its
reason); `reports/preflight/metrics.json` and `learned.html`, a page of rows with what is learned in colour;
written before the stage fails.
Run: `python -m stages.preflight`

Every row is rendered by the base model's own chat template. Rows that it refuses or that are too long are
excluded and counted, and the least numbers of rows (`split.min_train_rows`, `ask_base.min_test_rows`) are
checked again without them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from itertools import chain, islice
from pathlib import Path
from typing import Any

from services.engines.support import pick_engine
from stages.common.artifacts import artifacts, read_json, reports, write_json, write_lines, write_text
from stages.common.chat.common_prefix import count_common_prefix
from stages.common.chat.day import writes_date
from stages.common.chat.fitting import (
    LONG,
    REFUSED,
    Fitting,
    Misfit,
    count_reasons,
    describe_misfits,
    encode_fitting,
    select_askable,
    select_misfits,
    suggest_for_long,
)
from stages.common.chat.row_class import read_row_class
from stages.common.chat.template import read_answer_frame, suggest_for_refused
from stages.common.chat.tools_template import suggest_for_thoughts
from stages.common.chat.turns import unroll
from stages.common.errors import InputError, raise_problems
from stages.common.logs import get_logger, run_stage, show_progress
from stages.common.model.loading import (
    count_context_tokens,
    count_parameters,
    limit_length,
    load_tokenizer,
    read_config,
)
from stages.common.params.loading import Params, load_params
from stages.common.records import Row, count_chars, format_reject, read_rows
from stages.common.spool import spool
from stages.common.statistics.sizes import choose_min_test_rows, choose_min_train_rows
from stages.common.task.kinds import read_task
from stages.common.task.protocol import Task
from stages.preflight.base_checks import (
    count_embedding_rows,
    count_healing_bytes,
    count_needed_bytes,
    find_disk_problems,
    find_engine_problems,
    find_export_problems,
    find_license_problems,
    find_template_problems,
    find_token_problems,
    find_unknown_tokens,
    find_variant_problems,
    list_quantizations,
)
from stages.preflight.call_checks import find_call_problems
from stages.preflight.changed_text import describe_text
from stages.preflight.findings import count_unserved, count_unwritten_thoughts, report_findings
from stages.preflight.finetune_checks import (
    count_checkpoint_bytes,
    find_finetune_problems,
    find_stopping_problems,
    list_warnings,
)
from stages.preflight.languages import (
    MIN_SHARE,
    count_languages,
    describe_languages,
    find_language_problems,
    list_unstated,
    to_evidence,
)
from stages.preflight.learned_rows import find_learned_problems
from stages.preflight.memory_checks import Training
from stages.preflight.page import render_page
from stages.preflight.preference_checks import (
    count_preferences,
    describe_preferences,
    find_preference_problems,
)

logger = get_logger("preflight")

SIDES = ("train", "validation", "test")
COMPARED_ROWS = 200  # training rows whose tokens in llama.cpp are compared; export compares the test rows
SHOWN = 10  # rows in a message; the files of rejects have all

Sides = Mapping[str, Sequence[Row]]
FittingSides = dict[str, Fitting]
Rejects = dict[str, Sequence[Misfit]]


def find_base_problems(
    params: Params, base: Path, tokenizer: Any, rows: Iterable[Row], training: Training | None
) -> list[InputError]:
    """Return what would stop the pipeline later in the tokens, the licences and on the disk."""
    config = read_config(base)
    size = count_embedding_rows(config)
    exported = params.export.gguf
    fetched = read_json(reports("fetch_base") / "metrics.json")
    weights = count_parameters(base)
    engines = {"services.engine.kind": params.services.engine.kind, "ask_base.engine": params.ask_base.engine}
    return [
        *find_engine_problems(engines, base, exported),
        *find_unknown_tokens(tokenizer, size, exported),
        *find_license_problems(
            rows, params.validate_.allowed_licenses, params.model_card.license, fetched.get("license")
        ),
        *find_disk_problems(
            count_needed_bytes(
                weights,
                list_quantizations(params.export, params.compress.variants),
                max(
                    count_checkpoint_bytes(training, params.finetune),
                    count_healing_bytes(weights, params.compress),
                ),
            ),
            Path(),
        ),
    ]


def encode_sides(params: Params, config: Any, tokenizer: Any, sides: Sides) -> tuple[FittingSides, Rejects]:
    """Return the rows of each side that will be trained on or judged, and the misfits of each side."""
    virtual = params.finetune.virtual_tokens
    limit = limit_length(params.finetune.max_length, config, virtual)
    fitting: FittingSides = {}
    misfits: Rejects = {}
    for side in ("train", "validation"):
        fitting[side], misfits[side] = encode_fitting(
            tokenizer,
            sides[side],
            limit,
            follow(side, len(sides[side])),
            params.task.turns,
        )
    fitting["test"], misfits["test"] = select_askable(
        tokenizer,
        sides["test"],
        params.ask_base.max_new_tokens,
        count_context_tokens(config, virtual),
        follow("test", len(sides["test"])),
    )
    return fitting, misfits


def follow(side: str, rows: int) -> Callable[[int], None]:
    """Return a function that shows how many rows of a side are encoded."""
    return lambda done: show_progress(logger, done, rows, f"{side} rows encoded")


def find_row_problems(
    params: Params, task: Task, config: Any, fitting: FittingSides, misfits: Rejects
) -> list[InputError]:
    """Return why these rows cannot be trained on and judged: which ones, and where the others went."""
    problems = []
    embedding_rows = count_embedding_rows(config)
    wrong = spool(
        (
            Misfit(row, "invalid_answer", problem)
            for side in SIDES
            for row, _ in fitting[side]
            for answer in (one.answer for one in unroll([row], params.task.turns))
            if (problem := task.find_problem(answer))
        ),
        lambda misfit: count_chars(misfit.row),
    )
    if wrong:
        problems.append(
            InputError(
                f"{len(wrong)} answers are not of kind {task.kind}\n{describe_misfits(wrong, SHOWN)}",
                "run the stages from curate on again: they leave such rows out",
            )
        )
    beyond = spool(
        (
            Misfit(row, "unknown_token", f"the id {top}, and the embedding has {embedding_rows} rows")
            for side in SIDES
            for row, example in fitting[side]
            if (top := max(example.input_ids)) >= embedding_rows
        ),
        lambda misfit: count_chars(misfit.row),
    )
    if beyond:
        problems.append(
            InputError(
                f"{len(beyond)} rows have tokens that the base model does not know\n"
                f"{describe_misfits(beyond, SHOWN)}",
                "choose a base model whose tokenizer fits it (fetch_base in params.yaml)",
            )
        )
    refused = select_misfits(chain.from_iterable(misfits[side] for side in SIDES), REFUSED)
    if refused and params.preflight.on_refused_row == "stop":
        problems.append(
            InputError(
                f"the chat template refuses {len(refused)} rows\n{describe_misfits(refused, SHOWN)}",
                f"{suggest_for_refused(misfit.row.messages for misfit in refused)}; or set "
                "preflight.on_refused_row: drop",
            )
        )
    long = select_misfits(chain(misfits["train"], misfits["validation"]), LONG)
    if long and params.finetune.on_long_row == "stop":
        most = params.finetune.max_length
        virtual = params.finetune.virtual_tokens
        limit = limit_length(most, config, virtual)
        source = "finetune.max_length" if limit == most else "the base model's context"
        problems.append(
            InputError(
                f"{len(long)} rows are longer than {source} ({limit})\n{describe_misfits(long, SHOWN)}",
                suggest_for_long(limit, most, virtual),
            )
        )
    return problems + find_size_problems(params, task, fitting, misfits)


def find_size_problems(
    params: Params, task: Task, fitting: FittingSides, misfits: Rejects
) -> list[InputError]:
    """Return which sides have too few rows left, and where the others went."""
    classes = {read_row_class(row, task) for row, _ in fitting["train"]} - {None}
    least = {
        "train": choose_min_train_rows(params.split.min_train_rows, len(classes)),
        "test": max(
            choose_min_test_rows(params.split.min_test_rows),
            choose_min_test_rows(params.ask_base.min_test_rows),
        ),
    }
    problems = []
    if params.compress.variants and not fitting["validation"]:
        problems.append(
            InputError(
                "compress.variants are compared on validation rows, and there are none",
                "raise split.validation_fraction, or set compress.variants: []",
            )
        )
    for side, wanted in least.items():
        left, out = len(fitting[side]), misfits[side]
        if left < wanted:
            problems.append(
                InputError(
                    f"{side}: {left} rows are left of {left + len(out)}, and {wanted} are required "
                    f"(split.min_{side}_rows); excluded: {count_reasons(out) or 'none'}\n"
                    f"{describe_misfits(out, SHOWN)}",
                    _suggest_fix(side, out),
                )
            )
    return problems


def _suggest_fix(side: str, misfits: Sequence[Misfit]) -> str:
    fixes = {
        REFUSED: suggest_for_refused(misfit.row.messages for misfit in select_misfits(misfits, REFUSED)),
        LONG: "raise finetune.max_length, lower ask_base.max_new_tokens, or shorten the rows",
    }
    least = "split.min_train_rows" if side == "train" else "split.min_test_rows and ask_base.min_test_rows"
    return "; ".join(
        [*(fixes[reason] for reason in count_reasons(misfits)), f"or collect more rows, or lower {least}"]
    )


def describe_side(fitting: Fitting, misfits: Sequence[Misfit]) -> dict[str, Any]:
    """Return the rows of a side: how many are left, why others are not, and how long they are."""
    sizes = [(len(e.input_ids), e.learned_count, max(b - a for a, b in e.learned)) for _, e in fitting]
    lengths, learned, longest = zip(*sizes, strict=True) if sizes else ((), (), ())
    return {
        "rows_in": len(fitting) + len(misfits),
        "rows": len(fitting),
        "excluded": count_reasons(misfits),
        "tokens": sum(lengths),
        "learned_tokens": sum(learned),
        "longest": max(lengths, default=0),
        "longest_answer": max(longest, default=0),
        "shared_tokens": count_common_prefix(example.input_ids for _, example in fitting),
    }


def main() -> None:
    """Check the base model and every row, write the counts, then fail if something cannot work."""
    params = load_params()
    base = artifacts("fetch_base")
    tokenizer = load_tokenizer(base)
    sides = {side: read_rows(artifacts("split") / f"{side}.parquet") for side in SIDES}
    template = find_template_problems(tokenizer)
    rows = chain.from_iterable(sides.values())
    config = read_config(base)
    task = read_task()
    labels = task.closed_set or ()
    training, finetune_problems = find_finetune_problems(config, params.finetune, tokenizer, labels)
    problems = [
        *template,
        *finetune_problems,
        *find_base_problems(params, base, tokenizer, rows, training),
    ]
    folder = reports("preflight")
    if template:
        write_json(folder / "metrics.json", {"success": False, "problems": [p.what for p in problems]})
        raise_problems(problems)
    size = count_embedding_rows(config)
    if params.export.gguf:
        problems += find_export_problems(config) or find_variant_problems(
            params.compress.variants, params.ask_base.engine, base, config
        )
    fitting, misfits = encode_sides(params, config, tokenizer, sides)
    if params.export.gguf:
        compared = (row for row, _ in islice(fitting["train"], COMPARED_ROWS))
        problems += find_token_problems(tokenizer, size, compared)
    problems += find_row_problems(params, task, config, fitting, misfits)
    left = (row for row, _ in chain.from_iterable(fitting.values()))
    problems += find_call_problems(tokenizer, left, params.task.turns, params.services.engine.kind)
    limit_of_row = limit_length(params.finetune.max_length, config, params.finetune.virtual_tokens)
    preferences = count_preferences(params.finetune, tokenizer, sides["train"], limit_of_row)
    problems += find_preference_problems(params.finetune, preferences)
    problems += find_learned_problems(params, tokenizer, sides["train"], limit_of_row)
    answers = [turn.answer for row, _ in fitting["validation"] for turn in unroll([row], params.task.turns)]
    problems += find_stopping_problems(params.finetune, task, answers)
    stated = params.model_card.language
    languages = count_languages(list(sides.values())) if stated else None
    if stated and languages:
        problems += find_language_problems(stated, languages)
    limit = params.ask_base.max_new_tokens
    over_limit = [row.id for row, e in fitting["test"] if e.learned_count > limit]
    frame = read_answer_frame(tokenizer)
    learned = (fitting["train"], fitting["validation"])
    unwritten = count_unwritten_thoughts(tokenizer, chain(*learned), params.task.turns)
    unserved = count_unserved(chain(*learned), params.services.guard)
    answered_by = None if problems else pick_engine(params.ask_base.engine, base, params.export.gguf)
    evidence = {
        "success": not problems,
        "problems": [problem.what for problem in problems],
        "sides": {side: describe_side(fitting[side], misfits[side]) for side in SIDES},
        "test_answers_over_max_new_tokens": len(over_limit),
        "template": {**asdict(frame), "writes_date": writes_date(str(tokenizer.chat_template))},
        "text": describe_text(tokenizer, fitting),
        "thoughts_not_written": unwritten,
        "thoughts_fix": suggest_for_thoughts(tokenizer) if unwritten else None,
        "learned_rows_refused_by_the_guard": unserved,
        "training": training.describe() if training else None,
        "answered_by": answered_by,
        **({"preferences": preferences} if preferences else {}),
        "languages": to_evidence(languages) if languages else None,
    }
    for side in SIDES:
        lines = (format_reject(m.row, m.reason, m.detail) for m in misfits[side])
        write_lines(artifacts("preflight") / f"{side}.jsonl", lines)
    write_text(
        folder / "learned.html", render_page(tokenizer, fitting["train"][: params.preflight.shown_rows])
    )
    write_json(folder / "metrics.json", evidence)
    report_findings(evidence, misfits, over_limit, limit, params.services.guard)
    for warning in list_warnings(params.finetune):
        logger.warning("%s", warning)
    if preferences:
        logger.info("%s", describe_preferences(preferences))
    if stated and languages and (unstated := list_unstated(stated, languages)):
        logger.warning(
            "%d%% or more of the rows seem to be in each of %s, which model_card.language does not name: %s",
            *(100 * MIN_SHARE, ", ".join(unstated), describe_languages(languages)),
        )
    raise_problems(problems)


if __name__ == "__main__":
    run_stage(main)
