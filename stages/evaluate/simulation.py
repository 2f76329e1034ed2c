"""Run test conversations in a simulator, with the model's own calls and their results.

The user's turns are those of the reference; everything between them is the model's. A simulator is a function
of a number that returns a world:

- `world.run(name, arguments)` carries out a call and returns its result, text or JSON;
- `world.state` is what the calls have changed, as JSON.

Equal numbers must give equal worlds: the reference's calls run in one, the model's in another, and both ends
are compared, as in BFCL's multi-turn evaluation (Patil et al. 2025, "The Berkeley Function Calling
Leaderboard", ICML). An error of a simulator ends one conversation, which is counted and not judged.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from hashlib import sha256
from importlib import import_module
from threading import Thread
from typing import Any, Protocol

from stages.common.chat.template import encode_prompt
from stages.common.errors import InputError
from stages.common.logs import show_packages
from stages.common.messages import Message, ToolCall, format_arguments, is_malformed
from stages.common.model.generation import Answer, EvalPrompt
from stages.common.records import Row
from stages.common.task.protocol import Task
from stages.common.tools.schemas import find_argument_problem

MAX_ROUNDS = 6  # of calls before an answer: more is a loop
RUN_S = 10.0  # for one call, and for a new world
FINISHED = "finished"


class World(Protocol):
    """What a simulator returns."""

    @property
    def state(self) -> Any:
        """What the calls have changed."""

    def run(self, name: str, arguments: dict[str, Any]) -> Any:
        """Carry out a call and return its result."""


Simulator = Callable[[int], World]
Ask = Callable[[Sequence[EvalPrompt]], Sequence[Answer]]


class SimulatorError(Exception):
    """A simulator raised an error, took too long, or returned what is no JSON."""


@dataclass(slots=True)
class SimulatedConversation:
    """How a conversation went, and what is needed to go on.

    Attributes:
        questions: turns of the user that are still to come.
        results: of the calls that ran, each with the name of its tool.
        end: why it ended; None while it goes on. An error of the simulator is in `error`.
    """

    row: Row
    world: World
    expected_state: str
    expected_results: Counter[str]
    messages: list[Message]
    questions: list[Message]
    calls: int = 0
    ran: int = 0
    rounds: int = 0
    results: Counter[str] = field(default_factory=Counter)
    state: str = ""
    end: str | None = None
    error: str | None = None

    @property
    def turns(self) -> int:
        """How many turns of the user the conversation has."""
        return sum(message.role == "user" for message in self.row.messages)

    @property
    def state_matches(self) -> bool:
        """Whether the world ends as with the calls of the reference."""
        return self.state == self.expected_state

    @property
    def has_results(self) -> bool:
        """Whether the results of the reference's calls are all among those of the model."""
        return not self.expected_results - self.results


def load_simulator(name: str) -> Simulator:
    """Return the function that `evaluate.simulator` names.

    Raises:
        InputError: it cannot be imported, or is no function.
    """
    module, _, attribute = name.partition(":")
    fix = "name a function of a module that Python can import here, as package.module:function"
    show_packages()  # the user's code may use them
    try:
        found = getattr(import_module(module), attribute)
    except Exception as error:  # of the user's module, of any kind
        raise InputError(f"evaluate.simulator: {name} cannot be loaded: {error!r}", fix) from error
    if not callable(found):
        raise InputError(f"evaluate.simulator: {name} is no function", fix)
    simulator: Simulator = found
    return simulator


def list_conversations(rows: Iterable[Row]) -> list[Row]:
    """Return the longest row of each conversation: test rows are its turns, each with those before it."""
    longest: dict[tuple[Message, ...], Row] = {}
    for row in sorted(rows, key=lambda row: -len(row.messages)):
        messages = tuple(row.messages)
        if row.tools and messages not in longest:
            longest[messages] = row
            for end, message in enumerate(messages[:-1], start=1):
                if message.role == "assistant":
                    longest.setdefault(messages[:end], row)
    return list({row.id: row for row in longest.values()}.values())


def simulate(
    rows: Sequence[Row],
    simulator: Simulator,
    ask: Ask,
    tokenizer: Any,
    task: Task,
    max_prompt_tokens: int | None,
    seconds: float,
) -> list[SimulatedConversation]:
    """Run conversations, all of them a step at a time; return those that ended.

    Args:
        max_prompt_tokens: what leaves room for an answer in the model's context; None for no limit.
        seconds: after which no further step is begun.
    """
    until = time.monotonic() + seconds
    outcomes = [_begin(row, simulator) for row in rows]
    while time.monotonic() < until and (open_ones := [one for one in outcomes if _is_open(one)]):
        prompts = [encode_prompt(tokenizer, one.messages, one.row.tools) for one in open_ones]
        asked = []
        for one, prompt in zip(open_ones, prompts, strict=True):
            if max_prompt_tokens is not None and len(prompt) > max_prompt_tokens:
                one.end = "longer than the model's context"
            else:
                asked.append((one, EvalPrompt(prompt, [tokenizer.eos_token_id], has_tools=True)))
        answers = ask([prompt for _, prompt in asked]) if asked else []
        for (one, _), answer in zip(asked, answers, strict=True):
            _go_on(one, answer, task)
    for one in outcomes:
        if one.end is not None:
            _try(one, lambda one=one: setattr(one, "state", _read_state(one.world)))  # type: ignore[misc]
    return [one for one in outcomes if not _is_open(one)]


def _is_open(one: SimulatedConversation) -> bool:
    return one.end is None and one.error is None


def _begin(row: Row, simulator: Simulator) -> SimulatedConversation:
    """Return a conversation at its first question, with the end of the reference's calls."""
    first = next(place for place, message in enumerate(row.messages) if message.role == "user")
    users = [message for message in row.messages if message.role == "user"]
    one = SimulatedConversation(row, _NoWorld(), "", Counter(), list(row.messages[: first + 1]), users[1:])

    def prepare() -> None:
        number = int(sha256(row.id.encode()).hexdigest()[:8], 16)
        reference = run_in_time(lambda: simulator(number))
        for message in row.messages:
            for call in message.tool_calls:
                one.expected_results[_run(reference, call)[1]] += 1
        one.expected_state = _read_state(reference)
        one.world = run_in_time(lambda: simulator(number))

    _try(one, prepare)
    return one


def _go_on(one: SimulatedConversation, answer: Answer, task: Task) -> None:
    """Carry out the calls of an answer, or put the next question after it."""
    if is_malformed(answer.text):
        one.end = "malformed call"
        return
    message = task.to_message(answer.text)
    if not message.tool_calls and not message.content.strip():
        one.end = "empty answer"
        return
    one.messages.append(message)
    if not message.tool_calls:
        one.rounds = 0
        if one.questions:
            one.messages.append(one.questions.pop(0))
        else:
            one.end = FINISHED
        return
    one.rounds += 1
    _try(one, lambda: _run_calls(one, message.tool_calls))
    if one.rounds == MAX_ROUNDS and one.error is None:
        one.end = f"{MAX_ROUNDS} answers with calls to one question"


def _run_calls(one: SimulatedConversation, calls: Sequence[ToolCall]) -> None:
    """Carry out calls; one that no tool has, or that does not fit its schema, gets an error as its result."""
    tools = {tool.name: tool for tool in one.row.tools}
    for call in calls:
        one.calls += 1
        if call.name not in tools:
            result = {"error": f"unknown tool {call.name}"}
        elif find_argument_problem(tools[call.name], call.values) is not None:
            result = {"error": "arguments outside the schema"}
        else:
            result, compared = _run(one.world, call)
            one.ran += 1
            one.results[compared] += 1
        text = result if isinstance(result, str) else format_arguments(result)
        one.messages.append(Message("tool", text, tool_call_id=call.id))


def _run(world: World, call: ToolCall) -> tuple[Any, str]:
    """Return the result of a call, and the text by which it is compared."""
    result = run_in_time(lambda: world.run(call.name, call.values))
    return result, f"{call.name} {_to_json(result, f'the result of {call.name}')}"


def _read_state(world: World) -> str:
    return _to_json(run_in_time(lambda: world.state), "the state")


def _to_json(value: Any, what: str) -> str:
    """Return a value with its keys in order, so that equal values are equal texts."""
    try:
        return json.dumps(value, ensure_ascii=False, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise SimulatorError(f"{what} is no JSON: {error}") from None


def _try(one: SimulatedConversation, step: Callable[[], None]) -> None:
    """Do a step with the simulator; its error ends the conversation."""
    try:
        step()
    except SimulatorError as error:
        one.error = str(error)


def run_in_time(step: Callable[[], Any]) -> Any:
    """Return what a step of the simulator returns.

    Raises:
        SimulatorError: it raises an error, or takes too long; its thread cannot be ended and runs on.
    """
    found: Future[Any] = Future()

    def target() -> None:
        try:
            found.set_result(step())
        except BaseException as error:  # of the user's code, of any kind
            found.set_exception(SimulatorError(f"{type(error).__name__}: {error}"[:200]))

    Thread(target=target, daemon=True).start()
    try:
        return found.result(RUN_S)
    except TimeoutError:
        raise SimulatorError(f"it took longer than {RUN_S:g} s") from None


class _NoWorld:
    """What a conversation has until its simulator has returned a world."""

    state = None

    def run(self, name: str, arguments: dict[str, Any]) -> Any:
        raise SimulatorError("there is no world")
