"""Evaluate: ask the tuned model the questions that the base model was asked, and compare their answers.

In: `artifacts/curate/task.json`, `artifacts/split/test.parquet`, `artifacts/ask_base`,
`artifacts/fetch_base`, `artifacts/finetune`, `artifacts/export`, `artifacts/compress`.
Out: `reports/evaluate/metrics.json` with each metric as value, low, high and n for both models, their
difference with a p-value, slices by class and tag, and the throughput (the only key that changes between
identical runs); `errors.md` and `errors.csv`, worst first; `plots/`;
`artifacts/evaluate/predictions.parquet`. With `evaluate.simulator`, whole conversations are also run with the
model's own calls (`simulation.py`), as many as end within `evaluate.simulated_minutes`. Test rows with a
rejected answer show which answer each model finds likelier (`preferences.py`).
Run: `python -m stages.evaluate`
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from services.engines.offline import (
    ModelAnswers,
    ModelFolders,
    ask_model,
    compute_throughput,
    load_asker,
    prepare_asking,
    score_references,
)
from services.engines.support import EngineName, pick_engine
from stages.common.artifacts import (
    artifacts,
    atomic_dir,
    atomic_write,
    read_json,
    reports,
    write_json,
    write_lines,
    write_text,
)
from stages.common.chat.preferences import encode_pairs
from stages.common.errors import InputError
from stages.common.logs import get_logger, run_stage, show_progress
from stages.common.model.adapter import PREFERENCE_METHODS, count_virtual_tokens, read_initial_adapter
from stages.common.model.exported import GGUF, SERVING, find_exported, find_tokenizer
from stages.common.model.generation import Answer, EvalPrompt, encode_questions, pick_asked, read_answers
from stages.common.model.loading import count_context_tokens, load_tokenizer, read_config
from stages.common.model.results import (
    Sampling,
    check_finite,
    compute_class_results,
    read_classes,
    score,
    summarise,
)
from stages.common.params.loading import Params, load_params
from stages.common.params.stages import AskBase
from stages.common.records import ROWS_A_BATCH, Row, read_rows
from stages.common.task.kinds import read_task
from stages.common.task.label_metrics import count_confusions
from stages.common.task.protocol import Task
from stages.evaluate.calibration import measure_calibration
from stages.evaluate.error_analysis import Prediction, format_errors_csv, format_errors_page, list_errors
from stages.evaluate.plots import draw_report
from stages.evaluate.preferences import Score, Scorer, find_pairs, measure_preferences
from stages.evaluate.simulation import Simulator, load_simulator, simulate
from stages.evaluate.simulation_report import choose_conversations, summarise_simulation

logger = get_logger("evaluate")


def check_references(rows: Sequence[Row], task: Task) -> None:
    """Raise InputError if references are not answers of the task; all are counted, the first ones shown."""
    problems = [(row, problem) for row in rows if (problem := task.find_problem(row.answer))]
    if problems:
        shown = "".join(f"\n  row {row.id}: {row.answer[:100]!r}: {problem}" for row, problem in problems[:3])
        raise InputError(
            f"{len(problems)} of {len(rows)} test answers are not answers of kind {task.kind}{shown}",
            "run the stages from curate on again: they drop such rows",
        )


def write_predictions(
    path: Path,
    rows: Sequence[Row],
    questions: Sequence[EvalPrompt],
    answers: Mapping[str, Sequence[Answer]],
    predictions: Mapping[str, Sequence[Prediction]],
) -> None:
    """Write every answer of both models as Parquet."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    text, number = pa.string(), pa.int64()
    fields = [("id", text), ("group", text), ("question", text), ("reference", text)]
    fields.append(("reference_tokens", number))
    for model in answers:
        kinds = {"": text, "_exact_match": pa.bool_(), "_finished": pa.bool_()}
        kinds |= {"_tokens": number, "_reference_loss": pa.float64()}
        fields += [(f"{model}{ending}", kind) for ending, kind in kinds.items()]
    schema = pa.schema(fields)
    with atomic_write(path) as temporary, pq.ParquetWriter(temporary, schema, compression="zstd") as file:
        for start in range(0, len(rows), ROWS_A_BATCH):
            part = slice(start, start + ROWS_A_BATCH)
            cells = _list_cells(
                rows[part],
                questions[part],
                {model: found[part] for model, found in answers.items()},
                {model: found[part] for model, found in predictions.items()},
            )
            file.write_batch(pa.record_batch(list(cells), schema=schema))


def _list_cells(
    rows: Sequence[Row],
    questions: Sequence[EvalPrompt],
    answers: Mapping[str, Sequence[Answer]],
    predictions: Mapping[str, Sequence[Prediction]],
) -> Iterator[list[Any]]:
    """Yield the columns of the file of predictions, for some of its rows."""
    yield from zip(*((row.id, row.group, row.question, row.answer) for row in rows), strict=True)
    yield [len(question.reference) for question in questions]
    for model, found in answers.items():
        yield [answer.text for answer in found]
        yield [prediction.right for prediction in predictions[model]]
        yield [answer.complete for answer in found]
        yield [answer.tokens for answer in found]
        yield [answer.reference_loss for answer in found]


def ask_tuned(
    questions: Sequence[EvalPrompt], tokenizer: Any, settings: AskBase, limit: int, exports_gguf: bool
) -> ModelAnswers:
    """Ask the tuned model, with the engine that asked the base model."""
    folders, engine = _find_tuned(settings, exports_gguf)
    logger.info("asking the tuned model %d questions", len(questions))
    return ask_model(
        folders,
        engine,
        tokenizer,
        questions,
        settings.batch_size,
        limit,
        settings.dtype,
        lambda done: show_progress(logger, done, len(questions), "tuned"),
    )


def _find_tuned(settings: AskBase, exports_gguf: bool) -> tuple[ModelFolders, EngineName]:
    base = artifacts("fetch_base")
    engine = pick_engine(settings.engine, base, exports_gguf)
    gguf = find_exported() / GGUF
    return ModelFolders(base, artifacts("finetune"), gguf if engine == "paged" else None), engine


def find_compression(engine: EngineName) -> str | None:
    """Return which smaller model is asked; None for the exported one.

    Raises:
        InputError: one was chosen, and the engine reads another format.
    """
    serving = find_exported() / SERVING
    if not serving.exists():
        return None
    compression = read_json(serving).get("compression")
    if compression and engine != "paged":
        raise InputError(
            f"compress chose {compression['variant']}, a GGUF file, and the engine {engine} does not read it",
            "set compress.choose: null, or evaluate where the engine paged runs",
        )
    return compression["variant"] if compression else None


def run_simulation(
    all_rows: Sequence[Row],
    simulator: Simulator | None,
    tokenizer: Any,
    task: Task,
    params: Params,
    limit: int,
) -> dict[str, Any] | None:
    """Run test conversations with the tuned model's own calls; None without a simulator."""
    settings = params.evaluate
    if simulator is None or settings.simulator is None:
        return None
    rows = choose_conversations(all_rows, settings.simulated_conversations, settings.seed)
    logger.info("running %d conversations in %s", len(rows), settings.simulator)
    folders, engine = _find_tuned(params.ask_base, params.export.gguf)
    ask = load_asker(folders, engine, tokenizer, params.ask_base.batch_size, limit, params.ask_base.dtype)
    context = count_context_tokens(read_config(folders.base), count_virtual_tokens(artifacts("finetune")))
    room = None if context is None else context - limit
    outcomes = simulate(rows, simulator, ask, tokenizer, task, room, 60.0 * settings.simulated_minutes)
    sampling = Sampling(settings.confidence, settings.resamples, settings.seed)
    found = summarise_simulation(settings.simulator, outcomes, len(rows), sampling)
    for reason, count in found["simulator_errors"].items():
        logger.warning("the simulator ended %d of %d conversations: %s", count, len(rows), reason)
    return found


def compare_preferences(
    rows: Sequence[Row],
    base_answers: Mapping[str, Answer],
    tuned_answers: Sequence[Answer],
    tokenizer: Any,
    own_tokenizer: Any,
    params: Params,
) -> dict[str, Any] | None:
    """Return the preference on the test pairs of the model that training started from and of the tuned one.

    None where no test row has a rejected answer. A start from an adapter is computed by transformers: it has
    no GGUF.

    Args:
        own_tokenizer: of the tuned model; `tokenizer` where it is that of the base model.
    """
    found = find_pairs(rows, tokenizer, params.evaluate.min_preference_pairs)
    if found is None:
        if params.finetune.method in PREFERENCE_METHODS:
            logger.warning("no test row has a rejected answer: preferences are not measured on the test")
        return None
    asks, folder = params.ask_base, params.finetune.warm_start_from
    initial = read_initial_adapter(Path(folder)) if folder else None
    tuned, engine = _find_tuned(asks, params.export.gguf)

    def score_with(model: ModelFolders, engine: EngineName, tokenizer: Any) -> Score:
        size, dtype = asks.batch_size, asks.dtype
        return lambda questions: score_references(model, engine, tokenizer, questions, size, dtype)

    before = (
        Scorer(score_with(ModelFolders(tuned.base, initial.folder), "transformers", tokenizer))
        if initial
        else Scorer(score_with(ModelFolders(tuned.base), engine, tokenizer), base_answers)
    )
    asked = {row.id: answer for row, answer in zip(rows, tuned_answers, strict=True)}
    same = own_tokenizer is tokenizer
    pairs = None if same else encode_pairs(own_tokenizer, [pair.row for pair in found.pairs])[0]
    settings = params.evaluate
    report = measure_preferences(
        found,
        before,
        Scorer(score_with(tuned, engine, own_tokenizer), asked, pairs),
        Sampling(settings.confidence, settings.resamples, settings.seed),
    )
    report["started_from"] = initial.version if initial else "base"
    _log_preferences(report)
    return report


def _log_preferences(report: Mapping[str, Any]) -> None:
    if "skipped" in report:
        logger.warning("preferences are not measured on the test: %s", report["skipped"])
        return
    before, tuned = (report[name]["accuracy"]["value"] for name in ("before", "tuned"))
    p_value = report["difference"]["accuracy"]["p_value"]
    logger.info(
        "the better answer is the likelier one in %.1f %% of %d test pairs, before in %.1f %% (p %.4f)",
        100 * tuned,
        report["pairs"],
        100 * before,
        p_value,
    )


def find_simulator(name: str | None, task: Task) -> Simulator | None:
    """Return the simulator that is named, before anything is computed.

    Raises:
        InputError: it cannot be loaded, or the answers of the task call no tools.
    """
    if name is None:
        return None
    if task.kind != "tools":
        raise InputError(
            f"evaluate.simulator is {name}, and the task is of the kind {task.kind}, which calls no tools",
            "set evaluate.simulator: null, or task.kind: tools",
        )
    return load_simulator(name)


def _predictions(rows: Sequence[Row], answers: Sequence[Answer], task: Task) -> list[Prediction]:
    return [
        Prediction(answer.text, task.is_right(answer.text, row.answer), answer.reference_loss)
        for row, answer in zip(rows, answers, strict=True)
    ]


def main() -> None:
    """Ask the tuned model, compare both models' answers, and write the results."""
    params = load_params()
    settings, task = params.evaluate, read_task()
    base_answers = read_answers(artifacts("ask_base") / "answers.parquet")
    base_report = read_json(reports("ask_base") / "metrics.json")
    simulator = find_simulator(settings.simulator, task)
    all_rows = read_rows(artifacts("split") / "test.parquet")
    rows = pick_asked(all_rows, base_answers)
    check_references(rows, task)
    compression = find_compression(_find_tuned(params.ask_base, params.export.gguf)[1])
    base, folder = artifacts("fetch_base"), find_tokenizer()
    own = prepare_asking(folder, rows, base_report["answer_limit_tokens"], params.ask_base.max_new_tokens)
    # A perplexity is by token: both models' are by the base model's.
    tokenizer = own.tokenizer if folder == base else load_tokenizer(base)
    questions = own.questions if folder == base else encode_questions(tokenizer, rows)
    asked = ask_tuned(own.questions, own.tokenizer, params.ask_base, own.limit, params.export.gguf)
    answers = {"base": list(base_answers.values()), "tuned": asked.answers}
    metrics = {name: score(rows, questions, answers[name], task) for name in answers}
    for name in metrics:
        check_finite(metrics[name], name)
    predictions = {name: _predictions(rows, answers[name], task) for name in answers}
    tuned = [answer.text for answer in answers["tuned"]]
    errors = list_errors(rows, predictions["base"], predictions["tuned"], task)
    confused = count_confusions(*read_classes(rows, tuned, task)) if task.class_name else []
    sampling = Sampling(settings.confidence, settings.resamples, settings.seed)
    report: dict[str, Any] = {
        "task": task.kind,
        "class_name": task.class_name,
        "engine": {"base": base_report["engine"], "tuned": asked.engine},
        "dtype": asked.dtype,
        "compression": compression,
        "test_rows": base_report["test_rows"],
        "answer_limit_tokens": own.limit,
        "references_over_limit": base_report["references_over_limit"],
        **summarise(rows, metrics, task, params.task.slices, sampling),
        "classes": compute_class_results(rows, tuned, task),
        "confusions": [{"expected": e, "answered": a, "n": n} for e, a, n in confused],
        "calibration": measure_calibration(
            rows, questions, tuned, tokenizer, task, params.ask_base.batch_size
        ),
        "errors": {
            "rows": len(errors),
            "by_type": dict(sorted(Counter(wrong.error_type for wrong in errors).items())),
            "right_in_base_only": sum(wrong.base_was_right for wrong in errors),
        },
        "preferences": compare_preferences(
            rows, base_answers, asked.answers, tokenizer, own.tokenizer, params
        ),
        "simulation": run_simulation(all_rows, simulator, own.tokenizer, task, params, own.limit),
        "throughput": {"tuned": compute_throughput(asked)},
    }

    write_predictions(artifacts("evaluate") / "predictions.parquet", rows, questions, answers, predictions)
    folder = reports("evaluate")
    write_lines(folder / "errors.csv", format_errors_csv(errors))
    write_text(
        folder / "errors.md", format_errors_page(errors, len(rows), confused, settings.errors_shown, task)
    )
    with atomic_dir(folder / "plots") as plots:
        draw_report(plots, report)
    write_json(folder / "metrics.json", report)
    for name in answers:
        best = report[name][task.primary]
        logger.info(
            "%s: %s %.3f (%.3f to %.3f)", name, task.primary, best["value"], best["low"], best["high"]
        )
    logger.info("%s", report["resolution"]["statement"])


if __name__ == "__main__":
    run_stage(main, "lower ask_base.batch_size or ask_base.max_new_tokens, or choose a smaller base model")
