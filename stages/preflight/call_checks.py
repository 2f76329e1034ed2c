"""Whether the service can hold the tools and the learned calls of the rows: tried with its own grammar.

Schemas are looked at by the whole list of tools that a row offers, as a request has it; calls by their tool.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from importlib.util import find_spec
from typing import Any

from services.engines.calls.notation import read_marks
from services.engines.calls.trial import CallTrial
from stages.common.chat.turns import list_learned
from stages.common.errors import InputError
from stages.common.logs import get_logger
from stages.common.messages import LearnedTurns, Tool
from stages.common.records import Row

logger = get_logger("preflight")

SHOWN = 10
SHOWN_IDS = 3
_OTHER_ENGINE = "set services.engine.kind: paged, which holds more"


def find_call_problems(
    tokenizer: Any, rows: Iterable[Row], learned_turns: LearnedTurns, engine: str
) -> list[InputError]:
    """Return which tools and calls of the rows the service would refuse or could not write.

    Args:
        tokenizer: with the chat template that is served.
        rows: all that are learned or judged; one that comes twice is looked at once.
        engine: that will serve, `services.engine.kind`; `auto` holds calls as all others but `openvino` do.
    """
    trial: CallTrial | None = None
    schemas: dict[str, list[Row]] = {}
    calls: list[tuple[Row, str]] = []
    for row in _select_with_tools(rows):
        if trial is None:
            if find_spec("llguidance") is None:
                return [_missing_grammar()]
            try:
                trial = CallTrial(read_marks(tokenizer), engine)
            except InputError as error:  # the template has no tools
                return [error]
            if (fault := trial.find_notation_fault()) is not None:
                return [InputError(f"the rows have tools, and {fault}", _OTHER_ENGINE)]
        fault = trial.find_schema_fault(row.tools)
        if fault is not None:
            schemas.setdefault(fault, []).append(row)
        else:
            calls += ((row, found) for found in _find_call_faults(trial, row, learned_turns))
    if trial is not None and trial.untried:
        logger.warning(
            "%d lists of tools were tried tool by tool and not as a whole: there was no time for more",
            trial.untried,
        )
    if trial is not None and engine == "openvino":
        logger.warning(
            "the calls were tried with llguidance and the limits of the engine openvino, which writes them "
            "by XGrammar: that cannot be asked without a model, and was not tried"
        )
    return [*_describe_schemas(schemas, engine), *_describe_calls(calls)]


def _select_with_tools(rows: Iterable[Row]) -> Iterator[Row]:
    seen: set[str] = set()
    for row in rows:
        if row.tools and row.id not in seen:
            seen.add(row.id)
            yield row


def _find_call_faults(trial: CallTrial, row: Row, learned_turns: LearnedTurns) -> Iterator[str]:
    """Yield the fault of each learned turn with a call that cannot be written."""
    tools: dict[str, Tool] = {tool.name: tool for tool in row.tools}
    for place in list_learned(row.messages, learned_turns):
        made = [call for call in row.messages[place].tool_calls if call.name in tools]
        if fault := trial.find_call_fault(made, tools):
            yield f"message {place + 1}: {fault}"


def _describe_schemas(faults: dict[str, list[Row]], engine: str) -> Iterator[InputError]:
    if not faults:
        return
    lines = [f"  {fault} ({_name_rows(rows)})" for fault, rows in list(faults.items())[:SHOWN]]
    more = [f"  and {len(faults) - SHOWN} more"] if len(faults) > SHOWN else []
    count = len({row.id for rows in faults.values() for row in rows})
    yield InputError(
        "\n".join([f"{count} rows have tools that the service refuses in any request:", *lines, *more]),
        "take what is named out of the schemas in the source of these rows, or leave these tools out "
        "(docs/how-to/tools.md lists what a grammar holds)"
        + (f"; or {_OTHER_ENGINE}" if engine == "openvino" else ""),
    )


def _describe_calls(faults: Sequence[tuple[Row, str]]) -> Iterator[InputError]:
    if not faults:
        return
    lines = [f"  row {row.id} from {row.source}: {fault}" for row, fault in faults[:SHOWN]]
    more = [f"  and {len(faults) - SHOWN} more"] if len(faults) > SHOWN else []
    count = len({row.id for row, _ in faults})
    yield InputError(
        "\n".join([f"{count} rows have calls that the service's grammar cannot write:", *lines, *more]),
        "correct these arguments, or the schemas of their tools, in the source of the rows (a value has to "
        "fit its `format`); a call of weight 0 is not learned and not looked at",
    )


def _name_rows(rows: Sequence[Row]) -> str:
    sources = Counter(row.source for row in rows)
    ids = ", ".join(row.id for row in rows[:SHOWN_IDS])
    more = f" and {len(rows) - SHOWN_IDS} more" if len(rows) > SHOWN_IDS else ""
    return f"rows {ids}{more} from {', '.join(sorted(sources))}"


def _missing_grammar() -> InputError:
    return InputError(
        "the rows have tools, and llguidance, with which the service's grammar is tried, is not installed",
        "install it with serving (pip install '.[serve]')",
    )
