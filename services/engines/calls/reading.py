"""Read an answer while it is written: thoughts, text, and calls of tools."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from services.engines.detokenizer import StopFinder
from stages.common.chat.calls import CallFormat


@dataclass(frozen=True, slots=True)
class CallPiece:
    """A piece of a call: the first has its id and name, and all together have its arguments.

    Attributes:
        place: of the call in the answer, from 0.
    """

    place: int
    arguments: str = ""
    id: str | None = None
    name: str | None = None


@dataclass(frozen=True, slots=True)
class Piece:
    """New parts of an answer."""

    text: str = ""
    reasoning: str = ""
    calls: tuple[CallPiece, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.text or self.reasoning or self.calls)


def join_pieces(pieces: Iterable[Piece]) -> Piece:
    """Return pieces as one, each call in one piece."""
    text, reasoning, calls = "", "", dict[int, CallPiece]()
    for piece in pieces:
        text += piece.text
        reasoning += piece.reasoning
        for new in piece.calls:
            old = calls.get(new.place)
            whole = (old.arguments if old else "") + new.arguments
            begun = old or new
            calls[new.place] = CallPiece(new.place, whole, begun.id, begun.name)
    return Piece(text, reasoning, tuple(calls.values()))


@dataclass(frozen=True, slots=True)
class Thoughts:
    """What is around the thoughts before an answer; `start` is empty where the prompt ends with it."""

    start: str
    end: str


class AnswerReader:
    """Splits the text of one answer as it arrives; nothing is returned that a later text could make other.

    Args:
        calls: how the model writes calls; None if it may not call tools.
        thoughts: what it writes around thoughts; None if it has none in this answer.
        stops: strings that end the text of an answer that may call tools; no thought or call has one.
    """

    __slots__ = ("_calls", "_format", "_has_thought", "_held", "_state", "_stops", "_thoughts", "answer")

    def __init__(
        self, calls: CallFormat | None, thoughts: Thoughts | None, stops: Sequence[str] = ()
    ) -> None:
        self._format, self._thoughts, self._stops = calls, thoughts, StopFinder(stops)
        self._calls: _CallReader | None = None
        self._held = ""
        self._state = "begin" if thoughts else "text"
        self._has_thought = False
        self.answer = ""  # all text behind the thoughts, as written

    @property
    def has_calls(self) -> bool:
        """Whether a call has begun."""
        return self._calls is not None and self._calls.count > 0

    @property
    def stopped(self) -> bool:
        """Whether a stop string has ended the answer."""
        return self._stops.stopped

    def push(self, text: str, is_last: bool = False) -> Piece:
        """Add text; return what is new and final.

        Args:
            is_last: whether the answer ends with it.
        """
        if self._format is None and self._thoughts is None:
            self.answer += text
            return Piece(text)
        if self.stopped:
            return Piece()
        self._held += text
        return join_pieces(self._read(is_last))

    def judge(self) -> str:
        """Return the answer so far as the text that is judged (`Message.answer`)."""
        return self._format.read(self.answer) if self._format else self.answer

    def _read(self, is_last: bool) -> Iterator[Piece]:
        if self._state == "begin":
            self._begin(is_last)
        if self._state == "thought":
            yield self._read_thought(is_last)
        if self._state == "skip":  # what the template writes between thoughts and answer
            self._held = self._held.lstrip()
            if self._held:
                self._state = "text"
        if self._state == "text":
            yield self._read_text(is_last)
        if self._state == "calls":
            assert self._calls is not None
            self.answer += self._held
            pieces, self._held = tuple(self._calls.push(self._held)), ""
            yield Piece(calls=pieces)

    def _begin(self, is_last: bool) -> None:
        assert self._thoughts is not None
        start, found = self._thoughts.start.strip(), self._held.lstrip()
        if found.startswith(start):
            self._held = found.removeprefix(start).lstrip()
            self._state = "thought"
        elif is_last or not start.startswith(found):
            self._state = "text"

    def _read_thought(self, is_last: bool) -> Piece:
        """Return the new thoughts, without blanks at both ends; a text without their end has no answer."""
        assert self._thoughts is not None
        if not self._has_thought:
            self._held = self._held.lstrip()
        thought, end, rest = self._held.partition(self._thoughts.end.strip())
        self._has_thought = self._has_thought or bool(thought)
        if end:
            self._held, self._state = rest, "skip"
            return Piece(reasoning=thought.rstrip())
        if is_last:
            self._held = ""
            return Piece(reasoning=thought)
        kept = _count_held(thought, self._thoughts.end.strip())
        self._held = thought[len(thought) - kept :]
        return Piece(reasoning=thought[: len(thought) - kept])

    def _read_text(self, is_last: bool) -> Piece:
        if self._format is None:
            return self._release(len(self._held))
        mark = self._format.opener.strip()
        if not mark:
            return self._read_unmarked(is_last)
        before, found, _ = self._held.partition(mark)
        if found:
            before = self._held[: len(before.rstrip())]
            piece = self._release(len(before), is_end=True)
            if not self.stopped:
                self._open(self._held.index(mark) + len(mark))
            return piece
        kept = 0 if is_last else _count_held(self._held, mark)
        return self._release(len(self._held) - kept, is_last)

    def _read_unmarked(self, is_last: bool) -> Piece:
        """Read text where a call is the whole answer, known by its beginning."""
        assert self._format is not None
        begin = f"{{{json.dumps(self._format.keys[0][0])}{self._format.colon}"
        found = self._held.lstrip()
        if not self.answer and found.startswith(begin):
            self._open(0)
            return Piece()
        if not self.answer and not is_last and begin.startswith(found):
            return Piece()
        return self._release(len(self._held), is_last)

    def _release(self, count: int, is_end: bool = False) -> Piece:
        """Return the beginning of the text; `is_end`: no text follows it."""
        text, self._held = self._stops.push(self._held[:count]), self._held[count:]
        if is_end and not self.stopped:
            text += self._stops.finish()
        self.answer += text
        return Piece(text)

    def _open(self, skipped: int) -> None:
        assert self._format is not None
        self.answer += self._held[:skipped]
        self._held = self._held[skipped:]
        self._calls, self._state = _CallReader(self._format), "calls"


class _CallReader:
    """Reads calls behind their opener; a grammar holds them, so that their form is known."""

    def __init__(self, found: CallFormat) -> None:
        self._format = found
        self._steps: list[tuple[str, str]] = []  # of the call that is being read, those to come first
        self._name = ""
        self._waiting = ""  # arguments that come before the name
        self._depth, self._in_text, self._is_escaped = 0, False, False
        self._place = -1
        self.count = 0

    def push(self, text: str) -> Iterator[CallPiece]:
        """Yield the pieces of calls in new text."""
        arguments = ""
        for char in text:
            if not self._steps:
                if char == "{":
                    self._begin()
                continue
            kind, rest = self._steps[0]
            if kind == "literal":
                self._steps[0] = (kind, rest[1:])
                if len(rest) <= 1:
                    self._steps.pop(0)
            elif kind == "arguments":
                arguments += char
                if self._ends(char):
                    self._steps.pop(0)
                    yield from self._give(arguments)
                    arguments = ""
            elif char != '"':
                self._name += char if kind == "name" else ""
            else:
                self._steps.pop(0)
                if kind == "name":
                    self.count += 1
                    yield CallPiece(self._place, self._waiting, f"call_{uuid.uuid4().hex}", self._name)
        if arguments:
            yield from self._give(arguments)

    def _begin(self) -> None:
        """Plan the steps of a call, whose first sign was read."""
        found, steps, literal = self._format, list[tuple[str, str]](), ""
        for number, (key, fixed) in enumerate(found.keys):
            literal += (found.comma if number else "") + json.dumps(key) + found.colon
            kinds = {found.name_key: "name", found.id_key: "id", found.arguments_key: "arguments"}
            kind = kinds.get(key)
            if kind is None:
                literal += json.dumps(fixed)
                continue
            quote = "" if kind == "arguments" else '"'
            steps += [("literal", literal + quote), (kind, "")]
            literal = ""
        self._steps = [*steps, ("literal", literal + "}")]
        self._place += 1
        self._name = self._waiting = ""
        self._depth, self._in_text, self._is_escaped = 0, False, False

    def _give(self, arguments: str) -> Iterator[CallPiece]:
        if self._place >= self.count:
            self._waiting += arguments
        elif arguments:
            yield CallPiece(self._place, arguments)

    def _ends(self, char: str) -> bool:
        """Return whether an object of arguments ends with a sign."""
        if self._in_text:
            ends_text = char == '"' and not self._is_escaped
            self._is_escaped = char == "\\" and not self._is_escaped
            self._in_text = not ends_text
        elif char == '"':
            self._in_text = True
        elif char in "{[":
            self._depth += 1
        elif char in "}]":
            self._depth -= 1
            return self._depth == 0
        return False


def _count_held(text: str, mark: str) -> int:
    """Return how much of a text's end is held back: what may begin a mark, and blanks before it."""
    kept = next(
        (size for size in range(min(len(text), len(mark) - 1), 0, -1) if mark.startswith(text[-size:])), 0
    )
    rest = text[: len(text) - kept]
    return kept + len(rest) - len(rest.rstrip())
