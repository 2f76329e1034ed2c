"""Turn user feedback into training rows and held-out rows.

A correction gives the right answer, and the answer that it replaces as the worse one of a pair; a thumb up
confirms the answer shown. A thumb down alone gives no right answer: with `thumbs_down_as_refusal` it becomes
a row whose answer is marked as bad, for training with ratings, else nothing. A user may try to poison the
model by feedback, so every rule of `monitoring.feedback` in `params.yaml` removes rows and reports how many:

    label       a thumb down alone, or a comment, is no label
    form        no conversation, one with tools where the task is of another kind, a question or label that is
                empty or too long or names personal data, no JSON where the task is JSON, a label outside the
                answers' schema
    suspicion   what the guard found in the exchange
    repetition  one person's older labels of one question
    users       max_rows_per_user, the newest stay
    keys        max_share_per_key of the labels, or of all exchanges where one key gives alone; what one user
                may give, a key may too
    agreement   labels that contradict each other
    duplicates  one row a question
    number      max_rows, the newest stay

Some questions are kept apart to judge a challenger by. Which ones follows from a hash of the question, or of
the session for conversations (`monitoring.feedback.sides`): the same question is on the same side in every
retraining, the turns of a session are on one side, and what was ever held out is never learned.

`perennial feedback` (`flows.feedback`) shows what the feedback in the event store would become.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from monitoring.feedback.label_rules import (
    keep_agreed,
    keep_newest,
    keep_newest_per_person,
    keep_one_per_prompt,
    keep_unconfirmed,
    limit_keys,
    limit_users,
)
from monitoring.feedback.labels import (
    COMPACT,
    REASONS,
    SPACED,
    Counts,
    Excluded,
    Label,
    ServedTask,
    hash_prompt,
    make_pseudonym,
    make_tool,
    name_key,
    read_labels,
)
from monitoring.feedback.sides import find_apart, name_groups
from services.events import read_joined
from services.events.turns import read_turn, write_turns
from stages.common.artifacts import STATE, read_lines, reports, write_json, write_text
from stages.common.errors import InputError
from stages.common.logs import get_logger
from stages.common.messages import Message
from stages.common.records import Row, make_row

if TYPE_CHECKING:
    from stages.common.params.loop import FeedbackSettings

logger = get_logger("feedback")

ROWS = Path("data") / "feedback" / "rows.jsonl"
HELD_OUT = STATE / "holdout" / "rows.jsonl"
HELD_OUT_PROMPTS = STATE / "holdout" / "prompts.txt"
REPORT = reports("feedback").with_suffix(".json")

MAX_NAMED = 5  # users in the report


@dataclass(frozen=True, slots=True)
class Labelled:
    """Training rows, held-out rows, and the report on both.

    Attributes:
        refused: rows for training whose answer people found bad.
    """

    train: list[Row]
    holdout: list[Row]
    report: dict[str, Any]
    refused: list[Row] = field(default_factory=list)


def label_rows(
    url: str,
    start: float,
    end: float,
    settings: FeedbackSettings,
    task: ServedTask,
    held_out: frozenset[str] = frozenset(),
) -> Labelled:
    """Return the rows that feedback on the exchanges received in [start, end) (unix s) becomes.

    The same events give the same rows, in the same order. Feedback from `end` on does not count: a
    retraining that is started again gathers the same. Only exchanges with feedback are kept in memory.

    Args:
        url: of the event store.
        held_out: hashes of questions and sessions that were held out before (`read_held_out_before`).

    Raises:
        InputError: the event store cannot be read.
    """
    counts = Counts()
    labels: list[Label] = []
    for batch in read_joined(url, start, end):
        labels += read_labels(batch, end, settings, task, counts)
    groups = name_groups(labels)
    refusals = [label for label in labels if label.kind == "refusal"]
    labels = [label for label in labels if label.kind != "refusal"]
    steps = {"labels": len(labels)}

    def share_keys(some: list[Label]) -> tuple[list[Label], Excluded]:
        share, at_least = settings.max_share_per_key, settings.max_rows_per_user
        return limit_keys(some, share, at_least, len(counts.keys), counts.exchanges)

    rules: tuple[tuple[str, Callable[[list[Label]], tuple[list[Label], Excluded]]], ...] = (
        ("newest of a person", keep_newest_per_person),
        ("users", lambda some: limit_users(some, settings.max_rows_per_user)),
        ("keys", share_keys),
        ("agreement", lambda some: keep_agreed(some, settings.min_agreement)),
        ("duplicates", keep_one_per_prompt),
        # Duplicates of others went: the share of a key has grown by it.
        ("keys again", share_keys),
        ("number", lambda some: keep_newest(some, settings.max_rows, "row_limit")),
    )
    for name, rule in rules:
        labels, excluded = rule(labels)
        counts.excluded += excluded
        steps[name] = len(labels)
        if name != "agreement":  # two refused answers to one question do not contradict each other
            refusals, excluded = rule(refusals)
            counts.excluded += excluded
    style = max((COMPACT, SPACED), key=lambda one: (counts.styles[one], one == COMPACT))
    sides: dict[bool, list[Row]] = {False: [], True: []}
    apart = find_apart(labels, groups, settings.holdout_share, settings.seed, held_out)
    for label in sorted(labels, key=lambda one: one.prompt_hash):
        group = groups[label.request_id]
        sides[group in apart].append(_row(label, group, settings.license, task, style))
    refusals, excluded = keep_unconfirmed(refusals, labels)
    counts.excluded += excluded
    apart |= find_apart(refusals, groups, settings.holdout_share, settings.seed, held_out)
    free = [label for label in refusals if groups[label.request_id] not in apart]
    counts.excluded += Counter(
        ("held_out", name_key(label.key)) for label in refusals if groups[label.request_id] in apart
    )
    refused = [
        _refused_row(label, groups[label.request_id], settings.license, task)
        for label in sorted(free, key=lambda one: one.prompt_hash)
    ]
    report = _report(sides, labels, counts, steps) | {"rows_refused": len(refused)}
    return Labelled(sides[False], sides[True], report, refused)


def _row(label: Label, group: str, license: str, task: ServedTask, style: tuple[str, str]) -> Row:
    text, tags = label.value, {"feedback": str(label.kind)}
    if task.answers.class_name and (found := task.answers.read_class(text)):
        tags[task.answers.class_name] = found
    answer = task.answers.to_message(task.answers.rewrite(text, task.answer_schema, style))
    answer = replace(answer, reasoning=label.reasoning)
    rejected = task.answers.to_message(label.rejected) if label.rejected is not None else None
    messages = [*_before(label), answer]
    return make_row(
        messages, "feedback", license, f"feedback/{group}", tags, "feedback", label.tools, rejected
    )


def _refused_row(label: Label, group: str, license: str, task: ServedTask) -> Row:
    answer = task.answers.to_message(label.value)
    return make_row(
        [*_before(label), answer],
        "feedback",
        license,
        f"feedback/{group}",
        {"feedback": str(label.kind)},
        "feedback",
        label.tools,
        is_desirable=False,
    )


def _before(label: Label) -> list[Message]:
    """Return the prompt; only the last answer is learned: no one judged the earlier ones."""
    return [replace(one, is_learned=False) if one.role == "assistant" else one for one in label.prompt]


def _report(
    sides: Mapping[bool, Sequence[Row]], labels: Sequence[Label], counts: Counts, steps: Mapping[str, int]
) -> dict[str, Any]:
    rows = [*sides[False], *sides[True]]
    by_user = Counter(make_pseudonym(label.user) for label in labels)
    by_key = Counter(name_key(label.key) for label in labels)
    # The users with the most feedback come first: a flood is seen even if its rows were excluded.
    users = sorted(counts.given_by_user, key=lambda name: (-counts.given_by_user[name], name))[:MAX_NAMED]
    return {
        "exchanges": counts.exchanges,
        "given": counts.given,
        "excluded": _by_reason(counts.excluded, counts.given_by_key),
        "labelled_rows": len(rows),
        "rows_train": len(sides[False]),
        "rows_holdout": len(sides[True]),
        "steps": dict(steps),
        "by_kind": dict(sorted(Counter(row.tags["feedback"] for row in rows).items())),
        "by_label": _by_label(rows),
        "by_error": dict(sorted(Counter(label.error for label in labels if label.error).items())),
        "by_user": [{"user": u, "given": counts.given_by_user[u], "rows": by_user[u]} for u in users],
        "by_key": {
            key: {
                "given": counts.given_by_key[key],
                "rows": by_key[key],
                "excluded": _by_reason(counts.excluded, [key]),
            }
            for key in sorted(counts.given_by_key)
        },
    }


def _by_reason(excluded: Excluded, keys: Iterable[str]) -> dict[str, int]:
    """Return how many rows of these API keys are excluded, by reason."""
    counts = {reason: sum(excluded[reason, key] for key in keys) for reason in REASONS}
    return {reason: count for reason, count in counts.items() if count}


def _by_label(rows: Sequence[Row]) -> dict[str, int]:
    values = (value for row in rows for key, value in row.tags.items() if key != "feedback")
    return dict(sorted(Counter(values).items()))


def read_held_out_before(root: Path = Path()) -> frozenset[str]:
    """Return the hashes of all questions and sessions ever held out."""
    path = root / HELD_OUT_PROMPTS
    return frozenset(path.read_text(encoding="utf-8").split()) if path.is_file() else frozenset()


def write_labelled(root: Path, labelled: Labelled) -> None:
    """Write the rows to learn, those held out, and the report; equal rows give equal bytes.

    The questions held out are written first: a run that is killed here has at most held out more.
    """
    groups = {row.group.removeprefix("feedback/") for row in labelled.holdout}
    questions = {hash_prompt(row.messages[:-1]) for row in labelled.holdout}
    held_out = groups | questions | read_held_out_before(root)
    write_text(root / HELD_OUT_PROMPTS, "".join(f"{question}\n" for question in sorted(held_out)))
    write_text(root / HELD_OUT, format_rows(labelled.holdout))
    write_text(root / ROWS, format_rows([*labelled.train, *labelled.refused]))
    write_json(root / REPORT, labelled.report)


def format_rows(rows: Iterable[Row]) -> str:
    """Return one JSON object a line, with the fields of a row."""
    return "".join(json.dumps(_to_fields(row), ensure_ascii=False) + "\n" for row in rows)


def _to_fields(row: Row) -> dict[str, Any]:
    """Return a row as plain values, its conversation as files of rows have it.

    Keys are sorted, but for those of arguments and tools: the model reads them in their order.
    """
    fields = {name: getattr(row, name) for name in ("id", "source", "license", "group", "origin")}
    turns = write_turns(row.messages)
    for turn, message in zip(turns, row.messages, strict=True):
        if message.is_learned is False:
            turn["weight"] = 0
    more: dict[str, Any] = {"tools": [tool.value for tool in row.tools]} if row.tools else {}
    if row.rejected:
        more["rejected"] = [dict(sorted(turn.items())) for turn in write_turns([row.rejected])]
    if row.is_desirable is not None:
        more["is_desirable"] = row.is_desirable
    messages = [dict(sorted(turn.items())) for turn in turns]
    return dict(
        sorted({**fields, "messages": messages, "tags": dict(sorted(row.tags.items())), **more}.items())
    )


def read_labelled(path: Path) -> list[Row]:
    """Read the rows that `write_labelled` wrote; none where the file is not there.

    Raises:
        InputError: a line is no row.
    """
    if not path.is_file():
        return []
    rows = []
    for number, line in enumerate(read_lines(path), start=1):
        try:
            fields = json.loads(line)
            messages = tuple(
                replace(read_turn(turn), is_learned=False if turn.get("weight") == 0 else None)
                for turn in fields["messages"]
            )
            tools = tuple(map(make_tool, fields.pop("tools", ())))
            worse = fields.pop("rejected", None)
            rejected = read_turn(worse[0]) if worse else None
            rows.append(Row(**{**fields, "messages": messages, "tools": tools, "rejected": rejected}))
        except (ValueError, TypeError, KeyError) as error:
            raise InputError(
                f"{path}:{number} is not a valid row: {error!r}",
                f"remove {path}; `perennial feedback --write` writes it again",
            ) from None
    return rows


def summarise_exclusions(report: Mapping[str, Any]) -> str:
    """Return how much feedback became no row and the main reason; empty if all did."""
    excluded = report["excluded"]
    if not excluded:
        return ""
    most = max(excluded, key=lambda reason: excluded[reason])
    return f"{sum(excluded.values()):,} of {report['given']:,} excluded, most: {REASONS[most]}"


def format_report(report: Mapping[str, Any]) -> str:
    """Return the report as Markdown."""
    lines = [
        f"{report['given']:,} pieces of feedback on {report['exchanges']:,} answers became "
        f"**{report['rows_train']:,} rows to learn** and {report['rows_holdout']:,} held out.",
        "",
    ]
    if refused := report.get("rows_refused"):
        lines += [f"{refused:,} refused answers are learned from by `finetune.method: kto` only.", ""]
    if report["excluded"]:
        lines += ["| excluded | rows | reason |", "|---|---:|---|"]
        lines += [f"| {name} | {count:,} | {REASONS[name]} |" for name, count in report["excluded"].items()]
        lines.append("")
    if report["excluded"].get("key_share") and len(report["by_key"]) == 1:
        lines += [
            "All of it came from one key; if you trust it, raise `monitoring.feedback.max_share_per_key`.",
            "",
        ]
    if report.get("by_error"):
        lines += ["| what corrections changed | rows |", "|---|---:|"]
        lines += [f"| {name} | {count:,} |" for name, count in report["by_error"].items()]
        lines.append("")
    if report["by_user"]:
        lines += ["| most active users | feedback | rows |", "|---|---:|---:|"]
        lines += [f"| {one['user']} | {one['given']:,} | {one['rows']:,} |" for one in report["by_user"]]
        lines.append("")
    if set(report["by_key"]) - {"(none)"}:
        lines += ["| key | feedback | rows | excluded |", "|---|---:|---:|---|"]
        lines += [
            f"| {key} | {one['given']:,} | {one['rows']:,} | {_format_counts(one['excluded'])} |"
            for key, one in report["by_key"].items()
        ]
        lines.append("")
    return "\n".join(lines)


def _format_counts(excluded: Mapping[str, int]) -> str:
    return ", ".join(f"{reason} {count:,}" for reason, count in excluded.items()) or "none"
