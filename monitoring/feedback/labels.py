"""Labels: the right answer to a prompt as one person gave it, read from the event store."""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from monitoring.feedback.served_answer import (
    PLACEHOLDERS,
    find_error,
    find_rejected,
    is_unicode,
    is_whole,
)
from services.events.turns import read_turn
from stages.common.artifacts import read_json
from stages.common.logs import get_logger
from stages.common.messages import Message, Tool, find_conversation_problem, is_malformed
from stages.common.model.exported import SERVING, find_exported
from stages.common.privacy.personal_data import RECOGNISERS, holds
from stages.common.records import format_canonical_json
from stages.common.task.kinds import make_task
from stages.common.task.protocol import Task

if TYPE_CHECKING:
    import pyarrow as pa

    from stages.common.params.loading import Params
    from stages.common.params.loop import FeedbackSettings

logger = get_logger("feedback")

ROLES = ("champion", "challenger")  # a shadow's answer was never shown to a user
RAW_ROUTE = "/v1/completions"  # a text to go on with: no conversation, and no answer to a question
# The guard's looks at the question, and those at the answer, which count where the answer is the label.
INPUT_CHECKS = ("control_tokens", "prompt_injection", "toxicity")
OUTPUT_CHECKS = ("secrets", "personal_data")
COMPACT, SPACED = (",", ":"), (", ", ": ")  # how JSON answers are written

Kind = Literal["correction", "thumb", "refusal"]  # a refusal is a thumb down: its answer is no right one
Excluded = Counter[tuple[str, str]]  # rows that are excluded, by reason and name of the API key

# Reasons by which rows are excluded, in the order of the rules, with what a person reads.
REASONS = {
    "no_label": "a thumb down or a comment alone",
    "confirmed": "a thumb down on an answer that others found right",
    "held_out": "a thumb down on a question that is held out",
    "raw_prompt": "the text was to be continued, not answered",
    "with_tools": "asked with tools, which only tasks of the kind `tools` learn",
    "own_choice": "the request asked for a call of a tool, or for none",
    "own_schema": "the request asked for an answer of its own form",
    "corrupt": "the event holds no conversation, or text that is no Unicode",
    "other_system_prompt": "asked under another system prompt",
    "empty": "nothing in the question or the label",
    "too_long": "a question or label over the limits of `curate`",
    "redacted": "a placeholder for personal data or a secret in the question or the label",
    "private": "personal data or a secret in the question or the label",
    "unfinished": "found right, but cut off",
    "invalid": "the label is not an answer of the task",
    "outside_schema": "a label outside the schema of the answers",
    "suspicious": "the guard found the exchange or the correction suspicious",
    "superseded": "the same person gave a newer label",
    "user_limit": "over `max_rows_per_user`",
    "key_share": "over `max_share_per_key`",
    "contradiction": "no label has `min_agreement`",
    "outvoted": "most gave another label",
    "duplicate": "the question is there with this label already",
    "row_limit": "over `max_rows`",
}


@dataclass(frozen=True, slots=True)
class ServedTask:
    """What a label of a served model must be.

    Attributes:
        answers: the kind of task.
        answer_schema: of the training answers, as `serving.json` of a version has it; None: any answer.
        system_prompt: what training rows begin with; the rows here have none in its place.
        max_question_chars, max_answer_chars: longer texts are excluded.
        is_rejected: what the guard thinks of a correction; no check of the exchange has seen it.
        private: kinds of personal data and secrets that no row may hold.
    """

    answers: Task
    answer_schema: Mapping[str, Any] | None
    system_prompt: str | None
    max_question_chars: int
    max_answer_chars: int
    is_rejected: Callable[[str], bool] = lambda _: False
    private: tuple[str, ...] = tuple(RECOGNISERS)


def read_served_task(root: Path, params: Params, serving: Mapping[str, Any] | None = None) -> ServedTask:
    """Return the task of a model: of the one that is served by `serving`, else of the pipeline's newest.

    Raises:
        InputError: the pipeline has made no model yet.
    """
    about = serving if serving is not None else read_json(find_exported(root) / SERVING)
    return ServedTask(
        answers=make_task(about["task"]),
        answer_schema=about["answer_schema"],
        system_prompt=about["system_prompt"],
        max_question_chars=params.curate.max_question_chars,
        max_answer_chars=params.curate.max_answer_chars,
        private=params.curate.personal_data,
    )


@dataclass(frozen=True, slots=True)
class Label:
    """The right answer to one prompt as one person gave it, or of the kind `refusal` a wrong one.

    Attributes:
        at: when it was given, unix s; request_id: of the exchange.
        key: the API key it came with; user: who gave it, as far as known.
        prompt: the conversation up to the last user message or result of a tool, without the task's system
            message; tools: what the request offered.
        prompt_hash: hash of the conversation without case, spaces and the signs around it.
        value: the label as the model would write it; same: a text that is equal for equal labels.
        error: the worst type of error of the answer that is corrected; None if there is none to correct.
        reasoning: what the model thought before an answer that is confirmed; None for a correction.
        session_hash: hash of the session that the client named; None if it named none.
        rejected: the answer that a correction replaces, for pairs; None if it is of no use.
    """

    at: float
    request_id: str
    key: str | None
    user: str | None
    prompt: tuple[Message, ...]
    prompt_hash: str
    kind: Kind
    value: str
    same: str
    tools: tuple[Tool, ...] = ()
    error: str | None = None
    reasoning: str | None = None
    session_hash: str | None = None
    rejected: str | None = None


@dataclass(slots=True)
class Counts:
    """What came in, and what was excluded with its reason."""

    exchanges: int = 0
    given: int = 0
    excluded: Excluded = field(default_factory=Counter)
    styles: Counter[tuple[str, str]] = field(default_factory=Counter)
    keys: set[str] = field(default_factory=set)
    given_by_key: Counter[str] = field(default_factory=Counter)
    given_by_user: Counter[str] = field(default_factory=Counter)


class ExcludedFeedbackError(ValueError):
    """Feedback that becomes no row; the text is one of `REASONS`."""


def read_labels(
    batch: pa.RecordBatch, end: float, settings: FeedbackSettings, task: ServedTask, counts: Counts
) -> Iterator[Label]:
    """Yield the labels in joined exchanges, given before `end`, to learn from; count the others."""
    import pyarrow.compute as pc

    counts.exchanges += batch.num_rows
    counts.keys |= {key for key in pc.unique(batch["key_id"]).to_pylist() if key is not None}
    change = batch.filter(pc.greater(pc.list_value_length(batch["feedback"]), 0))
    for exchange in change.to_pylist():
        if exchange["role"] not in ROLES:
            continue
        in_time = [one for one in exchange["feedback"] if one["given_at"] < end]
        by_giver = sorted(in_time, key=lambda one: (one["key_id"] or "", one["given_at"]))
        for key, given in groupby(by_giver, key=lambda one: one["key_id"]):
            feedback = list(given)
            user = _identify_user(exchange, key)
            counts.given += 1
            counts.keys |= {key} - {None}
            counts.given_by_key[name_key(key)] += 1
            counts.given_by_user[make_pseudonym(user)] += 1
            try:
                label = label_of(exchange, feedback, key, user, settings, task)
            except ExcludedFeedbackError as reason:
                counts.excluded[str(reason), name_key(key)] += 1
                continue
            except Exception as error:  # of any kind: one event must not end all learning
                logger.warning("no label from the feedback on %s: %r", exchange["request_id"], error)
                counts.excluded["corrupt", name_key(key)] += 1
                continue
            counts.styles[_style(exchange["answer"])] += 1
            yield label


def label_of(
    exchange: Mapping[str, Any],
    feedback: Sequence[Mapping[str, Any]],
    key: str | None,
    user: str | None,
    settings: FeedbackSettings,
    task: ServedTask,
) -> Label:
    """Return the label that one person gave in an exchange; the newest feedback counts.

    Raises:
        ExcludedFeedbackError: nothing can be learned from it.
    """
    text, kind, at = _newest_feedback(exchange, feedback, settings)
    prompt, tools = _prompt(exchange, task)
    question = next(message.content for message in reversed(prompt) if message.role == "user")
    reasoning = exchange["reasoning"] if kind == "thumb" else None
    parts = [text, reasoning or "", *(part for message in prompt for part in _texts(message))]
    if not question.strip() or not text.strip():
        raise ExcludedFeedbackError("empty")
    if len(question) > task.max_question_chars or len(text) > task.max_answer_chars:
        raise ExcludedFeedbackError("too_long")
    if any(mark in part for mark in PLACEHOLDERS for part in parts):
        raise ExcludedFeedbackError("redacted")
    # What the event store did not redact, or held before it did.
    if any(holds(kind, part) for kind in task.private for part in parts):
        raise ExcludedFeedbackError("private")
    if kind != "correction" and not is_whole(exchange):
        raise ExcludedFeedbackError("unfinished")
    if kind == "refusal":  # that it is no valid answer can be why it was refused
        if is_malformed(text.strip()):
            raise ExcludedFeedbackError("invalid")
    else:
        text = _check_right_answer(text, settings, task)
    checks = (*INPUT_CHECKS, *OUTPUT_CHECKS) if kind == "thumb" else INPUT_CHECKS
    if settings.on_suspicion == "drop" and (
        _suspicious(exchange["decisions"], checks) or (kind == "correction" and task.is_rejected(text))
    ):
        raise ExcludedFeedbackError("suspicious")
    same = task.answers.canonical(text)
    if not all(map(is_unicode, (*parts, text, same))):
        raise ExcludedFeedbackError("corrupt")
    return Label(
        at,
        exchange["request_id"],
        key,
        user,
        prompt,
        hash_prompt(prompt),
        kind,
        text,
        same,
        tools,
        find_error(exchange["answer"], text, task.answers) if kind == "correction" else None,
        reasoning,
        _hash_session(exchange),
        find_rejected(exchange, text, task.answers, task.max_answer_chars, task.private)
        if kind == "correction"
        else None,
    )


def _check_right_answer(text: str, settings: FeedbackSettings, task: ServedTask) -> str:
    """Return a label as the model would write it, if it is an answer of the task."""
    if task.answers.find_problem(text):
        raise ExcludedFeedbackError("invalid")
    text = task.answers.rewrite(text, task.answer_schema, COMPACT)
    if settings.on_suspicion == "drop" and not task.answers.fits(task.answer_schema, text):
        raise ExcludedFeedbackError("outside_schema")
    return text


def _texts(message: Message) -> list[str]:
    """Return all texts of a turn."""
    return [message.content, message.reasoning or "", *(call.arguments for call in message.tool_calls)]


def _newest_feedback(
    exchange: Mapping[str, Any], feedback: Sequence[Mapping[str, Any]], settings: FeedbackSettings
) -> tuple[str, Kind, float]:
    """Return the label, its kind and time: the last correction, else the answer that the last thumb is on."""
    corrections = [one for one in feedback if one["correction"]]
    if corrections:
        return corrections[-1]["correction"], "correction", corrections[-1]["given_at"]
    thumbs = [one for one in feedback if one["thumb"] is not None]
    is_up = bool(thumbs) and thumbs[-1]["thumb"] == 1
    if not thumbs or not (settings.thumbs_up_as_label if is_up else settings.thumbs_down_as_refusal):
        raise ExcludedFeedbackError("no_label")
    if exchange["status"] != 200 or exchange["answer"] is None:
        raise ExcludedFeedbackError("unfinished")
    return exchange["answer"], "thumb" if is_up else "refusal", thumbs[-1]["given_at"]


def _prompt(exchange: Mapping[str, Any], task: ServedTask) -> tuple[tuple[Message, ...], tuple[Tool, ...]]:
    """Return what was asked, without the task's own system message, and the tools that were offered."""
    if exchange["route"] == RAW_ROUTE:
        raise ExcludedFeedbackError("raw_prompt")
    try:
        turns, parameters = json.loads(exchange["messages"]), json.loads(exchange["parameters"])
        messages = [read_turn(turn) for turn in turns]
        own_schema, choice = parameters.get("json_schema"), parameters.get("tool_choice", "auto")
        tools = tuple(make_tool(value) for value in parameters.get("tools") or ())
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise ExcludedFeedbackError("corrupt") from None
    last = max((place for place, one in enumerate(messages) if one.role in ("user", "tool")), default=-1)
    messages = messages[: last + 1]
    if find_conversation_problem([*messages, Message("assistant", "-")]):
        raise ExcludedFeedbackError("corrupt")
    if task.answers.kind != "tools" and (
        tools or any(one.tool_calls or one.role == "tool" for one in messages)
    ):
        # Its rows would have a prompt that no other row has, or a call as their answer.
        raise ExcludedFeedbackError("with_tools")
    if tools and choice != "auto":
        raise ExcludedFeedbackError("own_choice")
    if own_schema is not None:
        raise ExcludedFeedbackError("own_schema")
    if messages[0].role == "system" and task.system_prompt is not None:
        # A model that learned under two system prompts has none that a server could put in by itself.
        if messages[0].content.strip() != task.system_prompt.strip():
            raise ExcludedFeedbackError("other_system_prompt")
        messages = messages[1:]
    return tuple(messages), tools


def make_tool(value: Any) -> Tool:
    """Return a tool from the plain values of OpenAI's API.

    Raises:
        ValueError, TypeError, KeyError: it is none.
    """
    tool = Tool(json.dumps(value, ensure_ascii=False, separators=COMPACT, allow_nan=False))
    if not isinstance(value["function"]["name"], str) or not isinstance(tool.parameters, dict):
        raise TypeError("a tool has a name and a schema")
    return tool


def _suspicious(decisions: str, checks: Sequence[str]) -> bool:
    """Return whether one of these checks of the guard did not pass; decisions that cannot be read did not."""
    try:
        found = json.loads(decisions)
        return any(not found[check][0] for check in checks if check in found)
    except (ValueError, TypeError, KeyError, IndexError, RecursionError):
        return True


def _identify_user(exchange: Mapping[str, Any], key: str | None) -> str | None:
    """Return who gave feedback: the exchange's user or session, or another key."""
    if key != exchange["key_id"]:
        return f"key {key}" if key else None
    name = exchange["user"] or exchange["session"]
    # Two applications, each with a key, may both have a user of that name.
    return f"{exchange['key_id'] or ''}/{name}" if name else None


def _hash_session(exchange: Mapping[str, Any]) -> str | None:
    """Return 16 hex digits that identify the session of an exchange; each key has sessions of its own."""
    if not exchange["session"]:
        return None
    name = json.dumps(["session", exchange["key_id"], exchange["session"]])
    return hashlib.sha256(name.encode()).hexdigest()[:16]


def normalise_text(text: str) -> str:
    """Return a text without case, repeated spaces and surrounding punctuation."""
    plain = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return plain.strip(" .!?,;:…\"'") or plain


def hash_prompt(prompt: Iterable[Message]) -> str:
    """Return 16 hex digits that identify a conversation, system messages included."""
    turns = [[message.role, normalise_text(message.answer)] for message in prompt]
    return hashlib.sha256(format_canonical_json(turns).encode("utf-8", "replace")).hexdigest()[:16]


def _style(answer: str | None) -> tuple[str, str]:
    """Return the JSON formatting of a model's answer, so that labels are written alike."""
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


def name_key(key: str | None) -> str:
    """Return the name of an API key in the report."""
    return key or "(none)"


def make_pseudonym(user: str | None) -> str:
    """Return a pseudonym for the report: it distinguishes users without identifying them."""
    if user is None:
        return "(not known)"
    return f"user-{hashlib.blake2b(user.encode('utf-8', 'replace'), digest_size=4).hexdigest()}"
