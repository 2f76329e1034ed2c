"""Write conversations: requests with their calls, results and answers, and what follows."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from stages.common.messages import Message, ToolCall
from stages.common.sources.home_intents.grammar import Grammar, Template
from stages.common.sources.home_intents.lexicon import Person
from stages.common.sources.home_intents.writer import Writer
from stages.common.sources.home_tools.families import Family
from stages.common.sources.home_tools.follow_ups import (
    NO_TOOL,
    THANKS,
    FollowUp,
    can_follow,
    follow,
)
from stages.common.sources.home_tools.intents import RULES, read_intent
from stages.common.sources.home_tools.replies import answer_in_words, answer_result, draw_result
from stages.common.sources.home_tools.slots import fill_follow_up

MAX_FOLLOW_UPS = 3
MISSING_SHARE = 0.08  # of the last calls: the device is not there
MAX_UNUSED = 12  # sentences of a template that are no call, in a row, before it is given up
MAX_TRIES = 30  # wordings of a request that no tool covers, before its template is given up


@dataclass(frozen=True, slots=True)
class Request:
    """A first request: its words, its call, and the person that it names."""

    text: str
    call: ToolCall
    person: Person | None


@dataclass(slots=True)
class Conversation:
    """A conversation under construction; `call` is the latest call, which follow-ups are about."""

    messages: list[Message] = field(default_factory=list)
    calls: list[ToolCall] = field(default_factory=list)
    kinds: list[str] = field(default_factory=list)
    person: Person | None = None

    @property
    def turns(self) -> int:
        """The number of the user's turns."""
        return sum(message.role == "user" for message in self.messages)

    def add_calls(self, text: str, calls: Sequence[ToolCall], rng: random.Random, is_last: bool) -> None:
        """Add a request, its calls, their results and the answer."""
        results = [
            draw_result(call, rng, can_fail=is_last and rng.random() < MISSING_SHARE) for call in calls
        ]
        answers = map(answer_result, calls, results)
        self.messages += [Message("user", text), Message("assistant", "", tuple(calls))]
        self.messages += [Message("tool", result) for result in results]
        self.messages.append(Message("assistant", " ".join(answers)))
        self.calls += calls

    def add_words(self, text: str, kind: str) -> None:
        """Add a turn of the user that needs no call, and its answer."""
        self.messages += [Message("user", text), Message("assistant", answer_in_words(kind))]


class ConversationWriter:
    """Writes conversations; no two begin with the same words."""

    def __init__(self, grammar: Grammar, writer: Writer, seed: int) -> None:
        self.grammar = grammar
        self.writer = writer
        self.seed = seed
        self.unused = 0
        self.uses: Counter[str] = Counter()  # of each kind of follow-up
        self.calls: Counter[str] = Counter()  # of each tool, in conversations with follow-ups
        self._requests: dict[int, Iterator[Request]] = {}
        self._asked: set[str] = set()

    def write_single(self, template: Template, wanted: int) -> Iterator[Conversation]:
        """Yield conversations of one request."""
        rng = self._rng(f"{template.group}/{template.domains}")
        for request in self._take(template, wanted):
            conversation = Conversation(person=request.person)
            conversation.add_calls(request.text, [request.call], rng, is_last=True)
            yield conversation

    def write_pair(self, pair: tuple[Template, Template], wanted: int) -> Iterator[Conversation]:
        """Yield conversations of two requests in one sentence."""
        rng = self._rng("+".join(template.group for template in pair))
        for first, second in zip(*(self._take(template, wanted) for template in pair), strict=False):
            conversation = Conversation(person=first.person or second.person)
            if first.person and second.person:  # a row is about one person
                continue
            conversation.add_calls(f"{first.text} and {second.text}", [first.call, second.call], rng, True)
            yield conversation

    def write_family(self, family: Family, wanted: int) -> Iterator[Conversation]:
        """Yield conversations of a family: a request and one to three follow-ups."""
        rng = self._rng(family.name)
        left = list(family.requests)
        written = 0
        while left and written < wanted:
            # Of the tool that is called least, so that all are learned; of its templates each in turn.
            template = min(left, key=lambda one: self.calls[RULES[one.intent].tool])
            left.remove(template)
            request = next(self._take(template, 1), None)
            if request is None:
                continue
            left.append(template)
            conversation = self._write_follow_ups(family, request, rng)
            if conversation is not None:
                written += 1
                self.calls.update(call.name for call in conversation.calls)
                yield conversation

    def write_uncovered(self, one: FollowUp, wanted: int) -> Iterator[Conversation]:
        """Yield conversations of one request that no tool covers."""
        rng = self._rng(one.text)
        for _ in range(MAX_TRIES):
            if wanted == 0:
                return
            text, _slots = fill_follow_up(one, None, self.grammar.intents, rng)
            if text not in self._asked:
                self._asked.add(text)
                wanted -= 1
                conversation = Conversation()
                conversation.add_words(text, NO_TOOL)
                yield conversation

    def _write_follow_ups(self, family: Family, request: Request, rng: random.Random) -> Conversation | None:
        """Return a conversation that goes on, or None if nothing of the family can follow the request."""
        steps: list[tuple[FollowUp, str, ToolCall | None]] = []
        call = request.call
        for _ in range(rng.randrange(1, MAX_FOLLOW_UPS + 1)):
            used = {step[0].text for step in steps}
            step = self._choose_step([f for f in family.follow_ups if f.text not in used], call, rng)
            if step is None:
                break
            steps.append(step)
            call = step[2] or call
            if step[0].kind == THANKS:
                break
        if not steps:
            return None
        conversation = Conversation(person=request.person)
        conversation.add_calls(request.text, [request.call], rng, is_last=False)
        for number, (one, text, made) in enumerate(steps, start=1):
            conversation.kinds.append(one.kind)
            self.uses[one.kind] += 1
            if made is None:
                conversation.add_words(text, one.kind)
            else:
                conversation.add_calls(text, [made], rng, is_last=number == len(steps))
        return conversation

    def _choose_step(
        self, follow_ups: Sequence[FollowUp], call: ToolCall, rng: random.Random
    ) -> tuple[FollowUp, str, ToolCall | None] | None:
        """Return the least used follow-up that fits a call, its words and its call."""
        order = rng.sample(follow_ups, len(follow_ups))
        for one in sorted(order, key=lambda one: self.uses[one.kind]):
            if not can_follow(one.kind, call):
                continue
            text, slots = fill_follow_up(one, call, self.grammar.intents, rng)
            if one.kind in (THANKS, NO_TOOL):
                return one, text, None
            made = follow(one.kind, call, slots)
            if made is not None:
                return one, text, made
        return None

    def _take(self, template: Template, wanted: int) -> Iterator[Request]:
        """Yield further requests of a template that are calls of the tools."""
        key = id(template)
        if key not in self._requests:
            self._requests[key] = self._write_requests(template)
        for _ in range(wanted):
            request = next(self._requests[key], None)
            if request is None:
                return
            yield request

    def _write_requests(self, template: Template) -> Iterator[Request]:
        unused = 0
        # The writer ends by itself where a template has no further sentence.
        for text, answer, person in self.writer.write(template, wanted=-1):
            call = read_intent(template, answer)
            if call is not None:
                unused = 0
                yield Request(text, call, person)
                continue
            self.unused += 1
            unused += 1
            if unused == MAX_UNUSED:
                return

    def _rng(self, name: str) -> random.Random:
        return random.Random(f"{self.seed}/conversation/{name}")


def make_tags(conversation: Conversation, shape: str, language: str) -> Mapping[str, str]:
    """Return what a conversation can be selected by."""
    tags = {"shape": shape, "user_turns": str(conversation.turns), "language": language}
    if conversation.calls:
        tags["tool"] = conversation.calls[0].name
    if conversation.kinds:
        tags["follow_ups"] = " ".join(conversation.kinds)
    if person := conversation.person:
        tags |= {"person": person.name, "person_gender": person.gender, "person_origin": person.origin}
    return tags
