"""Many rows whose texts may not fit into memory.

A few million characters are fastest in a list. 100,000 passages of 16,000 characters are not: a stage that
kept them, and a form of each to compare, would take more memory than many machines have. A spool is a list
until its items are large, and from then on a temporary file that is read item by item.
"""

from __future__ import annotations

import os
import pickle
import tempfile
from abc import abstractmethod
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from operator import eq
from typing import Any, Generic, TypeVar, overload

T = TypeVar("T")
S = TypeVar("S")

MAX_HELD = (
    200_000_000  # characters or bytes of the items in memory; rows of a million short questions have less
)
READ_BYTES = 1 << 22


class _Lazy(Sequence[T], Generic[T]):
    """A sequence whose items are read when they are asked for; a slice reads none."""

    @overload
    def __getitem__(self, place: int) -> T: ...

    @overload
    def __getitem__(self, place: slice) -> Sequence[T]: ...

    def __getitem__(self, place: int | slice) -> T | Sequence[T]:
        if isinstance(place, slice):
            return pick(self, range(*place.indices(len(self))))
        number = place + len(self) if place < 0 else place
        if not 0 <= number < len(self):
            raise IndexError(place)
        return self._read(number)

    @abstractmethod
    def _read(self, place: int) -> T:
        """Return the item at a place from 0 on."""


class Spool(_Lazy[T]):
    """A sequence that only grows; its items are in memory while they are small, else in a temporary file.

    The file is next to the working folder's other files, not in `/tmp`, which may itself be memory. It has no
    name: it is gone when the spool is, also where the process is killed. An item read from the file is a new
    object each time.

    Args:
        measure: the size of an item, in characters or bytes.
    """

    def __init__(self, measure: Callable[[T], int], max_held: int | None = None) -> None:
        self._measure = measure
        self._left = MAX_HELD if max_held is None else max_held
        self._held: list[T] = []
        self._ends = array("q", [0])
        self._file: Any = None
        self._is_flushed = True

    @property
    def is_stored(self) -> bool:
        """Whether the items are in a file."""
        return self._file is not None

    def append(self, item: T) -> None:
        """Add an item behind all others."""
        if self._file is not None:
            self._write(item)
            return
        self._held.append(item)
        self._left -= self._measure(item)
        if self._left < 0:
            self._file = tempfile.TemporaryFile(dir=".", prefix=".perennial-spool-")  # noqa: SIM115
            for held in self._held:
                self._write(held)
            self._held = []

    def _write(self, item: T) -> None:
        data = pickle.dumps(item, protocol=pickle.HIGHEST_PROTOCOL)
        self._file.write(data)
        self._ends.append(self._ends[-1] + len(data))
        self._is_flushed = False

    def __len__(self) -> int:
        return len(self._held) if self._file is None else len(self._ends) - 1

    def _read(self, place: int) -> T:
        if self._file is None:
            return self._held[place]
        start, end = self._ends[place], self._ends[place + 1]
        return self._load(os.pread(self._flush().fileno(), end - start, start))

    def __iter__(self) -> Iterator[T]:
        if self._file is None:
            yield from self._held
            return
        first = 0
        while first < len(self):
            # Many small items in one read; at least one, however large.
            start, last = self._ends[first], first + 1
            while last < len(self) and self._ends[last + 1] - start <= READ_BYTES:
                last += 1
            data = memoryview(os.pread(self._flush().fileno(), self._ends[last] - start, start))
            for number in range(first, last):
                yield self._load(data[self._ends[number] - start : self._ends[number + 1] - start])
            first = last

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and all(map(eq, self, other))

    __hash__ = None  # type: ignore[assignment]

    def _load(self, data: bytes | memoryview) -> T:
        item: T = pickle.loads(data)  # our own file, which has no name by which another could write it
        return item

    def _flush(self) -> Any:
        if not self._is_flushed:
            self._file.flush()
            self._is_flushed = True
        return self._file


def spool(items: Iterable[T], measure: Callable[[T], int]) -> Sequence[T]:
    """Return the items of one pass as a sequence: a list if they are small."""
    spooled = Spool(measure)
    for item in items:
        spooled.append(item)
    return spooled if spooled.is_stored else list(spooled)


class _Picked(_Lazy[T]):
    """Some items of a sequence by their numbers, in an order of their own."""

    def __init__(self, items: Sequence[T], numbers: Sequence[int]) -> None:
        self._items, self._numbers = items, numbers

    def __len__(self) -> int:
        return len(self._numbers)

    def _read(self, place: int) -> T:
        return self._items[self._numbers[place]]

    def __iter__(self) -> Iterator[T]:
        return (self._items[number] for number in self._numbers)


class _Viewed(_Lazy[T], Generic[S, T]):
    """Something of each item of a sequence, computed when it is asked for."""

    def __init__(self, items: Sequence[S], read: Callable[[S], T]) -> None:
        self._items, self._read_item = items, read

    def __len__(self) -> int:
        return len(self._items)

    def _read(self, place: int) -> T:
        return self._read_item(self._items[place])

    def __iter__(self) -> Iterator[T]:
        return map(self._read_item, self._items)


class _Joined(_Lazy[T]):
    """The items of two sequences, one behind the other."""

    def __init__(self, first: Sequence[T], second: Sequence[T]) -> None:
        self._first, self._second = first, second

    def __len__(self) -> int:
        return len(self._first) + len(self._second)

    def _read(self, place: int) -> T:
        if place < len(self._first):
            return self._first[place]
        return self._second[place - len(self._first)]

    def __iter__(self) -> Iterator[T]:
        yield from self._first
        yield from self._second


def view(items: Sequence[S], read: Callable[[S], T]) -> Sequence[T]:
    """Return something of each item: a list of a list, else computed whenever an item is asked for."""
    return list(map(read, items)) if isinstance(items, list) else _Viewed(items, read)


def join(first: Sequence[T], second: Sequence[T]) -> Sequence[T]:
    """Return the items of both, without reading them."""
    return _Joined(first, second)


def exclude(items: Sequence[T], numbers: Set[int]) -> Sequence[T]:
    """Return the items without those of some numbers."""
    return pick(items, [number for number in range(len(items)) if number not in numbers])


def pick(items: Sequence[T], numbers: Sequence[int]) -> Sequence[T]:
    """Return some items of a sequence by their numbers: a list of a list, else without reading them."""
    if isinstance(items, list):
        return [items[number] for number in numbers]
    if isinstance(items, tuple):
        return tuple(items[number] for number in numbers)
    if isinstance(items, _Picked):
        return _Picked(items._items, [items._numbers[number] for number in numbers])
    return _Picked(items, numbers)
