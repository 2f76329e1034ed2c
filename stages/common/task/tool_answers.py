"""Answers that may call tools: reading them, their metrics, and what is wrong with one.

The checks are those of BFCL's AST evaluation (Patil et al. 2025, "The Berkeley Function Calling
Leaderboard", ICML): tools by name, arguments by key and value without an order, parallel calls without an
order, and no call where none is due. Two things differ. Strings are compared exactly (BFCL overlooks case,
spaces and punctuation), as a call is run as it is written. And an argument that is written out with its
default is not equal to one that is left out: defaults are in the schemas of each row's tools, and an answer
is judged without them.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
from typing_extensions import override

from stages.common.messages import CALLS_KEY, MALFORMED_KEY, ToolCall, is_malformed, read_calls
from stages.common.records import format_canonical_json
from stages.common.statistics.intervals import Floats
from stages.common.task.json_answers import read_json_answer
from stages.common.task.metrics import Metric, compute_ratio, compute_share
from stages.common.task.text_metrics import score_chrf

TEXT_CLASS = "(text)"
MEANINGS = {
    "call_match": "turns that are right: the same calls with equal arguments, in any order; or text, and no "
    "call, where the reference calls nothing",
    "tool_chosen": "turns that call the tools of the reference and no other, of those in which it calls any",
    "argument_f1": "micro-averaged F1 over the arguments: tool, key and value",
    "missing_call": "turns without a call, of those in which the reference calls a tool; lower is better",
    "needless_call": "turns with a call, of those in which the reference calls nothing; lower is better",
    "malformed_call": "turns in which a call begins that is none; lower is better",
    "text_chrf": "corpus chrF2 of the turns in which the reference calls nothing, 0 to 100",
}
ERROR_TYPES = (
    "malformed call",
    "missing call",
    "needless call",
    "wrong tool",
    "missing argument",
    "wrong value",
    "extra argument",
    "wrong number of calls",
    "other text",
)
_BEGIN = f'{{"{CALLS_KEY}":['  # of what `format_calls` writes for calls without text
SHOWN_CHARS = 100  # of a malformed call


@dataclass(frozen=True, slots=True)
class Call:
    """One call; `arguments` are pairs of key and value as canonical JSON, sorted: equal for equal calls."""

    tool: str
    arguments: tuple[tuple[str, str], ...]

    def write(self) -> ToolCall:
        """Return the call with its keys sorted and its values as canonical JSON."""
        pairs = (f"{json.dumps(key, ensure_ascii=False)}:{value}" for key, value in self.arguments)
        return ToolCall(self.tool, f"{{{','.join(pairs)}}}")

    @override
    def __str__(self) -> str:
        return f"{self.tool}({', '.join(f'{key}={value}' for key, value in self.arguments)})"


@dataclass(frozen=True, slots=True)
class ToolAnswer:
    """A turn of the assistant.

    Attributes:
        text: its content.
        calls: sorted, so that equal turns are equal in whatever order they call.
        malformed: what the model wrote as a call that is none; None in all other turns.
    """

    text: str
    calls: tuple[Call, ...] = ()
    malformed: str | None = None

    @property
    def tools(self) -> tuple[str, ...]:
        """The names of the tools that are called, sorted, each once."""
        return tuple(sorted({call.tool for call in self.calls}))

    @property
    def is_usable(self) -> bool:
        """Whether there is something to use, a call that can be run or text."""
        return self.malformed is None and bool(self.calls or self.text.strip())


def read_tool_answer(answer: str) -> ToolAnswer:
    """Return the turn that an answer is (`Message.answer`); any text is one.

    Calls that have a key twice, a number beyond any float or half of a surrogate pair are malformed: readers
    of JSON disagree about them.
    """
    turn, found = read_calls(answer), read_json_answer(answer)
    if turn is None and not is_malformed(answer) and not answer.startswith(_BEGIN):
        return ToolAnswer(answer)
    if turn is None or found is None:
        return ToolAnswer("", malformed=_read_malformed(answer))
    calls = [
        Call(
            call["name"],
            tuple(sorted((key, format_canonical_json(value)) for key, value in call["arguments"].items())),
        )
        for call in found.value["tool_calls"]
    ]
    return ToolAnswer(turn[0], tuple(sorted(calls, key=lambda call: (call.tool, call.arguments))))


def respell_calls(answer: str) -> str:
    """Return calls in the spelling of `format_calls`, which people who correct one need not know."""
    value = read_object(answer)
    if CALLS_KEY not in value or read_calls(answer.strip()) is not None:
        return answer.strip()
    content = {"content": value["content"]} if value.get("content") else {}
    rest = {key: inner for key, inner in value.items() if key not in ("content", CALLS_KEY)}
    ordered = {**content, CALLS_KEY: value[CALLS_KEY], **rest}
    return json.dumps(ordered, ensure_ascii=False, separators=(",", ":"))


def read_object(text: str) -> dict[str, Any]:
    """Return the JSON object that a text is; an empty one for any other text."""
    found = read_json_answer(text)
    return found.value if found is not None and isinstance(found.value, dict) else {}


def calls_match(answer: ToolAnswer, reference: ToolAnswer) -> bool:
    """Return whether a turn does what the reference does: the same calls, or some text and no call.

    Text is not compared, neither next to calls nor alone: `text_chrf` measures that.
    """
    return answer.is_usable and answer.calls == reference.calls


def score_tools(answers: Sequence[ToolAnswer], references: Sequence[ToolAnswer]) -> dict[str, Metric]:
    """Return the metrics of turns, as `MEANINGS` defines them; those that no reference concerns are left out.

    - `call_match`: see `calls_match`.
    - `tool_chosen`: how often a tool is called does not count here.
    - `argument_f1`: an argument is right if the reference has a call of the same tool with an equal value
      under the same key; each counts as often as it occurs. A malformed call has none. 1 without arguments.
    - `text_chrf`: a turn that calls a tool is compared with the text that it has next to the call.
    """
    pairs = list(zip(answers, references, strict=True))
    calling = [bool(reference.calls) for reference in references]
    silent = [not called for called in calling]
    metrics = {"call_match": compute_share([calls_match(a, r) for a, r in pairs])}
    if any(calling):
        chosen = [a.malformed is None and a.tools == r.tools for a, r in pairs]
        missing = [a.malformed is None and not a.calls for a in answers]
        metrics["tool_chosen"] = _share_of(chosen, calling)
        metrics["argument_f1"] = Metric(
            np.array([_count_arguments(a, r) for a, r in pairs], dtype=float), compute_ratio, 1.0
        )
        metrics["missing_call"] = _share_of(missing, calling)
    if any(silent):
        metrics["needless_call"] = _share_of([bool(a.calls) for a in answers], silent)
    metrics["malformed_call"] = compute_share([a.malformed is not None for a in answers])
    if any(silent):
        metrics["text_chrf"] = score_chrf(
            [a.text if counts else "" for a, counts in zip(answers, silent, strict=True)],
            [r.text if counts else "" for r, counts in zip(references, silent, strict=True)],
        )
    return metrics


def find_tool_errors(answer: ToolAnswer, reference: ToolAnswer) -> dict[str, str]:
    """Return what differs, by the types of `ERROR_TYPES`; empty if the turn is right and its text equal."""
    if answer.malformed is not None:
        return {"malformed call": _shorten(answer.malformed)}
    if not reference.calls and answer.calls:
        return {"needless call": _join(answer.calls)}
    if reference.calls and not answer.calls:
        return {"missing call": _join(reference.calls)}
    if not reference.calls:
        return _compare_texts(answer.text, reference.text)
    by_type: dict[str, list[str]] = {name: [] for name in ERROR_TYPES}
    if answer.tools != reference.tools:
        by_type["wrong tool"].append(f"{'+'.join(answer.tools)}, not {'+'.join(reference.tools)}")
    for tool in sorted({*answer.tools} & {*reference.tools}):
        given, wanted = ([call for call in one.calls if call.tool == tool] for one in (answer, reference))
        if len(given) != len(wanted):
            by_type["wrong number of calls"].append(f"{tool} {len(given)} times, not {len(wanted)}")
        for one, other in _pair(given, wanted):
            for name, text in _compare_arguments(one, other):
                by_type[name].append(text)
    return {name: "; ".join(found) for name, found in by_type.items() if found}


def measure_nearness(answer: ToolAnswer, reference: ToolAnswer) -> float:
    """Return how near a wrong turn comes: F1 of its arguments, or chrF where no call is due."""
    if reference.calls:
        right, both = _count_arguments(answer, reference)
        return 100.0 * right / both if both else 0.0
    return score_chrf([answer.text], [reference.text]).value()


def _read_malformed(answer: str) -> str:
    """Return what the model wrote."""
    written = read_object(answer).get(MALFORMED_KEY)
    return written if isinstance(written, str) else answer


def _share_of(hits: Sequence[bool], counted: Sequence[bool]) -> Metric:
    """Return the share of hits in the rows that count."""
    columns = [[float(hit and counts), float(counts)] for hit, counts in zip(hits, counted, strict=True)]
    return Metric(np.array(columns), _compute_share, 1.0)


def _compute_share(sums: Floats) -> Floats:
    """Return the first column over the second; 0 for nothing of nothing, as a resample may have."""
    top, bottom = sums[..., 0], sums[..., 1]
    found: Floats = np.divide(top, bottom, out=np.zeros_like(top), where=bottom > 0)
    return found


def _list_arguments(turn: ToolAnswer) -> Counter[tuple[str, str, str]]:
    return Counter((call.tool, key, value) for call in turn.calls for key, value in call.arguments)


def _count_arguments(answer: ToolAnswer, reference: ToolAnswer) -> tuple[int, int]:
    """Return twice the right arguments, and all arguments of both sides: F1 is their ratio."""
    given, wanted = _list_arguments(answer), _list_arguments(reference)
    return 2 * (given & wanted).total(), given.total() + wanted.total()


def _pair(given: Sequence[Call], wanted: Sequence[Call]) -> Iterator[tuple[Call, Call]]:
    """Yield calls of one tool with those that they should have been: equal ones, then the most alike."""
    equal = Counter(given) & Counter(wanted)
    left, open_ones = ([*(Counter(side) - equal).elements()] for side in (given, wanted))
    for call in left:
        if open_ones:
            nearest = max(open_ones, key=lambda other: len({*call.arguments} & {*other.arguments}))
            open_ones.remove(nearest)
            yield call, nearest


def _compare_arguments(given: Call, wanted: Call) -> Iterator[tuple[str, str]]:
    had, should = dict(given.arguments), dict(wanted.arguments)
    yield from chain(
        (("missing argument", f"{given.tool}.{k}={v}") for k, v in should.items() if k not in had),
        (
            ("wrong value", f"{given.tool}.{k}={had[k]}, not {v}")
            for k, v in should.items()
            if had.get(k, v) != v
        ),
        (("extra argument", f"{given.tool}.{k}={v}") for k, v in had.items() if k not in should),
    )


def _compare_texts(answer: str, reference: str) -> dict[str, str]:
    if answer.strip() == reference.strip():
        return {}
    if not answer.strip():
        return {"other text": "no text"}
    return {"other text": f"chrF {score_chrf([answer], [reference]).value():.0f}"}


def _join(calls: Sequence[Call]) -> str:
    return "; ".join(map(str, calls))


def _shorten(text: str) -> str:
    return text if len(text) <= SHOWN_CHARS else f"{text[:SHOWN_CHARS]}…"
