"""The answers of a teacher as rows to learn, and the teacher itself, loaded to be asked."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from stages.common.artifacts import read_json, write_json
from stages.common.chat.fitting import limit_answer
from stages.common.errors import InputError
from stages.common.logs import get_logger, show_progress
from stages.common.model.generation import answer_questions, encode_questions
from stages.common.model.loading import load_base, load_tokenizer, pick_device, pick_dtype
from stages.common.model.teacher import describe_teacher
from stages.common.records import Row, format_canonical_json
from stages.common.task.protocol import Task
from stages.finetune.checkpoints import CHECKPOINTS
from stages.finetune.devices.group import count_processes, gather, get_rank, is_main
from stages.finetune.progress.validation import merge_shares

logger = get_logger("finetune")

ANSWERS = CHECKPOINTS.with_name("teacher")  # what a teacher answered, kept for a run that is killed
AT_ONCE = 16


def load_teacher(folder: Path, dtype: str) -> Any:
    """Load a teacher, which learns nothing."""
    device = pick_device()
    return load_base(folder, pick_dtype(device, dtype), device).requires_grad_(False).eval()


def replace_answers(
    folder: Path, rows: Sequence[Row], task: Task, max_new_tokens: int, dtype: str
) -> tuple[list[Row], Counter[str]]:
    """Return the rows with a teacher's answers in place of their own, and why others are left out.

    A teacher reads a prompt by its own chat template, and answers greedily. An answer that was cut, or that
    is none of the task, is left out with its row. The last turn of a conversation is answered.

    Raises:
        InputError: no answer can be learned.
    """
    texts = _read_answers(folder, rows, max_new_tokens, dtype)
    taught, left_out = [], Counter[str]()
    for row, text in zip(rows, texts, strict=True):
        problem = "cut" if text is None else "empty" if not text.strip() else task.find_problem(text)
        if text is None or problem:
            left_out["cut" if text is None else "invalid"] += 1
            continue
        # Under its own id: what was trained on is known by the rows of the split.
        taught.append(replace(row, messages=(*row.messages[:-1], task.to_message(text)), rejected=None))
    if not taught:
        raise InputError(
            f"none of the teacher's {len(rows)} answers can be learned: {dict(left_out)}",
            "choose a teacher that knows the task, or raise ask_base.max_new_tokens",
        )
    return taught, left_out


def _read_answers(folder: Path, rows: Sequence[Row], max_new_tokens: int, dtype: str) -> list[str | None]:
    """Return a teacher's answer to each row, None where it was cut; those of an earlier process are kept."""
    parts = [describe_teacher(folder), [row.id for row in rows], max_new_tokens, dtype]
    digest = hashlib.sha256(format_canonical_json(parts).encode()).hexdigest()[:16]
    path = ANSWERS / f"{digest}.json"
    found: list[str | None] | None = gather(read_json(path) if is_main() and path.is_file() else None)[0]
    if found is not None:
        logger.info("the teacher has answered %d rows before", len(found))
        return found
    model, tokenizer = load_teacher(folder, dtype), load_tokenizer(folder)
    share = encode_questions(tokenizer, rows[get_rank() :: count_processes()])
    # Of all rows, so that an answer is cut at the same place whatever process asks for it.
    longest = max(gather(max((len(question.reference) for question in share), default=0)))
    answers = answer_questions(
        model,
        tokenizer,
        share,
        AT_ONCE,
        limit_answer(longest, max_new_tokens),
        lambda done: show_progress(logger, done, len(share), "rows answered by the teacher"),
    )
    found = merge_shares(gather([answer.text if answer.complete else None for answer in answers]))
    if is_main():
        write_json(path, found)
    return found
