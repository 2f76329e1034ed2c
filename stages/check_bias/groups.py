"""Read the values of a group in each row: from tags, from fields, or from the names of people."""

from __future__ import annotations

import csv
import json
import re
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from stages.common.artifacts import missing
from stages.common.chat.row_class import read_row_class
from stages.common.errors import InputError
from stages.common.messages import Message, Tool, ToolCall
from stages.common.records import Row, count_chars
from stages.common.spool import spool
from stages.common.task.protocol import Task

LEXICON = Path(__file__).parents[1] / "common" / "privacy" / "people.csv"

PERSON_PREFIX = "person_"  # person_gender, person_origin: columns of the lexicon

FIELDS = ("source", "license", "origin")


def read_people(path: Path = LEXICON) -> dict[str, dict[str, str]]:
    """Return the gender and origin of each given name in the lexicon.

    Raises:
        InputError: a column is missing, a cell is empty, or a name occurs twice.
    """
    with path.open(encoding="utf-8", newline="") as lines:
        reader = csv.DictReader(lines)
        lacking = {"name", "gender", "origin"} - set(reader.fieldnames or ())
        if lacking:
            raise InputError(
                f"{path} has no column {', '.join(sorted(lacking))}", "add the columns name,gender,origin"
            )
        people: dict[str, dict[str, str]] = {}
        problems = []
        for number, record in enumerate(reader, start=2):
            name = _normalize(record["name"] or "")
            if not all((name, record["gender"], record["origin"])):
                problems.append(f"{path}:{number}: an empty cell")
            elif name in people:
                problems.append(f"{path}:{number}: {name} occurs twice")
            else:
                people[name] = {"gender": record["gender"], "origin": record["origin"]}
    if problems:
        raise InputError("\n".join(problems), "give each name once, with a gender and an origin")
    return people


def _normalize(text: str) -> str:
    return unicodedata.normalize("NFC", text)


def read_values(
    rows: Sequence[Row], group: str, people: Mapping[str, Mapping[str, str]]
) -> list[tuple[str, ...]]:
    """Return the values of `group` in each row: none, one, or several where a prompt names several people.

    A tag of that name has precedence. Otherwise `person_gender` and `person_origin` are those of the names in
    the user's messages: whole words, with a capital letter, because many names are also words (Hung, Robin).
    """
    if group in FIELDS:
        return [(str(getattr(row, group)),) for row in rows]
    column = group.removeprefix(PERSON_PREFIX)
    reads_names = group.startswith(PERSON_PREFIX) and any(column in person for person in people.values())
    if not reads_names:
        return [(row.tags[group],) if group in row.tags else () for row in rows]
    longest_first = sorted(people, key=len, reverse=True)
    names = re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, longest_first))})(?!\w)")
    found: list[tuple[str, ...]] = []
    for row in rows:
        if group in row.tags:
            found.append((row.tags[group],))
            continue
        text = _normalize("\n".join(m.content for m in row.prompt if m.role == "user"))
        found.append(tuple(sorted({people[name][column] for name in names.findall(text)})))
    return found


def list_known_values(group: str, people: Mapping[str, Mapping[str, str]]) -> set[str]:
    """Return the lexicon's values for a group of people, so that a value without any row is found, too."""
    column = group.removeprefix(PERSON_PREFIX)
    if not group.startswith(PERSON_PREFIX):
        return set()
    return {person[column] for person in people.values() if column in person}


def read_outcomes(rows: Sequence[Row], task: Task) -> list[str]:
    """Return each row's outcome: its class (such as a tool), or the quarter of its answer's length."""
    if task.class_name is not None:
        return [read_row_class(row, task) or "(no class)" for row in rows]
    lengths = np.array([len(row.answer) for row in rows])
    bounds = np.quantile(lengths, [0.25, 0.5, 0.75]) if len(rows) else []
    names = ("shortest quarter", "second quarter", "third quarter", "longest quarter")
    return [names[quarter] for quarter in np.searchsorted(bounds, lengths, side="left")]


def read_rejected_rows(path: Path) -> Sequence[Row]:
    """Read the rows that curate rejected.

    Raises:
        InputError: the file is missing.
    """
    if not path.exists():
        raise missing(path)
    with path.open(encoding="utf-8", newline="\n") as lines:  # U+2028 and U+0085 end no line
        return spool(map(_read_rejected_row, lines), count_chars)


def _read_rejected_row(line: str) -> Row:
    row = json.loads(line)["row"]
    messages = tuple(
        Message(**{**message, "tool_calls": tuple(ToolCall(**call) for call in message["tool_calls"])})
        for message in row["messages"]
    )
    return Row(**{**row, "messages": messages, "tools": tuple(Tool(**tool) for tool in row["tools"])})
