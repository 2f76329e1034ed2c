"""Detect the columns of a file that are the conversation.

Two structures: a list of turns (OpenAI's chat, ShareGPT), and a prompt with its completion (Alpaca, question
and answer, text and label, xLAM's query and calls). Either may have a column of tools. What the entry of the
source names is taken; the rest is detected from the first records, by exact names first and then by content.
Doubt is an error that names the candidates and the keys.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from stages.common.errors import InputError
from stages.common.params.checked_yaml import suggest_nearest
from stages.common.sources.files.entries import Record, shorten
from stages.common.sources.files.preferences.columns import find_preferences
from stages.common.sources.files.tools.calls import CALL_NAMES, is_call_list
from stages.common.sources.files.tools.schemas import TOOL_NAMES, is_tool_list
from stages.common.sources.files.turns import is_conversation, parse_list

Name = Literal["chat", "sharegpt", "alpaca", "pair", "calls"]

# Names as people write them, likeliest first; compared whole, because "text" is also in "context".
CHAT_NAMES = ("messages", "conversations", "conversation", "dialogue", "dialog", "turns", "chat")
PROMPT_NAMES = (
    "prompt", "question", "query", "instruction", "user_message", "customer_message", "utterance", "sentence",
    "text", "message", "request", "input", "inputs", "description", "tweet", "comment", "review", "user",
    "human", "body", "content", "frage", "pregunta", "pergunta", "domanda", "вопрос", "问题", "質問",
)  # fmt: skip
COMPLETION_NAMES = (
    "completion", "answer", "response", "reply", "output", "outputs", "target", "targets", "summary",
    "translation", "command", "assistant", "bot", "antwort", "respuesta", "réponse", "reponse", "resposta",
    "risposta", "ответ", "答案", "回答",
)  # fmt: skip
LABEL_NAMES = ("label_text", "label_name", "label", "labels")  # of one thing, so the first that is there
# Of these a file may have several, and then which one is to be learned is not clear.
CLASS_NAMES = (
    "intent", "category", "class", "sentiment", "emotion", "topic", "kategorie", "klasse", "categoría",
    "catégorie", "categoria", "类别",
)  # fmt: skip
CONTEXT_NAMES = ("input", "context", "passage")
ALPACA_COMPLETIONS = ("output", "response", "completion", "answer")
ID_NAMES = re.compile(r"(.*_)?(id|idx|index|uuid|guid|number|no|date|time|timestamp|created_at|url|split)")
SHOWN_COLUMNS = 12
MAX_LABEL_CHARS = 64
TEXT_SHARE = 0.5  # of the records: less often filled, and a column is no prompt or completion


@dataclass(frozen=True, slots=True)
class Columns:
    """What the entry of a source gives of its columns; None is detected."""

    shape: Name | None = None
    messages: str | None = None
    prompt: str | None = None
    context: str | None = None
    completion: str | None = None
    system: str | None = None
    tools: str | None = None
    rejected: str | None = None
    rating: str | None = None
    group: str | None = None
    tags: tuple[str, ...] = ()

    @classmethod
    def of(cls, entry: Any) -> Columns:
        """Return the columns of an entry, or of the command `init`, whose options have the entry's keys."""
        return cls(
            shape=entry.shape,
            messages=entry.messages_column,
            prompt=entry.prompt_column,
            context=entry.context_column,
            completion=entry.completion_column,
            system=entry.system_column,
            tools=entry.tools_column,
            rejected=entry.rejected_column,
            rating=entry.rating_column,
            group=entry.group_column,
            tags=entry.tag_columns,
        )

    @property
    def named(self) -> tuple[str, ...]:
        """The columns that must be there because the entry names them."""
        own = (
            self.messages, self.prompt, self.context, self.completion, self.system, self.tools, self.rejected,
            self.rating, self.group,
        )  # fmt: skip
        return (*(name for name in own if name), *self.tags)


@dataclass(frozen=True, slots=True)
class Shape:
    """Where the conversation is in a record: `messages`, or `prompt` and `completion`; and its `tools`.

    Attributes:
        rejected: an answer that is worse than the last one; rating: whether the last one is good.
    """

    name: Name
    messages: str | None = None
    prompt: str | None = None
    context: str | None = None
    completion: str | None = None
    system: str | None = None
    history: str | None = None
    tools: str | None = None
    rejected: str | None = None
    rating: str | None = None

    @property
    def columns(self) -> dict[str, str]:
        """The columns that are read, by what they are."""
        parts = (
            "messages", "system", "history", "prompt", "context", "completion", "tools", "rejected", "rating",
        )  # fmt: skip
        return {part: name for part in parts if (name := getattr(self, part))}


def detect_shape(path: Path, records: Sequence[Record], columns: Columns) -> Shape:
    """Return the shape of the records of a file.

    Raises:
        InputError: a column that is named is not there; nothing fits, or several things do.
    """
    there = list(dict.fromkeys(str(name) for record in records for name in record))
    if absent := [name for name in columns.named if name not in there]:
        raise _without(path, absent, there)
    columns = _add_preferences(records, columns, there)
    tools = columns.tools or _find_tools(records, there)
    shape = _detect_conversation(path, records, replace(columns, tools=tools), there)
    return replace(shape, tools=tools, rejected=columns.rejected, rating=columns.rating)


def _add_preferences(records: Sequence[Record], columns: Columns, there: Sequence[str]) -> Columns:
    """Return the columns with those of preferences; what the entry names is all of the conversation's."""
    is_named = columns.shape or columns.messages or columns.prompt or columns.completion
    found = (
        None
        if is_named or columns.rejected or columns.rating
        else find_preferences(records, _plain_names(there), CHAT_NAMES)
    )
    return replace(columns, **asdict(found)) if found else columns


def _detect_conversation(
    path: Path, records: Sequence[Record], columns: Columns, there: Sequence[str]
) -> Shape:
    if columns.messages or columns.shape in ("chat", "sharegpt"):
        return _chat_shape(path, records, columns, there)
    if columns.shape in ("calls", None) and (shape := _find_calls(records, columns, there)):
        return shape
    if columns.shape == "calls":
        raise _without(path, [columns.prompt or "query", columns.completion or "answers"], there)
    if columns.prompt and columns.completion:
        return _pair_shape(columns, there, columns.prompt, columns.completion)
    if columns.shape is None and not (columns.prompt or columns.completion):
        if _find_conversations(records, there):
            return _chat_shape(path, records, columns, there)
        if _plain_names(there).keys() == {CHAT_NAMES[0]}:
            return Shape("chat", messages=there[0])  # and every row of it is bad
    prompt, completion = _find_pair(path, records, columns, there)
    return _pair_shape(columns, there, prompt, completion)


def _chat_shape(path: Path, records: Sequence[Record], columns: Columns, there: Sequence[str]) -> Shape:
    found = [columns.messages] if columns.messages else _find_conversations(records, there)
    if not found:
        raise _without(path, [CHAT_NAMES[1 if columns.shape == "sharegpt" else 0]], there)
    if len(found) > 1:
        raise InputError(
            f"{path}: {' and '.join(map(repr, found))} are both lists of messages",
            "set `messages_column`, or `prompt_column` and `completion_column`, in its entry of the sources",
        )
    (name,) = found
    turns: Any = next((record[name] for record in records if is_conversation(record.get(name))), [])
    is_sharegpt = any("from" in turn for turn in parse_list(turns))
    return Shape("sharegpt" if is_sharegpt else "chat", messages=name, system=_find_system(columns, there))


def _find_tools(records: Sequence[Record], there: Sequence[str]) -> str | None:
    """Return the column of tools: by its name, if a record has tools there."""
    named = [name for name in there if _plain(name) in TOOL_NAMES]
    return next((n for n in named if any(is_tool_list(record.get(n)) for record in records)), None)


def _find_calls(records: Sequence[Record], columns: Columns, there: Sequence[str]) -> Shape | None:
    """Return the shape of a question, tools and the calls that answer it; None for any other."""
    if columns.tools is None or (columns.shape is None and _find_conversations(records, there)):
        return None
    lowered = _plain_names(there)
    named = [columns.completion] if columns.completion else [lowered[n] for n in CALL_NAMES if n in lowered]
    calls = next((n for n in named if any(is_call_list(record.get(n)) for record in records)), None)
    if columns.shape == "calls":
        calls = calls or next(iter(named), None)
    taken = {columns.tools, calls, columns.system, columns.rejected, columns.rating}
    prompt = columns.prompt or _first_named(PROMPT_NAMES, lowered, taken)
    if calls is None or prompt is None:
        return None
    return Shape("calls", prompt=prompt, completion=calls, system=_find_system(columns, there))


def _pair_shape(columns: Columns, there: Sequence[str], prompt: str, completion: str) -> Shape:
    lowered = _plain_names(there)
    is_alpaca = columns.shape == "alpaca" or _plain(prompt) == "instruction"
    context = columns.context
    if context is None and (is_alpaca or _plain(prompt) == "question"):
        free = [lowered[name] for name in CONTEXT_NAMES if name in lowered]
        context = next((name for name in free if name not in (prompt, completion)), None)
    return Shape(
        "alpaca" if is_alpaca else "pair",
        prompt=prompt,
        context=context,
        completion=completion,
        system=_find_system(columns, there),
        history=lowered.get("history") if is_alpaca else None,
    )


def _find_system(columns: Columns, there: Sequence[str]) -> str | None:
    if columns.system:
        return columns.system
    return next((name for name in there if _plain(name) in ("system", "system_prompt")), None)


def _find_conversations(records: Sequence[Record], there: Sequence[str]) -> list[str]:
    """Return the columns that are lists of turns; one with a usual name goes before all others."""
    found = [
        name
        for name in there
        if _share(records, lambda record, name=name: is_conversation(record.get(name))) >= TEXT_SHARE  # type: ignore[misc]
    ]
    usual = [name for name in found if _plain(name) in CHAT_NAMES]
    if {_plain(name) for name in found} & {"prompt", "completion", "chosen", "rejected"}:
        return usual  # conversations in two halves are a pair
    return usual[:1] or found


def _find_pair(
    path: Path, records: Sequence[Record], columns: Columns, there: Sequence[str]
) -> tuple[str, str]:
    """Return the columns of prompt and completion: as named, by their names, or by what is in them."""
    lowered = _plain_names(there)
    used = {*columns.tags, columns.group, columns.system, columns.context, columns.tools}
    used |= {columns.rejected, columns.rating}
    texts = [name for name in there if name not in used and _is_text_column(records, name)]
    prompt, completion = columns.prompt, columns.completion
    if not (prompt or completion) and "instruction" in lowered:
        answer = next((lowered[name] for name in ALPACA_COMPLETIONS if name in lowered), None)
        if answer:
            return lowered["instruction"], answer
    completion = (
        completion
        or _first_named(COMPLETION_NAMES, lowered, {*used, prompt})
        or _first_named(LABEL_NAMES, lowered, {*used, prompt})
    )
    classes = [lowered[name] for name in CLASS_NAMES if lowered.get(name) not in {None, *used, prompt}]
    if not completion and len(classes) == 1:
        completion = classes[0]
    prompt = prompt or _first_named(PROMPT_NAMES, lowered, {*used, completion})
    rest = [name for name in texts if name not in (prompt, completion) and not _is_id(records, name)]
    if not completion:
        completion = _find_labels(records, classes or rest)
        rest = [name for name in rest if name != completion]
    if not prompt and len(rest) == 1:
        prompt = rest.pop()
    elif not completion and len(rest) == 1:
        completion = rest.pop()
    if prompt and completion:
        return prompt, completion
    raise _undecided(path, records, there, prompt, completion)


def _first_named(names: Iterable[str], lowered: Mapping[str, str], taken: set[str | None]) -> str | None:
    return next((lowered[name] for name in names if lowered.get(name) not in {None, *taken}), None)


def _find_labels(records: Sequence[Record], names: Sequence[str]) -> str | None:
    """Return the one column of which the values are classes; None if there are none, or several."""
    labels = [name for name in names if is_label_column([str(r[name]) for r in records if r.get(name)])]
    return labels[0] if len(labels) == 1 else None


def _is_id(records: Sequence[Record], name: str) -> bool:
    """Return whether a column numbers or dates the rows: by its name, or by numbers of which each is new."""
    values = [str(record[name]).strip() for record in records if record.get(name) not in (None, "")]
    is_numbering = all(value.isdecimal() for value in values) and len(set(values)) == len(values)
    return bool(ID_NAMES.fullmatch(_plain(name))) or (len(values) > 1 and is_numbering)


def is_label_column(values: Sequence[str]) -> bool:
    """Return whether values are classes: short, on one line, each on average in at least three rows."""
    return are_labels(Counter(values))


def are_labels(rows: Mapping[Any, int]) -> bool:
    """Return whether values, here with their rows, are classes; what is no text is none."""
    return (
        sum(rows.values()) >= 3 * len(rows)
        and len(rows) > 1
        and all(isinstance(value, str) and is_label_like(value) for value in rows)
    )


def is_label_like(value: str) -> bool:
    """Return whether a value is short and on one line."""
    return len(value) <= MAX_LABEL_CHARS and "\n" not in value


def _is_text_column(records: Sequence[Record], name: str) -> bool:
    return _share(records, lambda record: record.get(name) not in (None, "")) >= TEXT_SHARE


def _share(records: Sequence[Record], holds: Any) -> float:
    return sum(map(bool, map(holds, records))) / max(1, len(records))


def _plain_names(there: Sequence[str]) -> dict[str, str]:
    """Return the columns by their plain names; of two that are alike, the first."""
    return {_plain(name): name for name in reversed(there)}


def _plain(name: str) -> str:
    return re.sub(r"[\s-]+", "_", name.strip().casefold())


def _without(path: Path, absent: Sequence[str], there: Sequence[str]) -> InputError:
    lines = [f"{path} has no column {name!r}{suggest_nearest(name, there)}" for name in absent]
    return InputError(
        "\n".join(lines) + f"\ncolumns: {', '.join(there)}",
        "correct the names in its entry of collect.sources (messages_column, or prompt_column and "
        "completion_column), or rename the columns of the file",
    )


def _undecided(
    path: Path, records: Sequence[Record], names: Sequence[str], prompt: str | None, completion: str | None
) -> InputError:
    known = [f"{part} is {name!r}" for part, name in (("prompt", prompt), ("completion", completion)) if name]
    shown = [
        f"  {name}: {shorten(next((r[name] for r in records if r.get(name) not in (None, '')), None))}"
        for name in names[:SHOWN_COLUMNS]
    ]
    if len(names) > SHOWN_COLUMNS:
        shown.append(f"  and {len(names) - SHOWN_COLUMNS} more columns")
    missing = [
        f"`{part}_column`" for part, name in (("prompt", prompt), ("completion", completion)) if not name
    ]
    if len(names) < 2:
        return InputError(
            f"{path} has one column, {', '.join(names)!r}: there is no answer to learn\n" + "\n".join(shown),
            "give it a column of questions and one of answers, or set `delimiter`",
        )
    return InputError(
        f"{path}: which column is which is not clear{''.join(f'; {text}' for text in known)}\n"
        + "\n".join(shown),
        f"set {' and '.join(missing)} in its entry of collect.sources",
    )
