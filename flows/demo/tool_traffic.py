"""Generate the demo's conversations with tools: a request to the packaged home, and a follow-up on it.

Questions and right calls are those of the packaged source of conversations (`home_tools`). The model of the
demo was not trained for them: the service holds its calls by the tools' schemas. Their share of the requests
is the same all day, as are the families of templates, so that they are no change of the traffic.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import cycle, islice, pairwise
from typing import Any

from stages.common.messages import Message, ToolCall
from stages.common.sources.home_intents.grammar import Grammar, load_grammar
from stages.common.sources.home_intents.writer import Writer
from stages.common.sources.home_tools.conversations import ConversationWriter
from stages.common.sources.home_tools.families import Family, make_plan
from stages.common.sources.home_tools.follow_ups import read_follow_ups
from stages.common.sources.home_tools.phrases import LANGUAGE, read_words
from stages.common.sources.home_tools.tools import read_tools

TOOL_SHARE = 0.1  # of the requests
SIZE = 3  # requests of a conversation: a question, the result of its call, a follow-up
USERS = 12
POOL_SEED = 7
MOST_OF_A_FAMILY = 1000
# A model that was not trained for calls may write a text or a number without an end.
BOUNDS: dict[str, dict[str, Any]] = {
    "string": {"maxLength": 40},
    "integer": {"minimum": 0, "maximum": 10_000},
    "number": {"type": "integer", "minimum": 5, "maximum": 35},  # degrees: no endless decimals
}


@dataclass(frozen=True, slots=True)
class Question:
    """What a user asks, and the calls that would be right."""

    text: str
    calls: tuple[ToolCall, ...]


@dataclass(frozen=True, slots=True)
class ToolConversation:
    """A conversation whose requests offer tools.

    Attributes:
        questions: of the user, each of which asks for a call; the second is about the first one's.
        is_required: whether the first one requires a call; else the model decides.
        size: requests to send.
    """

    user: str
    session: str
    questions: tuple[Question, ...]
    is_required: bool
    size: int


def count_tool_requests(count: int, seed: int) -> int:
    """Return how many of `count` requests offer tools: their share, rounded by chance."""
    return math.floor(count * TOOL_SHARE + random.Random(f"{seed}/tools").random())


@cache
def list_tools() -> tuple[dict[str, Any], ...]:
    """Return the tools of the packaged home as requests have them, the values of their arguments bounded."""
    tools = tuple(tool.value for tool in read_tools())
    for tool in tools:
        for schema in tool["function"]["parameters"]["properties"].values():
            schema.update(BOUNDS.get(schema.get("type"), {}))
    return tools


def write_conversations(requests: int, seed: int, families: int = 12) -> list[ToolConversation]:
    """Write conversations of `requests` requests in all; the same arguments give the same ones everywhere.

    Args:
        seed: another one gives other sentences of the same families.
        families: templates that occur together; each is as frequent as the others.
    """
    rng = random.Random(f"{seed}/conversations")
    sizes = [min(SIZE, requests - first) for first in range(0, requests, SIZE)]
    asked = islice(_write_questions(seed, families, rng), len(sizes))
    return [
        ToolConversation(
            f"agent-{rng.randrange(USERS)}", f"tools-{seed}-{number}", both, number % 2 == 0, size
        )
        for number, (size, both) in enumerate(zip(sizes, asked, strict=True))
    ]


def _write_questions(seed: int, families: int, rng: random.Random) -> Iterator[tuple[Question, ...]]:
    """Yield two questions at a time, of each family in turn and without an end."""
    grammar = _grammar()
    writer = ConversationWriter(grammar, Writer(grammar, read_words(), seed), seed)
    pool = _choose_families(families)
    left = [writer.write_family(one, MOST_OF_A_FAMILY) for one in rng.sample(pool, len(pool))]
    found: list[tuple[Question, ...]] = []
    while left:
        for stream in tuple(left):
            questions = (_read_questions(conversation.messages) for conversation in stream)
            both = next((some[:2] for some in questions if len(some) >= 2), None)
            if both is None:
                left.remove(stream)
                continue
            found.append(both)
            yield both
    yield from cycle(found)  # a family has only so many sentences


def _read_questions(messages: Sequence[Message]) -> tuple[Question, ...]:
    """Return the questions that ask for a call, with the calls."""
    return tuple(
        Question(asked.content, called.tool_calls)
        for asked, called in pairwise(messages)
        if asked.role == "user" and called.tool_calls
    )


@cache
def _grammar() -> Grammar:
    return load_grammar(LANGUAGE)


@cache
def _choose_families(count: int) -> tuple[Family, ...]:
    families = make_plan(_grammar().templates, read_follow_ups(), POOL_SEED).families
    return tuple(random.Random(f"{POOL_SEED}/families").sample(families, min(count, len(families))))
