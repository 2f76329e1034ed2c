"""What users say of answers, made into rows to learn from, and into others to judge by.

A correction says what the answer should have been; a thumb up says that the answer shown was right. A thumb
down alone says nothing that could be learned. Whoever may give feedback may try to teach the model something
wrong. So every rule of `monitoring.feedback` in `params.yaml` takes rows away and says how many:

    label       a thumb down alone, or a comment, is no label
    form        no conversation, a question or label that is empty or too long or names personal data, no JSON
                where the task is JSON, a label outside the answers' schema
    suspicion   what the guard found in the exchange
    repetition  one person's older labels of one question
    users       max_rows_per_user, the newest stay
    keys        max_share_per_key of the labels, or of all exchanges where one key gives alone; what one user
                may give, a key may too
    agreement   labels that contradict each other
    duplicates  one row a question
    number      max_rows, the newest stay

Some questions are kept apart to judge a challenger by. Which ones follows from a hash of the question: the
same question is on the same side in every retraining, and one that was ever held out is never learned.

Run: `python -m monitoring.feedback [--write]` to see what the feedback in the event store would become.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from services.events import read_joined
from stages.common.answer_schema import fits
from stages.common.artifacts import artifacts, read_json, reports, write_json, write_text
from stages.common.errors import InputError
from stages.common.logs import get_logger, run_stage
from stages.common.personal_data import PERSONAL_DATA
from stages.common.records import Message, Row, canonical_json, conversation_problem, make_row

if TYPE_CHECKING:
    import pyarrow as pa

    from stages.common.loop_params import FeedbackSettings
    from stages.common.params import Params

log = get_logger("feedback")

ROWS = Path("data") / "feedback" / "rows.jsonl"
HELD_OUT = Path(".perennial") / "holdout" / "rows.jsonl"
QUESTIONS_HELD_OUT = Path(".perennial") / "holdout" / "questions.txt"
REPORT = reports("feedback").with_suffix(".json")

ROLES = ("champion", "challenger")  # a shadow's answer was shown to nobody
RAW_ROUTE = "/v1/completions"  # a text to go on with: no conversation, and no answer to a question
# The guard's looks at the question, and those at the answer, which count where the answer is the label.
INPUT_CHECKS = ("control_tokens", "prompt_injection", "toxicity")
OUTPUT_CHECKS = ("secrets", "personal_data")
PLACEHOLDERS = tuple(f"[{kind}]" for kind in PERSONAL_DATA)  # what the event store writes over it
MAX_NAMED = 5  # users in the report
COMPACT, SPACED = (",", ":"), (", ", ": ")  # how JSON answers are written

Kind = Literal["correction", "thumb"]

# Reasons by which rows are left out, in the order of the rules, with what a person reads.
REASONS = {
    "no_label": "a thumb down or a comment alone",
    "raw_prompt": "the text was to be continued, not answered",
    "own_schema": "the request asked for an answer of its own form",
    "corrupt": "the event holds no conversation",
    "other_system_prompt": "asked under another system prompt",
    "empty": "nothing in the question or the label",
    "too_long": "a question or label over the limits of `curate`",
    "redacted": "a placeholder for personal data in the question or the label",
    "unfinished": "found right, but cut off",
    "not_json": "the label is no JSON object",
    "outside_schema": "a label outside the schema of the answers",
    "suspicious": "the guard found the exchange suspicious",
    "superseded": "the same person gave a newer label",
    "user_limit": "over `max_rows_per_user`",
    "key_share": "over `max_share_per_key`",
    "contradiction": "no label has `min_agreement`",
    "outvoted": "most gave another label",
    "duplicate": "the question is there with this label already",
    "row_limit": "over `max_rows`",
}


@dataclass(frozen=True, slots=True)
class Task:
    """What a label must look like.

    Attributes:
        answer_format: "json" or "text".
        answer_schema: of JSON answers, as `artifacts/export/serving.json` has it; None: any object.
        label_key: the key of a JSON answer that names its class.
        system_prompt: what training rows begin with; the rows here have none in its place.
        max_question_chars, max_answer_chars: longer texts are left out.
    """

    answer_format: str
    answer_schema: Mapping[str, Any] | None
    label_key: str | None
    system_prompt: str | None
    max_question_chars: int
    max_answer_chars: int


def task_of(root: Path, params: Params, serving: Mapping[str, Any] | None = None) -> Task:
    """Return the task of a model: of the one that is served by `serving`, else of the pipeline's newest.

    Raises:
        InputError: the pipeline has made no model yet.
    """
    about = serving if serving is not None else read_json(root / artifacts("export") / "serving.json")
    return Task(
        answer_format=about["answer_format"],
        answer_schema=about["answer_schema"],
        label_key=about["label_key"],
        system_prompt=about["system_prompt"],
        max_question_chars=params.curate.max_question_chars,
        max_answer_chars=params.curate.max_answer_chars,
    )


@dataclass(frozen=True, slots=True)
class Label:
    """What one person says is the right answer to one question.

    Attributes:
        at: when it was said, unix s; request_id: of the exchange.
        key: the API key it came with; asker: who said it, as far as that is known.
        prompt: the conversation up to the question, without the task's system message.
        question: hash of the conversation without case, spaces and the signs around it.
        value: the label as JSON, or its text; same: a text that is equal for equal labels.
    """

    at: float
    request_id: str
    key: str | None
    asker: str | None
    prompt: tuple[Message, ...]
    question: str
    kind: Kind
    value: Any
    same: str


@dataclass(frozen=True, slots=True)
class Labelled:
    """Rows to learn, rows to judge by, and the report on both."""

    train: list[Row]
    holdout: list[Row]
    report: dict[str, Any]


@dataclass(slots=True)
class Counts:
    """What came in, and what was left out with its reason."""

    exchanges: int = 0
    given: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    styles: Counter[tuple[str, str]] = field(default_factory=Counter)
    keys: set[str] = field(default_factory=set)
    said_by_key: Counter[str] = field(default_factory=Counter)
    said_by_user: Counter[str] = field(default_factory=Counter)


class LeftOut(ValueError):
    """Feedback that becomes no row; the text is one of `REASONS`."""


def labelled_rows(
    url: str,
    start: float,
    end: float,
    settings: FeedbackSettings,
    task: Task,
    held_out: frozenset[str] = frozenset(),
) -> Labelled:
    """Return what the feedback on the exchanges received in [start, end) (unix s) becomes.

    The same events give the same rows, in the same order. What is said from `end` on does not count: a
    retraining that is started again gathers the same. Only exchanges with feedback are kept in memory.

    Args:
        url: of the event store.
        held_out: hashes of questions that were held out before (`held_out_before`).

    Raises:
        InputError: the event store cannot be read.
    """
    counts = Counts()
    labels: list[Label] = []
    for batch in read_joined(url, start, end):
        labels += labels_in(batch, end, settings, task, counts)
    steps = {"labels": len(labels)}

    def share_keys(some: list[Label]) -> tuple[list[Label], Counter[str]]:
        share, at_least = settings.max_share_per_key, settings.max_rows_per_user
        return limit_keys(some, share, at_least, len(counts.keys), counts.exchanges)

    rules: tuple[tuple[str, Callable[[list[Label]], tuple[list[Label], Counter[str]]]], ...] = (
        ("newest of a person", newest_of_a_person),
        ("users", lambda some: limit_users(some, settings.max_rows_per_user)),
        ("keys", share_keys),
        ("agreement", lambda some: agreed(some, settings.min_agreement)),
        ("duplicates", one_a_question),
        # Duplicates of others went: the share of a key has grown by it.
        ("keys again", share_keys),
        ("number", lambda some: newest(some, settings.max_rows, "row_limit")),
    )
    for name, rule in rules:
        labels, left_out = rule(labels)
        counts.left_out += left_out
        steps[name] = len(labels)
    style = max((COMPACT, SPACED), key=lambda one: (counts.styles[one], one == COMPACT))
    sides: dict[bool, list[Row]] = {False: [], True: []}
    for label in sorted(labels, key=lambda one: one.question):
        apart = (
            is_held_out(label.question, settings.holdout_share, settings.seed) or label.question in held_out
        )
        sides[apart].append(_row(label, settings.license, task, style))
    return Labelled(sides[False], sides[True], _report(sides, labels, counts, steps))


def labels_in(
    batch: pa.RecordBatch, end: float, settings: FeedbackSettings, task: Task, counts: Counts
) -> Iterator[Label]:
    """Yield the labels in joined exchanges, given before `end`, to learn from; count the others."""
    import pyarrow.compute as pc

    counts.exchanges += batch.num_rows
    counts.keys |= {key for key in pc.unique(batch["key_id"]).to_pylist() if key is not None}
    told = batch.filter(pc.greater(pc.list_value_length(batch["feedback"]), 0))
    for exchange in told.to_pylist():
        if exchange["role"] not in ROLES:
            continue
        in_time = [one for one in exchange["feedback"] if one["given_at"] < end]
        by_giver = sorted(in_time, key=lambda one: (one["key_id"] or "", one["given_at"]))
        for key, given in groupby(by_giver, key=lambda one: one["key_id"]):
            said = list(given)
            asker = _asker(exchange, key)
            counts.given += 1
            counts.keys |= {key} - {None}
            counts.said_by_key[key or "(none)"] += 1
            counts.said_by_user[_pseudonym(asker)] += 1
            try:
                label = label_of(exchange, said, key, asker, settings, task)
            except LeftOut as reason:
                counts.left_out[str(reason)] += 1
                continue
            counts.styles[_style(exchange["answer"])] += 1
            yield label


def label_of(
    exchange: Mapping[str, Any],
    said: Sequence[Mapping[str, Any]],
    key: str | None,
    asker: str | None,
    settings: FeedbackSettings,
    task: Task,
) -> Label:
    """Return what one giver says is the right answer in an exchange; the newest word counts.

    Raises:
        LeftOut: nothing can be learned from it.
    """
    text, kind, at = _newest_word(exchange, said, settings.thumbs_up_as_label)
    prompt = _prompt(exchange, task)
    question = next(message.content for message in reversed(prompt) if message.role == "user")
    if not question.strip() or not text.strip():
        raise LeftOut("empty")
    if len(question) > task.max_question_chars or len(text) > task.max_answer_chars:
        raise LeftOut("too_long")
    if any(mark in part for mark in PLACEHOLDERS for part in (text, *(m.content for m in prompt))):
        raise LeftOut("redacted")
    if kind == "thumb" and exchange["finish_reason"] != "stop":
        raise LeftOut("unfinished")
    value: Any = text.strip()
    if task.answer_format == "json":
        value = _parsed(text)
        ordered = in_order(value, task.answer_schema)
        if settings.on_suspicion == "drop" and not fits_schema(task.answer_schema, ordered):
            raise LeftOut("outside_schema")
        value = ordered
    checks = INPUT_CHECKS if kind == "correction" else (*INPUT_CHECKS, *OUTPUT_CHECKS)
    if settings.on_suspicion == "drop" and _suspicious(exchange["verdicts"], checks):
        raise LeftOut("suspicious")
    same = canonical_json(value) if task.answer_format == "json" else " ".join(value.split())
    return Label(at, exchange["request_id"], key, asker, prompt, question_hash(prompt), kind, value, same)


def _newest_word(
    exchange: Mapping[str, Any], said: Sequence[Mapping[str, Any]], thumbs_up_as_label: bool
) -> tuple[str, Kind, float]:
    """Return the label, its kind and time: the last correction, else the answer if the last thumb is up."""
    corrections = [one for one in said if one["correction"]]
    if corrections:
        return corrections[-1]["correction"], "correction", corrections[-1]["given_at"]
    thumbs = [one for one in said if one["thumb"] is not None]
    if not (thumbs_up_as_label and thumbs and thumbs[-1]["thumb"] == 1):
        raise LeftOut("no_label")
    if exchange["status"] != 200 or exchange["answer"] is None:
        raise LeftOut("unfinished")
    return exchange["answer"], "thumb", thumbs[-1]["given_at"]


def _prompt(exchange: Mapping[str, Any], task: Task) -> tuple[Message, ...]:
    """Return the conversation up to its last user message, without the task's own system message."""
    if exchange["route"] == RAW_ROUTE:
        raise LeftOut("raw_prompt")
    try:
        turns, parameters = json.loads(exchange["messages"]), json.loads(exchange["parameters"])
        messages = [Message(turn["role"], turn["content"]) for turn in turns]
        own_schema = parameters.get("json_schema")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise LeftOut("corrupt") from None
    if not all(isinstance(part, str) for message in messages for part in (message.role, message.content)):
        raise LeftOut("corrupt")
    if own_schema is not None:
        raise LeftOut("own_schema")
    last = max((place for place, one in enumerate(messages) if one.role == "user"), default=-1)
    messages = messages[: last + 1]
    if conversation_problem([*messages, Message("assistant", "-")]):
        raise LeftOut("corrupt")
    if messages[0].role == "system" and task.system_prompt is not None:
        # A model that learned under two system prompts has none that a server could put in by itself.
        if messages[0].content.strip() != task.system_prompt.strip():
            raise LeftOut("other_system_prompt")
        messages = messages[1:]
    return tuple(messages)


def _parsed(text: str) -> dict[str, Any]:
    """Return a label's JSON object; numbers that JSON does not know make it none."""
    try:
        value = json.loads(text, parse_constant=_no_number)
        json.dumps(value, allow_nan=False)  # 1e999 is read as infinity
    except (ValueError, RecursionError):
        raise LeftOut("not_json") from None
    if not isinstance(value, dict):
        raise LeftOut("not_json")
    return value


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def in_order(value: dict[str, Any], schema: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return a JSON answer with its keys in the order in which the model writes them; others come last."""
    known = (schema or {}).get("properties", {})
    return {
        key: value[key] for key in (*(k for k in known if k in value), *(k for k in value if k not in known))
    }


def fits_schema(schema: Mapping[str, Any] | None, value: dict[str, Any]) -> bool:
    """Return whether an answer fits the schema of the training answers; any does where there is none."""
    try:
        return schema is None or fits(dict(schema), value)
    except KeyError:  # items in a list that was empty in all of training: nothing is known of them
        return False


def _suspicious(verdicts: str, checks: Sequence[str]) -> bool:
    """Return whether one of these checks of the guard did not pass; verdicts that cannot be read did not."""
    try:
        found = json.loads(verdicts)
        return any(not found[check][0] for check in checks if check in found)
    except (ValueError, TypeError, KeyError, IndexError, RecursionError):
        return True


def _asker(exchange: Mapping[str, Any], key: str | None) -> str | None:
    """Return who says something of an exchange: its user or session, or the other key that judges it."""
    if key != exchange["key_id"]:
        return f"key {key}" if key else None
    name = exchange["user"] or exchange["session"]
    # Two applications, each with a key, may both have a user of that name.
    return f"{exchange['key_id'] or ''}/{name}" if name else None


def normalised(text: str) -> str:
    """Return a text without what makes no other question: case, runs of space, and the signs around it."""
    plain = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return plain.strip(" .!?,;:…\"'") or plain


def question_hash(prompt: Iterable[Message]) -> str:
    """Return 16 hex digits that name a question with the conversation before it, system messages too."""
    turns = [[message.role, normalised(message.content)] for message in prompt]
    return hashlib.sha256(canonical_json(turns).encode("utf-8", "replace")).hexdigest()[:16]


def is_held_out(question: str, share: float, seed: int) -> bool:
    """Return whether a question is kept from training: by its hash, so that it always is or never."""
    digest = hashlib.blake2b(f"{seed}/{question}".encode(), digest_size=8).digest()
    return int.from_bytes(digest) < share * 2**64


def _in_time(label: Label) -> tuple[float, str, str]:
    return label.at, label.request_id, label.key or ""


def newest(labels: Sequence[Label], limit: int, reason: str) -> tuple[list[Label], Counter[str]]:
    """Keep the newest labels, at most `limit`."""
    kept = sorted(labels, key=_in_time)[max(0, len(labels) - limit) :]
    return kept, _left_out(reason, len(labels) - len(kept))


def newest_of_a_person(labels: list[Label]) -> tuple[list[Label], Counter[str]]:
    """Keep of each person's labels of one question the newest; who is not known is a person each time."""
    kept: dict[tuple[str, str], Label] = {}
    left_out: Counter[str] = Counter()
    for label in sorted(labels, key=_in_time):
        asker = (label.asker or f"request {label.request_id}", label.question)
        if asker in kept:
            left_out["duplicate" if kept[asker].same == label.same else "superseded"] += 1
        kept[asker] = label
    return list(kept.values()), left_out


def limit_users(labels: list[Label], max_rows: int) -> tuple[list[Label], Counter[str]]:
    """Keep the newest labels of each person; who is not known has no limit here."""
    of: defaultdict[str | None, list[Label]] = defaultdict(list)
    for label in labels:
        of[label.asker].append(label)
    kept = of.pop(None, [])
    left_out: Counter[str] = Counter()
    for own in of.values():
        some, gone = newest(own, max_rows, "user_limit")
        kept += some
        left_out += gone
    return kept, left_out


def limit_keys(
    labels: list[Label], share: float, at_least: int, keys: int, exchanges: int
) -> tuple[list[Label], Counter[str]]:
    """Keep the newest labels of each API key, so that none gives more than its share, or than `at_least`.

    The share is of the labels, and the keys that count are those that give any. Where fewer give than
    1 / `share`, they cannot all stay below it: none gives more than an even part. Labels without a key count
    together as one giver there.
    One key that gives alone, though others ask too, may give up to `share` of all exchanges: an honest
    source is heard, a flood stays capped. One key alone, in the whole of the traffic, has no limit: there is
    nobody to protect from it.

    Args:
        at_least: rows that a key may give whatever its share: what one user may. Else a second key that
            gives a single label would leave the first a single one.
        keys: that asked or said anything in this time.
        exchanges: in this time, of all keys.
    """
    of: defaultdict[str | None, list[Label]] = defaultdict(list)
    for label in labels:
        of[label.key].append(label)
    kept = of.pop(None, [])
    if keys < 2 and not kept:
        return labels, Counter()
    sizes = [len(own) for own in of.values()]
    if len(of) == 1 and not kept:
        limit = int(share * exchanges)
    else:
        even = 1 / max(1, len(of) + bool(kept))
        limit = highest_limit(sizes, len(kept), share) or highest_limit(sizes, len(kept), even)
    left_out: Counter[str] = Counter()
    for own in of.values():
        some, gone = newest(own, max(limit, at_least), "key_share")
        kept += some
        left_out += gone
    return kept, left_out


def highest_limit(sizes: Sequence[int], others: int, share: float) -> int:
    """Return the most rows a key may keep so that none has more than `share` of all that are left.

    With the limit c, all are `others` + sum(min(size, c)); the sum grows ever slower in c, so the limits that
    do (c <= share * all) are those up to one, found by halving.
    """

    def holds(limit: int) -> bool:
        left = [min(size, limit) for size in sizes]
        return max(left, default=0) <= share * (others + sum(left)) + 1e-9

    low, high = 0, max(sizes, default=0)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if holds(middle) else (low, middle - 1)
    return low


def agreed(labels: list[Label], min_agreement: float) -> tuple[list[Label], Counter[str]]:
    """Keep the label on which enough people agree, of each question; where none is, all go.

    A person has one vote. Where several keys label a question, each key has one: names of users are what a
    key's holder says they are.
    """
    of: defaultdict[str, list[Label]] = defaultdict(list)
    for label in labels:
        of[label.question].append(label)
    kept: list[Label] = []
    left_out: Counter[str] = Counter()
    for own in of.values():
        votes = _votes(own)
        same, most = max(votes.items(), key=lambda vote: (vote[1], vote[0]))
        if len(votes) > 1 and most < min_agreement * sum(votes.values()) - 1e-9:
            left_out["contradiction"] += len(own)
            continue
        right = [label for label in own if label.same == same]
        left_out["outvoted"] += len(own) - len(right)
        kept += right
    return kept, +left_out


def _votes(labels: Sequence[Label]) -> dict[str, float]:
    """Return the votes for each label; a key that says several things divides its one vote."""
    keys = {label.key for label in labels}
    if len(keys) == 1:
        return dict(Counter(label.same for label in labels))
    said = Counter(label.key for label in labels)
    votes: defaultdict[str, float] = defaultdict(float)
    for label in labels:
        votes[label.same] += 1 / said[label.key]
    return dict(votes)


def one_a_question(labels: list[Label]) -> tuple[list[Label], Counter[str]]:
    """Keep the newest label of each question; all of a question are alike by now."""
    of: dict[str, Label] = {}
    for label in sorted(labels, key=_in_time):
        of[label.question] = label
    return list(of.values()), _left_out("duplicate", len(labels) - len(of))


def _left_out(reason: str, count: int) -> Counter[str]:
    return Counter({reason: count} if count else {})


def _style(answer: str | None) -> tuple[str, str]:
    """Return how an answer of the model is written as JSON, for labels to be written alike."""
    try:
        value = json.loads(answer or "")
        spaced = answer == json.dumps(value, ensure_ascii=False, separators=SPACED)
        return (
            SPACED
            if spaced and answer != json.dumps(value, ensure_ascii=False, separators=COMPACT)
            else COMPACT
        )
    except (ValueError, RecursionError):
        return COMPACT


def _row(label: Label, license: str, task: Task, style: tuple[str, str]) -> Row:
    text, tags = label.value, {"feedback": str(label.kind)}
    if task.answer_format == "json":
        text = json.dumps(label.value, ensure_ascii=False, separators=style)
        named = label.value.get(task.label_key) if task.label_key else None
        if isinstance(named, str):
            tags[str(task.label_key)] = named
    messages = [*label.prompt, Message("assistant", text)]
    return make_row(messages, "feedback", license, f"feedback/{label.question}", tags, "feedback")


def _report(
    sides: Mapping[bool, Sequence[Row]], labels: Sequence[Label], counts: Counts, steps: Mapping[str, int]
) -> dict[str, Any]:
    rows = [*sides[False], *sides[True]]
    by_user = Counter(_pseudonym(label.asker) for label in labels)
    by_key = Counter(label.key or "(none)" for label in labels)
    # Who said most comes first: a flood is seen though its rows were left out.
    users = sorted(counts.said_by_user, key=lambda name: (-counts.said_by_user[name], name))[:MAX_NAMED]
    return {
        "exchanges": counts.exchanges,
        "given": counts.given,
        "left_out": {reason: counts.left_out[reason] for reason in REASONS if counts.left_out[reason]},
        "labelled_rows": len(rows),
        "rows_train": len(sides[False]),
        "rows_holdout": len(sides[True]),
        "steps": dict(steps),
        "by_kind": dict(sorted(Counter(row.tags["feedback"] for row in rows).items())),
        "by_label": _by_label(rows),
        "by_user": [{"user": u, "given": counts.said_by_user[u], "rows": by_user[u]} for u in users],
        "by_key": {
            key: {"given": counts.said_by_key[key], "rows": by_key[key]} for key in sorted(counts.said_by_key)
        },
    }


def _by_label(rows: Sequence[Row]) -> dict[str, int]:
    values = (value for row in rows for key, value in row.tags.items() if key != "feedback")
    return dict(sorted(Counter(values).items()))


def _pseudonym(asker: str | None) -> str:
    """Return a name for the report that tells users apart, and says of none who it is."""
    if asker is None:
        return "(not known)"
    return f"user-{hashlib.blake2b(asker.encode('utf-8', 'replace'), digest_size=4).hexdigest()}"


def held_out_before(root: Path = Path()) -> frozenset[str]:
    """Return the hashes of all questions that were ever held out."""
    path = root / QUESTIONS_HELD_OUT
    return frozenset(path.read_text(encoding="utf-8").split()) if path.is_file() else frozenset()


def write_labelled(root: Path, labelled: Labelled) -> None:
    """Write the rows to learn, those held out, and the report; equal rows give equal bytes.

    The questions held out are written first: a run that is killed here has at most held out more.
    """
    held_out = {row.group.removeprefix("feedback/") for row in labelled.holdout} | held_out_before(root)
    write_text(root / QUESTIONS_HELD_OUT, "".join(f"{question}\n" for question in sorted(held_out)))
    write_text(root / HELD_OUT, rows_jsonl(labelled.holdout))
    write_text(root / ROWS, rows_jsonl(labelled.train))
    write_json(root / REPORT, labelled.report)


def rows_jsonl(rows: Iterable[Row]) -> str:
    """Return one JSON object a line, with the fields of a row."""
    return "".join(
        json.dumps({**asdict(row), "tags": dict(row.tags)}, ensure_ascii=False, sort_keys=True) + "\n"
        for row in rows
    )


def read_labelled(path: Path) -> list[Row]:
    """Read the rows that `write_labelled` wrote; none where the file is not there.

    Raises:
        InputError: a line is no row.
    """
    if not path.is_file():
        return []
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            fields = json.loads(line)
            messages = tuple(Message(turn["role"], turn["content"]) for turn in fields["messages"])
            rows.append(Row(**{**fields, "messages": messages}))
        except (ValueError, TypeError, KeyError) as error:
            raise InputError(
                f"{path}:{number} is no row: {error!r}", f"remove {path}; it is written anew"
            ) from None
    return rows


def left_out_said(report: Mapping[str, Any]) -> str:
    """Return how much of what was said became no row, and why most of it, in words; nothing if all did."""
    left_out = report["left_out"]
    if not left_out:
        return ""
    most = max(left_out, key=lambda reason: left_out[reason])
    return f"{sum(left_out.values()):,} of {report['given']:,} left out, most: {REASONS[most]}"


def said(report: Mapping[str, Any]) -> str:
    """Return the report as Markdown."""
    lines = [
        f"{report['given']:,} times somebody said something of {report['exchanges']:,} answers. It became "
        f"**{report['rows_train']:,} rows to learn** and {report['rows_holdout']:,} to judge by.",
        "",
    ]
    if report["left_out"]:
        lines += ["| left out | rows | why |", "|---|---:|---|"]
        lines += [f"| {name} | {count:,} | {REASONS[name]} |" for name, count in report["left_out"].items()]
        lines.append("")
    if report["left_out"].get("key_share") and len(report["by_key"]) == 1:
        lines += [
            "All of it came from one key; if you trust it, raise `monitoring.feedback.max_share_per_key`.",
            "",
        ]
    if report["by_user"]:
        lines += ["| who said most | times | rows |", "|---|---:|---:|"]
        lines += [f"| {one['user']} | {one['given']:,} | {one['rows']:,} |" for one in report["by_user"]]
        lines.append("")
    if set(report["by_key"]) - {"(none)"}:
        lines += ["| key | times | rows |", "|---|---:|---:|"]
        lines += [f"| {key} | {one['given']:,} | {one['rows']:,} |" for key, one in report["by_key"].items()]
        lines.append("")
    return "\n".join(lines)


def main(words: Sequence[str] | None = None) -> None:
    """Say what all feedback in the event store would become, and write it if asked to."""
    from stages.common.params import load_params

    parser = argparse.ArgumentParser(prog="python -m monitoring.feedback", description="Feedback as rows.")
    parser.add_argument("--write", action="store_true", help=f"write {ROWS}, {HELD_OUT} and {REPORT}, too")
    arguments = parser.parse_args(sys.argv[1:] if words is None else words)
    params, root = load_params(), Path()
    labelled = labelled_rows(
        params.services.events.url,
        0.0,
        time.time(),
        params.monitoring.feedback,
        task_of(root, params),
        held_out_before(root),
    )
    sys.stdout.write(said(labelled.report))
    if arguments.write:
        write_labelled(root, labelled)


if __name__ == "__main__":
    run_stage(main)
