"""Turn exchanges into feature tables of numbers, categories, flags and vectors, page by page.

The columns are defined in `monitoring.traffic.columns`; the keys of JSON answers are found in the reference
by `list_watched_columns`. Answers that were cut off by the client or by an error have no output columns.
"""

from __future__ import annotations

import json
import logging
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from monitoring.traffic.answer_json import (
    MAX_VALUE_CHARS,
    NO_JSON,
    format_category,
    is_same_answer,
    parse_json,
)
from monitoring.traffic.columns import (
    ABSENT,
    ANSWER_PREFIX,
    FEATURES,
    TOOL_FEATURES,
    VECTOR_SIZE,
    Column,
    build_table_schema,
)
from monitoring.traffic.embeddings import embed
from monitoring.traffic.sessions import name_session
from monitoring.traffic.tool_use import ToolUse, is_call, list_tools, read_tool_use
from monitoring.traffic.windows import QuarantinedEvent
from services.events import CLIENT_GONE
from stages.common.errors import InputError
from stages.common.messages import read_calls
from stages.common.params.loop import FeatureSettings
from stages.common.sources.detection.languages import detect_language

if TYPE_CHECKING:
    import pyarrow as pa

Floats = npt.NDArray[np.float64]

logger = logging.getLogger("monitoring.traffic.features")

CANCELLED = "cancelled"

# Keys of JSON answers: a rarer one has too few values in a window; one whose commonest values make up less
# than this is free text, and only looked at for being there.
MIN_KEY_SHARE = 0.01
MIN_KEY_ROWS = 5
MAX_KEYS = 32
COVERED = 0.9
# Whole answers are classes if they are this few to a row: a text is hardly ever written twice.
MAX_CLASS_SHARE = 0.1
ANSWER_CLASS = "answer_class"
COUNTED_VALUES = 50  # times max_categories: then a key is free text for sure, and bounds the memory


@dataclass(frozen=True, slots=True)
class _Seen:
    """A parsed exchange; `answer` is None where it is incomplete."""

    row: Mapping[str, Any]
    prompt: str
    turns: int
    decisions: Mapping[str, Any]
    answer: str | None
    value: Any  # of a JSON answer, or NO_JSON
    tools: ToolUse | None

    @property
    def fields(self) -> Mapping[str, Any] | None:
        return self.value if isinstance(self.value, dict) else None


def list_watched_columns(batches: Iterable[pa.RecordBatch], settings: FeatureSettings) -> tuple[Column, ...]:
    """Return the columns of every window: the fixed ones and the keys of the reference's answers.

    A key is a category if its `max_categories` commonest values make up most of its answers, and else a
    flag: is it there? Vectors are excluded where `settings.embeddings` is none, and the columns of tools
    where hardly any request has some.
    """
    fixed = [column for column in FEATURES if column.kind != "vector" or settings.embeddings != "none"]
    return (*fixed, *_answer_columns(batches, settings.max_categories))


def _answer_columns(batches: Iterable[pa.RecordBatch], max_categories: int) -> list[Column]:
    answers = 0
    exchanges = with_tools = 0
    whole: Counter[str] = Counter()  # answers that are not JSON objects, of exchanges without tools
    seen: Counter[str] = Counter()
    values: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for batch in batches:
        texts = batch.select(["answer", "finish_reason", "parameters"]).to_pylist()
        for row in texts:
            answer = _whole_answer(row)
            is_calling = answer is not None and is_call(answer)
            has_tools = is_calling or bool(list_tools(row["parameters"]))
            exchanges += 1
            with_tools += has_tools
            if is_calling:
                continue
            value = NO_JSON if answer is None else parse_json(answer)
            if not isinstance(value, dict):
                if answer is not None and not has_tools and len(whole) <= COUNTED_VALUES * max_categories:
                    whole[format_category(answer.strip())] += 1
                continue
            answers += 1
            for key, inner in value.items():
                seen[key] += 1
                counted = values[key]
                if len(counted) <= COUNTED_VALUES * max_categories:
                    counted[format_category(inner)] += 1
    wanted = max(MIN_KEY_ROWS, MIN_KEY_SHARE * answers)
    keys = [key for key, rows in seen.most_common() if rows >= wanted][:MAX_KEYS]
    found = [_answer_column(key, values[key], seen[key], max_categories) for key in sorted(keys)]
    if whole.total() > answers and len(whole) <= max(MAX_CLASS_SHARE * whole.total(), 2):
        found.append(Column(ANSWER_CLASS, "output", "category", None, "", "the whole answer, one of a few"))
    uses_tools = with_tools >= max(MIN_KEY_ROWS, MIN_KEY_SHARE * exchanges)
    return [*TOOL_FEATURES, *found] if uses_tools else found


def _answer_column(key: str, values: Counter[str], rows: int, max_categories: int) -> Column:
    common = sum(count for _, count in values.most_common(max_categories))
    if len(values) <= max_categories or common >= COVERED * rows:
        return Column(f"{ANSWER_PREFIX}{key}", "output", "category", None, "", f"the answer's {key}")
    return Column(f"{ANSWER_PREFIX}{key}", "output", "flag", None, "", f"the answer has a {key}")


def compute_feature_tables(
    batches: Iterable[pa.RecordBatch],
    columns: Sequence[Column],
    settings: FeatureSettings,
    labels: Mapping[str, str] | None = None,
    session_turns: Mapping[str, int] | None = None,
    unreadable: list[QuarantinedEvent] | None = None,
) -> Iterator[pa.Table]:
    """Yield the feature table of each batch of `services.events.read_joined`'s columns; memory is bounded.

    An exchange that cannot be read, for any reason, is excluded from its table.

    Args:
        columns: as `list_watched_columns` found them in the reference.
        labels: request_id → right answer, of a sample that was labelled; wins over corrections.
        session_turns: as `monitoring.traffic.sessions.count_session_turns` found them.
        unreadable: gets the exchanges that were excluded.

    Raises:
        InputError: a package that `columns` or `settings` need is not installed.
    """
    for batch in batches:
        if not batch.num_rows:
            continue
        table: pa.Table | None
        try:
            table = _table(batch, columns, settings, labels or {}, session_turns or {})
        except InputError:
            raise
        except Exception:  # of any kind: the exchange that caused it is found and excluded
            table, excluded = _table_of_readable(batch, columns, settings, labels or {}, session_turns or {})
            if unreadable is not None:
                unreadable += excluded
        if table is not None:
            yield table


def _table_of_readable(
    batch: pa.RecordBatch,
    columns: Sequence[Column],
    settings: FeatureSettings,
    labels: Mapping[str, str],
    session_turns: Mapping[str, int],
) -> tuple[pa.Table | None, list[QuarantinedEvent]]:
    """Return the table of the exchanges that can be read one by one, None without any, and the others."""
    import pyarrow as pa

    tables: list[pa.Table] = []
    excluded: list[QuarantinedEvent] = []
    for number in range(batch.num_rows):
        one = batch.slice(number, 1)
        try:
            tables.append(_table(one, columns, settings, labels, session_turns))
        except InputError:
            raise
        except Exception as error:
            name, at = one["request_id"][0].as_py(), one["received_at"][0].as_py()
            logger.warning("%s is quarantined: %r", name, error)
            excluded.append(QuarantinedEvent(name, at, f"unreadable ({type(error).__name__})"))
    return (pa.concat_tables(tables).combine_chunks() if tables else None), excluded


def _table(
    batch: pa.RecordBatch,
    columns: Sequence[Column],
    settings: FeatureSettings,
    labels: Mapping[str, str],
    session_turns: Mapping[str, int],
) -> pa.Table:
    import pyarrow as pa

    schema = build_table_schema(columns)
    seen = [_read(row) for row in batch.to_pylist()]
    shapes = _shapes([one.prompt for one in seen])
    made: list[pa.Array] = [
        pa.array([one.row["request_id"] for one in seen], pa.string()),
        pa.array([one.row["received_at"] for one in seen], pa.float64()),
        pa.array([name_session(one.row) for one in seen], pa.string()),
        pa.array([one.row["version"] for one in seen], pa.string()),
    ]
    for column in columns:
        if column.kind == "vector":
            made.append(_vectors(seen, column.name, settings))
        elif column.name == "label_match":
            made.append(pa.array([_label_match(one, labels) for one in seen], pa.float64()))
        elif column.name == "session_turns":
            made.append(pa.array([session_turns.get(one.row["request_id"]) for one in seen], pa.float64()))
        elif column.name in shapes:
            made.append(pa.array(shapes[column.name], pa.float64(), from_pandas=True))  # NaN is null
        else:
            read = _reader(column)
            made.append(pa.array([read(one) for one in seen], schema.field(column.name).type))
    return pa.Table.from_arrays(made, schema=schema)


def _read(row: Mapping[str, Any]) -> _Seen:
    messages = parse_json(row["messages"])
    prompt = next(m["content"] for m in reversed(messages) if m["role"] == "user")
    answer = _whole_answer(row)
    value = NO_JSON if answer is None or is_call(answer) else parse_json(answer)
    tools = read_tool_use(messages, row["parameters"], answer)
    return _Seen(row, prompt, len(messages), json.loads(row["decisions"]), answer, value, tools)


def _whole_answer(row: Mapping[str, Any]) -> str | None:
    """Return the answer that the model ended itself or by its limit, shown or refused by the guard."""
    answer: str | None = row["answer"]
    return answer if row["finish_reason"] not in (None, CANCELLED) else None


def _reader(column: Column) -> Callable[[_Seen], Any]:
    """Return what reads a column's value from an exchange."""
    if column.name.startswith(ANSWER_PREFIX):
        return _answer_key(column)
    if column.name.startswith("guard_"):
        return _guard(column.name.removeprefix("guard_"))
    if column in TOOL_FEATURES:
        return lambda one: getattr(one.tools, column.name, None)
    return _READERS[column.name]


def _answer_key(column: Column) -> Callable[[_Seen], Any]:
    key = column.name.removeprefix(ANSWER_PREFIX)

    def category(one: _Seen) -> str | None:
        if (fields := one.fields) is None:
            return None
        return format_category(fields[key]) if key in fields else ABSENT

    def flag(one: _Seen) -> float | None:
        return None if one.fields is None else float(key in one.fields)

    return flag if column.kind == "flag" else category


def _guard(check: str) -> Callable[[_Seen], float | None]:
    def suspicious(one: _Seen) -> float | None:
        decision = one.decisions.get(check)
        return None if decision is None else float(not decision[0])

    return suspicious


def _answer_class(one: _Seen) -> str | None:
    if one.answer is None or one.fields is not None or one.tools is not None:
        return None
    return format_category(one.answer.strip())


def _answered(name: str) -> Callable[[_Seen], Any]:
    return lambda one: None if one.answer is None else one.row[name]


def _flag(name: str) -> Callable[[_Seen], float | None]:
    return lambda one: None if one.row[name] is None else float(one.row[name])


def _answer_form(one: _Seen) -> str | None:
    if one.answer is None:
        return None
    if one.fields is not None:
        return ",".join(sorted(one.fields))[:MAX_VALUE_CHARS] or "(no keys)"
    if is_call(one.answer):
        return "(calls)" if read_calls(one.answer) else "(malformed call)"
    if one.value is NO_JSON:
        return "(text)" if one.answer.strip() else "(empty)"
    return "(list)" if isinstance(one.value, list) else "(value)"


def _thumb(one: _Seen) -> float | None:
    thumbs = [given["thumb"] for given in one.row["feedback"] if given["thumb"] is not None]
    return float(thumbs[-1] > 0) if thumbs else None


def _correction(one: _Seen) -> str | None:
    given = [change["correction"] for change in one.row["feedback"] if change["correction"]]
    return given[-1] if given else None


def _corrected(one: _Seen) -> float | None:
    if not one.row["feedback"] or one.answer is None:
        return None
    correction = _correction(one)
    return float(correction is not None and not is_same_answer(one.answer, correction))


def _label_match(one: _Seen, labels: Mapping[str, str]) -> float | None:
    label = labels.get(one.row["request_id"]) or _correction(one)
    return None if label is None or one.answer is None else float(is_same_answer(one.answer, label))


_READERS: dict[str, Callable[[_Seen], Any]] = {
    "prompt_chars": lambda one: len(one.prompt),
    "prompt_words": lambda one: len(one.prompt.split()),
    "turns": lambda one: one.turns,
    "language": lambda one: detect_language(one.prompt),
    "answer_chars": lambda one: None if one.answer is None else len(one.answer),
    "finish_reason": _answered("finish_reason"),
    "answer_form": _answer_form,
    ANSWER_CLASS: _answer_class,
    "mean_logprob": _answered("mean_logprob"),
    "valid_output": _flag("valid_output"),
    "thumb": _thumb,
    "corrected": _corrected,
    "failed": lambda one: float(one.row["status"] >= 500),
    "queue_s": _answered("queue_s"),
    "first_token_s": _answered("first_token_s"),
    "total_s": _answered("total_s"),
    "tokens": lambda one: (
        None if one.answer is None else one.row["prompt_tokens"] + one.row["completion_tokens"]
    ),
    "cancelled": lambda one: float(one.row["status"] == CLIENT_GONE),
    "refused": lambda one: float(400 <= one.row["status"] < CLIENT_GONE),
}


def _shapes(texts: Sequence[str]) -> dict[str, Floats]:
    """Return the shares of kinds of characters in each text; NaN where there is nothing to share."""
    codes = np.frombuffer("".join(texts).encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
    chars = np.array([len(text) for text in texts])
    kinds = {"letter": str.isalpha, "digit": str.isdigit, "capital": str.isupper, "space": str.isspace}
    there = np.flatnonzero(np.bincount(codes)) if len(codes) else np.empty(0, dtype=np.intp)
    text_of = np.repeat(np.arange(len(texts)), chars)
    counts: dict[str, Floats] = {}
    for kind, is_kind in kinds.items():
        table = np.zeros(int(there[-1]) + 1 if len(there) else 1)
        table[[code for code in there if is_kind(chr(code))]] = 1.0
        counts[kind] = np.bincount(text_of, weights=table[codes], minlength=len(texts)).astype(np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        return {
            "non_letter_share": (chars - counts["letter"] - counts["space"]) / np.where(chars, chars, np.nan),
            "digit_share": counts["digit"] / np.where(chars, chars, np.nan),
            "capital_share": counts["capital"] / np.where(counts["letter"], counts["letter"], np.nan),
        }


def _vectors(seen: Sequence[_Seen], name: str, settings: FeatureSettings) -> pa.Array:
    """Return the embeddings of the prompts or answers; null where there is no answer."""
    import pyarrow as pa

    texts = [one.prompt if name == "prompt_vector" else one.answer for one in seen]
    absent = np.array([text is None for text in texts])
    values = np.zeros((len(texts), VECTOR_SIZE), dtype=np.float32)
    if settings.embeddings == "none":
        absent[:] = True
    else:
        values[~absent] = embed([text for text in texts if text is not None], settings.embeddings)
    return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), VECTOR_SIZE, mask=pa.array(absent))
