"""The columns of a feature table, each belonging to one drift type.

A feature table (`pyarrow.Table`) has `list_key_fields` and one column for each `Column`: float64 for a number
and a flag, string for a category, `fixed_size_list<float32>[VECTOR_SIZE]` for a vector. Null means "no value
here": the row is excluded from that column's statistics.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import pyarrow as pa

DriftType = Literal["input", "output", "quality", "service"]  # service is reported and never decides
Kind = Literal["number", "category", "flag", "vector"]  # flag: 0, 1 or null
DECIDING: tuple[DriftType, ...] = ("input", "output", "quality")

VECTOR_SIZE = 64  # of every embedding, whatever made it
ANSWER_PREFIX = "answer."  # of the columns found in JSON answers
ABSENT = "(absent)"  # the value of a key that a JSON answer lacks


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a feature table.

    Attributes:
        worse: the direction that counts, of a quality column; None: any change counts.
        unit: of the numbers; "" for categories, flags and vectors.
        meaning: for a person who reads the verdict.
    """

    name: str
    drift_type: DriftType
    kind: Kind
    worse: Literal["up", "down"] | None
    unit: str
    meaning: str


FEATURES: tuple[Column, ...] = (
    Column("prompt_chars", "input", "number", None, "characters", "length of the last user message"),
    Column("prompt_words", "input", "number", None, "words", "words of the last user message"),
    Column("turns", "input", "number", None, "messages", "messages in the conversation"),
    Column("language", "input", "category", None, "", "language of the last user message"),
    Column("non_letter_share", "input", "number", None, "share", "neither letters nor spaces"),
    Column("digit_share", "input", "number", None, "share", "digits among the characters"),
    Column("capital_share", "input", "number", None, "share", "capitals among the letters"),
    Column("guard_prompt_injection", "input", "flag", None, "", "looks like an injected instruction"),
    Column("guard_toxicity", "input", "flag", None, "", "the request insults or threatens"),
    Column("prompt_vector", "input", "vector", None, "", "wording of the last user message"),
    Column("answer_chars", "output", "number", None, "characters", "length of the answer"),
    Column("finish_reason", "output", "category", None, "", "why the answer ended"),
    Column("answer_form", "output", "category", None, "", "keys of a JSON answer, or what else it is"),
    Column("mean_logprob", "output", "number", None, "nats", "how sure the model was of its tokens"),
    Column("guard_secrets", "output", "flag", None, "", "the answer holds a key or password"),
    Column("guard_personal_data", "output", "flag", None, "", "the answer holds personal data"),
    Column("answer_vector", "output", "vector", None, "", "wording of the answer"),
    Column("valid_output", "quality", "flag", "down", "", "the answer keeps to the schema"),
    Column("thumb", "quality", "flag", "down", "", "thumb up, of the answers with a thumb"),
    Column("corrected", "quality", "flag", "up", "", "corrected, of the answers with feedback"),
    Column("label_match", "quality", "flag", "down", "", "right, of the answers with a known label"),
    Column("failed", "quality", "flag", "up", "", "ended in an error of the server"),
    Column("queue_s", "service", "number", None, "s", "waited for the engine"),
    Column("first_token_s", "service", "number", None, "s", "to the first token"),
    Column("total_s", "service", "number", None, "s", "to the end of the answer"),
    Column("tokens", "service", "number", None, "tokens", "read and written"),
    Column("cancelled", "service", "flag", None, "", "the client went away"),
    Column("refused", "service", "flag", None, "", "refused by the server (4xx)"),
)
# Those of traffic with tools; other traffic has no values in them.
TOOL_FEATURES: tuple[Column, ...] = (
    Column("offered_tools", "input", "number", None, "tools", "tools in the request"),
    Column("session_turns", "input", "number", None, "turns", "turns of a session, at its last request"),
    Column("after_result", "input", "flag", None, "", "the answer follows the result of a tool"),
    Column("called_tools", "output", "category", None, "", "tools that the answer calls"),
    Column("calls", "output", "number", None, "calls", "calls in the answer"),
    Column("malformed_call", "quality", "flag", "up", "", "a call begins in the answer that is none"),
)


def list_key_fields() -> list[pa.Field]:
    """Return the fields that every feature table starts with.

    `session` is never null: the session, else the user, else the request itself.
    """
    import pyarrow as pa

    return [
        pa.field("request_id", pa.string(), nullable=False),
        pa.field("received_at", pa.float64(), nullable=False),
        pa.field("session", pa.string(), nullable=False),
        pa.field("version", pa.string(), nullable=False),
    ]


def build_table_schema(columns: Sequence[Column]) -> pa.Schema:
    """Return the schema of a feature table with these columns."""
    import pyarrow as pa

    types = {
        "number": pa.float64(),
        "flag": pa.float64(),
        "category": pa.string(),
        "vector": pa.list_(pa.float32(), VECTOR_SIZE),
    }
    return pa.schema([*list_key_fields(), *(pa.field(column.name, types[column.kind]) for column in columns)])
