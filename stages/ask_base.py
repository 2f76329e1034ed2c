"""Ask base: put the test questions to the base model, and choose which test rows are asked.

In: `artifacts/split/test.parquet`, `artifacts/fetch_base`.
Out: `artifacts/ask_base/answers.parquet` with the answer to each chosen row; `reports/ask_base/metrics.json`.
Run: `python -m stages.ask_base`

A stage of its own: a new adapter on the same base, asked the same rows, needs no new answers of the base.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from operator import itemgetter

from services.engines.offline import (
    ModelFolders,
    answer_limit,
    ask_model,
    compute_throughput,
)
from services.engines.support import pick_engine
from stages.common.artifacts import artifacts, reports, write_json
from stages.common.chat.fitting import count_reasons, describe_misfits, select_askable
from stages.common.errors import InputError
from stages.common.logs import get_logger, run_stage, show_progress
from stages.common.model.generation import encode_questions, write_answers
from stages.common.model.loading import count_context_tokens, load_tokenizer, read_config
from stages.common.params.loading import load_params
from stages.common.records import Row, read_rows
from stages.common.spool import pick, view
from stages.common.statistics.sizes import choose_max_test_rows, choose_min_test_rows

logger = get_logger("ask_base")


def choose_rows(rows: Sequence[Row], max_rows: int | None, min_rows: int, seed: int) -> Sequence[Row]:
    """Return the rows to ask, in their order, at most `max_rows` of them; None asks all.

    Raises:
        InputError: they are fewer than `min_rows`, or all of one group.
    """
    if len(rows) < min_rows:
        raise InputError(
            f"the test split has {len(rows)} rows, fewer than ask_base.min_test_rows ({min_rows})",
            "collect more rows, raise split.test_fraction or split.max_test_rows_per_group, "
            "or set ask_base.min_test_rows to a lower number",
        )
    if max_rows is not None and len(rows) > max_rows:
        rows = pick(rows, sorted(random.Random(seed).sample(range(len(rows)), max_rows)))
    if len({row.group for row in rows}) < 2:
        raise InputError(
            f"all {len(rows)} test rows are of one group ({rows[0].group})",
            "an interval needs several: give rows their own groups (group_column of the source), "
            "or raise split.test_fraction",
        )
    return rows


def main() -> None:
    """Choose the test rows, ask the base model, and write its answers."""
    params = load_params()
    settings = params.ask_base
    all_rows = read_rows(artifacts("split") / "test.parquet")
    base = artifacts("fetch_base")
    tokenizer = load_tokenizer(base)
    askable, misfits = select_askable(
        tokenizer,
        all_rows,
        settings.max_new_tokens,
        # As preflight has it: its list of rejected rows is what this stage depends on.
        count_context_tokens(read_config(base), params.finetune.virtual_tokens),
        lambda done: show_progress(logger, done, len(all_rows), "rows encoded"),
    )
    if misfits:
        logger.warning("%d test rows excluded: %s", len(misfits), count_reasons(misfits))
        logger.warning("excluded:\n%s", describe_misfits(misfits, 3))
    max_rows, min_rows = choose_max_test_rows(settings.max_rows), choose_min_test_rows(settings.min_test_rows)
    rows = choose_rows(view(askable, itemgetter(0)), max_rows, min_rows, settings.seed)
    questions = encode_questions(tokenizer, rows)
    limit = answer_limit(questions, settings.max_new_tokens)
    over_limit = sum(len(question.reference) > limit for question in questions)
    if over_limit:
        logger.warning("%d references are longer than ask_base.max_new_tokens (%d)", over_limit, limit)
    engine = pick_engine(settings.engine, base, params.export.gguf)
    logger.info("asking the base model %d questions", len(questions))
    asked = ask_model(
        ModelFolders(base),
        engine,
        tokenizer,
        questions,
        settings.batch_size,
        limit,
        settings.dtype,
        lambda done: show_progress(logger, done, len(questions), "base"),
    )
    write_answers(artifacts("ask_base") / "answers.parquet", rows, asked.answers)
    write_json(
        reports("ask_base") / "metrics.json",
        {
            "rows": len(rows),
            "test_rows": len(all_rows),
            "rejected_rows": len(misfits),
            "answer_limit_tokens": limit,
            "references_over_limit": over_limit,
            "engine": asked.engine,
            "dtype": asked.dtype,
            "finished": sum(answer.complete for answer in asked.answers),
            "throughput": compute_throughput(asked),
        },
    )
    logger.info("%s: %d answers in %.0f s", asked.engine, len(rows), asked.seconds)


if __name__ == "__main__":
    run_stage(main, "lower ask_base.batch_size or ask_base.max_new_tokens, or choose a smaller base model")
