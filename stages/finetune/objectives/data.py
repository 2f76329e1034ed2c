"""Which rows are trained on, and by what objective: answers, pairs of answers, or rated answers."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from operator import itemgetter
from typing import TYPE_CHECKING, Any, TypeVar

from stages.common.artifacts import artifacts, missing
from stages.common.chat.fitting import (
    LONG,
    Misfit,
    count_reasons,
    describe_misfits,
    encode_fitting,
    list_with_room,
    select_misfits,
    select_rows,
    suggest_for_long,
)
from stages.common.chat.preferences import Pair, RatedAnswer, encode_pairs, encode_ratings
from stages.common.chat.template import Encoded
from stages.common.errors import InputError
from stages.common.logs import get_logger, show_progress
from stages.common.model.adapter import InitialAdapter
from stages.common.model.loading import load_tokenizer
from stages.common.model.teacher import check_same_tokens, describe_teacher, find_teacher
from stages.common.params.loading import Params
from stages.common.records import Row, read_rows
from stages.common.spool import join, pick, view
from stages.common.task.kinds import read_task
from stages.finetune.batches import encode_rows
from stages.finetune.objectives.rewards import make_checks

if TYPE_CHECKING:
    from stages.finetune.objectives.protocol import Objective

logger = get_logger("finetune")

REFUSED_ANSWERS = artifacts("split") / "refused.parquet"
# Of good and bad answers by their weights: Ethayarajh et al. 2024, section 4.2.
LEAST_BALANCE, MOST_BALANCE = 1.0, 4 / 3

T = TypeVar("T", Pair, RatedAnswer)


@dataclass(frozen=True, slots=True)
class TrainingData:
    """What is trained on.

    Attributes:
        sequences: everything that is learned from, as token ids.
        marks: what else decides a run: ratings, and the ids of what is held out.
        row_ids: the id of the row of each number of the objective.
        rows: how many rows are learned; not_replayed: how many are not, which the adapter was trained on.
        misfits: rows that are too long, or that the chat template refuses.
        report: further counts for the metrics.
        make_objective: builds the objective, which needs torch.
    """

    sequences: Sequence[Encoded]
    row_ids: Sequence[str]
    rows: int
    not_replayed: int
    misfits: Sequence[Misfit]
    make_objective: Callable[[], Objective]
    marks: Any = ()
    report: dict[str, Any] = field(default_factory=dict)


def read_training_data(
    everything: Params,
    tokenizer: Any,
    rows: Sequence[Row],
    validation: Sequence[Row],
    initial: InitialAdapter | None,
    limit: int,
    labels: Sequence[str] = (),
) -> TrainingData:
    """Return what `finetune.method` trains on.

    Args:
        initial: the adapter that training starts from.
        limit: the most tokens of a row.
        labels: of the task, for the method head.

    Raises:
        InputError: there is nothing to train on, or a row is too long and `on_long_row` is `stop`.
    """
    method = everything.finetune.method
    if method in ("dpo", "orpo"):
        return _read_pairs(everything, tokenizer, rows, validation, limit)
    if method == "kto":
        return _read_ratings(everything, tokenizer, rows, validation, limit)
    if method == "grpo":
        return _read_prompts(everything, tokenizer, rows, limit)
    return _read_answers(everything, tokenizer, rows, initial, limit, labels)


def _read_answers(
    everything: Params,
    tokenizer: Any,
    rows: Sequence[Row],
    initial: InitialAdapter | None,
    limit: int,
    labels: Sequence[str],
) -> TrainingData:
    params = everything.finetune
    trained_ids = initial.read_trained_ids() if initial else frozenset()
    selected = select_rows(rows, initial, trained_ids, params.replay_share, params.seed)
    turns = everything.task.turns
    not_replayed = len(rows) - len(selected)
    teacher = find_teacher(params.taught_by) if params.taught_by else None
    report: dict[str, Any] = {"teacher": params.taught_by} if teacher else {}
    if teacher and params.distill == "answers":
        from stages.finetune.objectives.teaching import replace_answers

        tokens = everything.ask_base.max_new_tokens
        selected, left_out = replace_answers(teacher, selected, read_task(), tokens, params.dtype)
        report["teacher_answers_left_out"] = dict(left_out)
        if left_out:
            logger.warning("answers of the teacher that are not learned: %s", dict(left_out))
    examples, row_ids, misfits = encode_rows(
        tokenizer,
        selected,
        params.max_length,
        params.on_long_row,
        turns,
        limit,
        labels,
        params.virtual_tokens,
    )
    compares = teacher is not None and params.distill == "logits"
    if teacher and compares:
        check_same_tokens(load_tokenizer(teacher), tokenizer, str(params.taught_by))

    def make_objective() -> Objective:
        from stages.finetune.objectives.answers import Answers

        if not (teacher and compares):
            return Answers(examples)
        from stages.finetune.objectives.distillation import Distillation
        from stages.finetune.objectives.teaching import load_teacher

        model, pad = load_teacher(teacher, params.dtype), tokenizer.pad_token_id
        return Distillation(examples, model, pad, params.teacher_weight, params.temperature)

    marks = describe_teacher(teacher) if teacher else ()
    learned = len(selected) - len(misfits)
    return TrainingData(examples, row_ids, learned, not_replayed, misfits, make_objective, marks, report)


def _read_prompts(everything: Params, tokenizer: Any, rows: Sequence[Row], limit: int) -> TrainingData:
    params, task = everything.finetune, read_task()
    fitting, misfits = encode_fitting(tokenizer, rows, limit, _follow(rows))
    _check_long(misfits, params.on_long_row, params.max_length, limit)
    examples = view(fitting, itemgetter(1))
    asked, room = list_with_room(examples, len(rows), limit, everything.ask_base.max_new_tokens)
    if len(asked) < len(fitting):
        logger.warning(
            "%d prompts are not asked: with an answer of %d tokens they exceed %d",
            len(fitting) - len(asked),
            room,
            limit,
        )
    pairs = pick(fitting, asked)
    prompts, examples = view(pairs, itemgetter(0)), view(pairs, itemgetter(1))
    checks = make_checks(task, [row.answer for row in rows], params.rewards.model_dump(by_alias=True))

    def make_objective() -> Objective:
        from stages.finetune.objectives.groups import Groups

        return Groups(
            prompts,
            examples,
            tokenizer,
            checks,
            group_size=params.group_size,
            limit=room,
            temperature=params.temperature,
            kl_weight=params.kl_weight,
            epsilon=params.epsilon,
            seed=params.seed,
        )

    return TrainingData(
        examples,
        view(prompts, lambda row: row.id),
        len(asked),
        0,
        misfits,
        make_objective,
        {"task": task.describe(), "schema": checks.schema, "tokens": room},
        {"prompts_without_room": len(fitting) - len(asked)},
    )


def _read_pairs(
    everything: Params, tokenizer: Any, rows: Sequence[Row], validation: Sequence[Row], limit: int
) -> TrainingData:
    params = everything.finetune
    pairs, misfits = encode_pairs(tokenizer, rows, limit, _follow(rows))
    _check_long(misfits, params.on_long_row, params.max_length, limit)
    if not pairs:
        raise InputError(
            f"no training row has a rejected answer that finetune.method: {params.method} could learn from",
            "collect corrections (perennial feedback), or give a file with the columns prompt, chosen and "
            "rejected (docs/how-to/methods.md)",
        )
    asked = encode_pairs(tokenizer, validation, limit)[0]
    learned, held_out = hold_out(pairs, asked, params.held_out_share, params.seed)

    def make_objective() -> Objective:
        from stages.finetune.objectives.pairs import Pairs

        return Pairs(learned, held_out, params.beta, has_reference=params.method == "dpo")

    sequences = join(view(learned, lambda pair: pair.chosen), view(learned, lambda pair: pair.rejected))
    return TrainingData(
        sequences,
        view(learned, _read_id),
        len(learned),
        0,
        misfits,
        make_objective,
        _list_ids(held_out),
        _count(rows, pairs, misfits, learned, held_out),
    )


def _read_ratings(
    everything: Params, tokenizer: Any, rows: Sequence[Row], validation: Sequence[Row], limit: int
) -> TrainingData:
    params = everything.finetune
    if not REFUSED_ANSWERS.exists():
        raise missing(REFUSED_ANSWERS)
    refused = read_rows(REFUSED_ANSWERS)
    rows = join(rows, refused)
    rated, misfits = encode_ratings(tokenizer, rows, limit, _follow(rows))
    _check_long(misfits, params.on_long_row, params.max_length, limit)
    asked = encode_ratings(tokenizer, validation, limit)[0]
    learned, held_out = hold_out(rated, asked if _has_both(asked) else [], params.held_out_share, params.seed)
    if _has_both(rated) and not _has_both(learned):
        logger.warning("no ratings are held out: without them there would be only good or only bad answers")
        learned, held_out = rated, []
    if not _has_both(learned):
        good, bad = count_ratings(learned)
        raise InputError(
            f"finetune.method: kto learns from good and from bad answers, and there are {good} and {bad}",
            "set monitoring.feedback.thumbs_down_as_refusal: true, or give a file with the columns prompt, "
            "completion and label (docs/how-to/methods.md)",
        )
    good, bad = count_ratings(learned)
    if advice := describe_imbalance(good, bad, params.desirable_weight, params.undesirable_weight):
        logger.warning("%s", advice)

    def make_objective() -> Objective:
        from stages.finetune.objectives.ratings import Ratings

        weights = params.desirable_weight, params.undesirable_weight
        return Ratings(learned, held_out, params.beta, weights)

    return TrainingData(
        view(learned, lambda one: one.answer),
        view(learned, _read_id),
        len({one.row.id for one in learned}),
        0,
        _list_rows(misfits, rated),
        make_objective,
        {"good": [one.is_desirable for one in learned], "held_out": _list_ids(held_out)},
        _count(rows, rated, misfits, learned, held_out)
        | {"good_answers": good, "bad_answers": bad, "refused_rows_read": len(refused)},
    )


def hold_out(
    found: Sequence[T], validation: Sequence[T], share: float, seed: int
) -> tuple[Sequence[T], Sequence[T]]:
    """Return what is learned, and what is measured: of the validation rows, or a share of what was found.

    Feedback is only for training, so the validation rows may have no preferences. Then the share is drawn by
    a hash of the groups: all answers to a prompt are on one side, the same in every training.
    """
    if validation:
        return found, validation

    def is_drawn(group: str) -> bool:
        digest = hashlib.blake2b(f"{seed}/preferences/{group}".encode(), digest_size=8).digest()
        return int.from_bytes(digest) < share * 2**64

    drawn = [is_drawn(one.row.group) for one in found]
    if all(drawn):
        return found, []
    sides: dict[bool, list[int]] = {False: [], True: []}
    for number, apart in enumerate(drawn):
        sides[apart].append(number)
    return pick(found, sides[False]), pick(found, sides[True])


def count_ratings(rated: Sequence[RatedAnswer]) -> tuple[int, int]:
    """Return how many answers are good, and how many are bad."""
    good = sum(one.is_desirable for one in rated)
    return good, len(rated) - good


def describe_imbalance(good: int, bad: int, good_weight: float, bad_weight: float) -> str | None:
    """Return a warning where good and bad answers, by their weights, are far from equally many."""
    balance = good * good_weight / (bad * bad_weight)
    if LEAST_BALANCE <= balance <= MOST_BALANCE:
        return None
    advised = good * good_weight / bad
    return (
        f"{good} good and {bad} bad answers: by their weights {balance:.2f} to 1, where KTO's authors advise "
        f"{LEAST_BALANCE:g} to {MOST_BALANCE:.2f}; with finetune.desirable_weight: {good_weight:g} set "
        f"finetune.undesirable_weight between {advised / MOST_BALANCE:.2f} and {advised / LEAST_BALANCE:.2f}"
    )


def _has_both(rated: Sequence[RatedAnswer]) -> bool:
    return all(count_ratings(rated))


def _count(
    rows: Sequence[Row],
    found: Sequence[T],
    misfits: Sequence[Misfit],
    learned: Sequence[T],
    held_out: Sequence[T],
) -> dict[str, Any]:
    """Return how many rows there are without a preference, and how many of the others are learned."""
    usable, kept = {one.row.id for one in found}, {one.row.id for one in learned}
    used = usable | {misfit.row.id for misfit in misfits}
    return {
        "rows_without_preference": sum(row.id not in used for row in rows),
        "rows_held_out": len(usable - kept),
        "preferences": len(learned),
        "preferences_held_out": len(held_out),
    }


def _list_rows(misfits: Sequence[Misfit], rated: Sequence[RatedAnswer]) -> list[Misfit]:
    """Return one misfit of each row that has no other answer; both answers of a pair are rated."""
    fitting = {one.row.id for one in rated}
    by_row = {misfit.row.id: misfit for misfit in misfits}
    return [misfit for row_id, misfit in by_row.items() if row_id not in fitting]


def _check_long(misfits: Sequence[Misfit], on_long_row: str, max_length: int, limit: int) -> None:
    long = select_misfits(misfits, LONG)
    if long and on_long_row == "stop":
        raise InputError(
            f"{len(long)} answers exceed {limit} tokens with their prompt:\n{describe_misfits(long)}",
            suggest_for_long(limit, max_length),
        )
    if misfits:
        logger.info("preferences excluded: %s", count_reasons(misfits))


def _follow(rows: Sequence[Row]) -> Callable[[int], None]:
    return partial(_show, len(rows))


def _show(rows: int, done: int) -> None:
    show_progress(logger, done, rows, "rows encoded")


def _list_ids(held_out: Sequence[Pair] | Sequence[RatedAnswer]) -> list[str]:
    return [one.row.id for one in held_out]


def _read_id(one: Pair | RatedAnswer) -> str:
    return one.row.id
