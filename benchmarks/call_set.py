"""300 questions in the shape of BFCL's AST categories, and their scorer: part `calls` of `conversations`.

BFCL (Patil et al. 2025, "The Berkeley Function Calling Leaderboard", ICML) has an installable scorer,
`bfcl-eval`. It is not used: it needs well over a hundred packages, among them an older numpy than ours.
This set is written here, about tools that no packaged row has, and shares BFCL's rules: every required
argument, none that is unknown, each with an accepted value; strings without regard to case, spaces and
punctuation; parallel calls in any order; no call where no tool fits. Its figures are not BFCL's.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from services.engines.offline import ModelFolders, load_asker, pick_engine
from stages.common.artifacts import artifacts
from stages.common.chat.template import encode_prompt
from stages.common.messages import Message, Tool, ToolCall, read_calls
from stages.common.model.generation import EvalPrompt
from stages.common.task.tool_answers import read_tool_answer

COUNTS = {"simple": 100, "multiple": 75, "parallel": 75, "irrelevance": 50}
SEED = 7
MAX_TOKENS = 200
LEFT_OUT = None  # among the accepted values: the argument may be left out

CITIES = ("Lagos", "Lima", "Osaka", "Oslo", "Quito", "Riga", "Tunis", "Zagreb")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday")


@dataclass(frozen=True, slots=True)
class Function:
    """A tool of the set.

    Attributes:
        arguments: by name, its description and the values that questions use; all of one type.
        defaults: of the arguments that may be left out.
        questions: with the names of arguments in braces; one that is not named is left out.
    """

    name: str
    about: str
    arguments: Mapping[str, tuple[str, Sequence[Any]]]
    questions: Sequence[str]
    defaults: Mapping[str, Any]

    @property
    def tool(self) -> Tool:
        """The function as a tool of a request."""
        properties = {
            name: {"type": _type_of(values[0]), "description": about}
            for name, (about, values) in self.arguments.items()
        }
        required = [name for name in self.arguments if name not in self.defaults]
        schema = {"type": "object", "properties": properties, "required": required}
        function = {"name": self.name, "description": self.about, "parameters": schema}
        return Tool(json.dumps({"type": "function", "function": function}))


def _type_of(value: Any) -> str:
    return {str: "string", int: "integer", float: "number"}[type(value)]


FUNCTIONS = (
    Function(
        "get_forecast",
        "Weather forecast of a city",
        {"city": ("name of the city", CITIES), "days": ("number of days", (2, 3, 5, 7))},
        ("What will the weather be like in {city} for the next {days} days?", "Forecast for {city}, please."),
        {"days": 1},
    ),
    Function(
        "find_flights",
        "Search for flights between two cities",
        {
            "origin": ("city of departure", CITIES[:4]),
            "destination": ("city of arrival", CITIES[4:]),
            "weekday": ("day of departure", DAYS),
        },
        (
            "Which flights go from {origin} to {destination} on {weekday}?",
            "I have to fly to {destination} on {weekday}, starting in {origin}.",
        ),
        {},
    ),
    Function(
        "convert_currency",
        "Convert an amount of money",
        {
            "amount": ("how much", (12, 40, 75, 260)),
            "source": ("code of the currency to convert", ("EUR", "USD", "GBP")),
            "target": ("code of the currency to get", ("JPY", "NOK", "PEN")),
        },
        ("How much is {amount} {source} in {target}?", "Turn {amount} {source} into {target}."),
        {},
    ),
    Function(
        "create_event",
        "Put an event into the calendar",
        {
            "title": ("what the event is", ("dentist", "team lunch", "piano lesson", "budget review")),
            "weekday": ("day of the event", DAYS),
            "hour": ("hour of the day, 0 to 23", (9, 11, 14, 16)),
        },
        (
            "Put {title} into my calendar on {weekday} at {hour}:00.",
            "On {weekday} at {hour}:00 I have {title}.",
        ),
        {},
    ),
    Function(
        "search_books",
        "Search the catalogue of the library",
        {
            "author": ("name of the author", ("Ursula Le Guin", "Chinua Achebe", "Jorge Amado")),
            "language": ("language of the book", ("Spanish", "French", "German")),
        },
        ("Does the library have books by {author} in {language}?", "Find books by {author}."),
        {"language": "English"},
    ),
    Function(
        "book_table",
        "Reserve a table in a restaurant",
        {
            "restaurant": ("name of the restaurant", ("Blue Door", "Casa Nova", "The Lantern")),
            "people": ("number of guests", (2, 4, 6)),
            "weekday": ("day of the visit", DAYS),
        },
        (
            "Get us a table for {people} at {restaurant} on {weekday}.",
            "We are {people} and want to eat at {restaurant} on {weekday}.",
        ),
        {},
    ),
    Function(
        "track_parcel",
        "Where a parcel is",
        {"number": ("number of the parcel", ("PX1042", "QR7731", "ZK2058", "LM9910"))},
        ("Where is my parcel {number}?", "Has {number} been delivered yet?"),
        {},
    ),
    Function(
        "log_run",
        "Record a run in the training diary",
        {"kilometres": ("length of the run", (3, 5, 8, 12)), "minutes": ("time it took", (20, 35, 50, 70))},
        ("I ran {kilometres} kilometres in {minutes} minutes.", "Log a run: {kilometres} km, {minutes} min."),
        {},
    ),
    Function(
        "compute_loan",
        "Monthly payment of a loan",
        {
            "principal": ("amount of the loan", (5000, 12000, 80000)),
            "rate": ("interest a year in percent", (2.5, 3.5, 4.5)),
            "years": ("term in years", (3, 10, 15)),
        },
        (
            "What do I pay a month for {principal} at {rate} percent over {years} years?",
            "Monthly payment of a {years}-year loan of {principal} at {rate} percent?",
        ),
        {},
    ),
    Function(
        "translate_word",
        "Translate a word",
        {
            "word": ("the word", ("bridge", "harvest", "lighthouse", "sparrow")),
            "language": ("language to translate into", ("Spanish", "Turkish", "Swahili")),
        },
        ("What is {word} in {language}?", "Translate {word} into {language}."),
        {},
    ),
)


@dataclass(frozen=True, slots=True)
class Case:
    """A question, the tools that it comes with, and the calls to make: accepted values by argument."""

    category: str
    question: str
    tools: tuple[Tool, ...]
    expected: tuple[tuple[str, Mapping[str, tuple[Any, ...]]], ...]


def write_cases(counts: Mapping[str, int] | None = None, seed: int = SEED) -> list[Case]:
    """Return the cases; the same arguments give the same ones everywhere."""
    rng = random.Random(seed)
    found = []
    for category, count in (COUNTS if counts is None else counts).items():
        seen: set[tuple[str, tuple[str, ...]]] = set()
        while len(seen) < count:
            case = _write_case(category, rng)
            key = case.question, tuple(tool.name for tool in case.tools)
            if key not in seen:
                seen.add(key)
                found.append(case)
    return found


def _write_case(category: str, rng: random.Random) -> Case:
    function, *others = rng.sample(FUNCTIONS, 4)
    calls = 1 if category != "parallel" else rng.choice((2, 3))
    parts: dict[str, Any] = {}
    while len(parts) < calls:
        text, accepted = _ask(function, rng)
        parts[text] = (function.name, accepted)
    offered = [function] if category in ("simple", "parallel") else [function, *others]
    if category == "irrelevance":
        offered = others
    rng.shuffle(offered)
    expected = () if category == "irrelevance" else tuple(parts.values())
    return Case(category, " ".join(parts), tuple(one.tool for one in offered), expected)


def _ask(function: Function, rng: random.Random) -> tuple[str, dict[str, tuple[Any, ...]]]:
    """Return a question and the accepted values of each argument."""
    question = rng.choice(function.questions)
    values = {name: rng.choice(values) for name, (_, values) in function.arguments.items()}
    accepted: dict[str, tuple[Any, ...]] = {}
    for name, value in values.items():
        if f"{{{name}}}" in question:
            accepted[name] = (value,)
        else:
            accepted[name] = (function.defaults[name], LEFT_OUT)
    return question.format(**values), accepted


def is_right(case: Case, answer: str) -> bool:
    """Return whether an answer (`Message.answer`) makes the calls of a case and no others."""
    turn = read_tool_answer(answer)
    if not case.expected:
        return turn.is_usable and not turn.calls
    read = read_calls(answer)
    if turn.malformed is not None or read is None or len(read[1]) != len(case.expected):
        return False
    return _match_all(list(read[1]), case.expected)


def _match_all(
    calls: Sequence[ToolCall], expected: Sequence[tuple[str, Mapping[str, tuple[Any, ...]]]]
) -> bool:
    """Return whether each expected call can have a call of its own."""
    if not expected:
        return True
    return any(
        _matches(call, *expected[0]) and _match_all([*calls[:place], *calls[place + 1 :]], expected[1:])
        for place, call in enumerate(calls)
    )


def _matches(call: ToolCall, name: str, accepted: Mapping[str, tuple[Any, ...]]) -> bool:
    values = call.values
    if call.name != name or not values.keys() <= accepted.keys():
        return False
    return all(
        any(_equal(values[key], one) for one in choices) if key in values else LEFT_OUT in choices
        for key, choices in accepted.items()
    )


def _equal(value: Any, accepted: Any) -> bool:
    """Return whether a value is an accepted one, of its type: a whole number is a number, a bool is none."""
    if isinstance(value, str) and isinstance(accepted, str):
        return _simplify(value) == _simplify(accepted)
    numbers = isinstance(value, int | float) and isinstance(accepted, int | float)
    kinds = isinstance(accepted, float) or isinstance(value, int)
    return numbers and kinds and not isinstance(value, bool) and value == accepted


def _simplify(text: str) -> str:
    return re.sub(r"[ ,./\-_*^'\"]", "", text).lower()


def measure_calls(tokenizer: Any, cases: Sequence[Case], batch_size: int = 16) -> dict[str, Any]:
    """Ask the base and the tuned model every question, with the tools of its case; score both."""
    base, tuned = artifacts("fetch_base"), artifacts("finetune")
    gguf = artifacts("export") / "model.gguf"
    engine = pick_engine("auto", base, gguf.is_file())
    models = {
        "base": ModelFolders(base),
        "tuned": ModelFolders(base, tuned, gguf if engine == "paged" else None),
    }
    prompts = [encode_prompt(tokenizer, [Message("user", c.question)], c.tools) for c in cases]
    questions = [EvalPrompt(prompt, [tokenizer.eos_token_id], has_tools=True) for prompt in prompts]
    found: dict[str, Any] = {"engine": engine}
    for name, folders in models.items():
        ask = load_asker(folders, engine, tokenizer, batch_size, MAX_TOKENS)
        right = [is_right(c, a.text) for c, a in zip(cases, ask(questions), strict=True)]
        found[name] = dict(_count(cases, right))
    return found


def _count(cases: Sequence[Case], right: Sequence[bool]) -> Iterator[tuple[str, dict[str, float]]]:
    """Yield the share of right answers of each category, and of all, with Wilson's interval of 95 %."""
    from scipy.stats import binomtest

    categories = list(dict.fromkeys(case.category for case in cases))
    for category in (*categories, "all"):
        hits = [hit for case, hit in zip(cases, right, strict=True) if category in (case.category, "all")]
        interval = binomtest(sum(hits), len(hits)).proportion_ci(method="wilson")
        yield (
            category,
            {
                "right": sum(hits),
                "n": len(hits),
                "share": round(sum(hits) / len(hits), 4),
                "low": round(float(interval.low), 4),
                "high": round(float(interval.high), 4),
            },
        )
