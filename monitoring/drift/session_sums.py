"""Traffic as sums by session: all that the drift tests need, in memory that does not grow with the rows.

Rows of one session resemble each other, so sessions and not rows are what a test may shuffle. In: feature
tables (`monitoring.traffic.columns`). Out: for each session the counts of each column's bins, classes and
flags and the sums of its vectors' features, plus the same sums over all rows. Beyond `max_sessions` a uniform
sample of sessions is kept, those with the smallest hashes of their names (the sketch "k minimum values":
Bar-Yossef et al. 2002, RANDOM): a reference and a window of any length then stay exchangeable session by
session, which sums of many sessions in one block would not be.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from monitoring.traffic.columns import VECTOR_SIZE, Column
from stages.common.errors import InputError

if TYPE_CHECKING:
    import pyarrow as pa

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Singles = NDArray[np.float32]
Places = NDArray[np.int64]
Keys = NDArray[np.uint64]

OTHER = "(other)"

# Of the reference. The outer ones are there because a tail moves before a median does.
QUANTILES = np.unique(np.concatenate([[0.01, 0.99], np.arange(1, 32) / 32]))
# A class that fewer sessions of the reference know shares one bin with the classes that none knows. Were it
# a bin of its own, "never seen before" would be 0 in the reference by construction and above 0 in every
# window, since traffic always holds some rare things: an alarm about nothing. So rare ones of the reference
# stand for the unseen ones of the window, as in Good's estimate of unseen species (1953, Biometrika 40).
MIN_CLASS_SESSIONS = 5
MAX_NAMES = 1000  # classes that are counted by name outside the bins, to say what "(other)" was
MAX_PLAN_VALUES = 40_000  # of a number column, to find its quantiles
SAMPLE_ROWS = 1000  # vectors kept, to say how far apart they lie
ANCHORS = 400  # rows of the reference that novelty is measured from
RANDOM_FEATURES = 64  # pairs of cosine and sine


@dataclass(frozen=True, slots=True)
class ColumnPlan:
    """How a column is summed.

    Attributes:
        edges: of a number: bin i holds the values above i edges.
        categories: of a category: those with a bin of their own; one more bin for all others.
        waves: of a vector, [VECTOR_SIZE, RANDOM_FEATURES]: frequencies of its random Fourier features.
        source, anchors: of a novelty, the vector column it is made from, and [rows, VECTOR_SIZE] of the
            reference: a row is as novel as it is far from the nearest of them.
    """

    column: Column
    edges: Floats = field(default_factory=lambda: np.empty(0))
    categories: tuple[str, ...] = ()
    waves: Singles = field(default_factory=lambda: np.empty((0, 0), dtype=np.float32))
    source: str = ""
    anchors: Singles = field(default_factory=lambda: np.empty((0, VECTOR_SIZE), dtype=np.float32))

    @property
    def size(self) -> int:
        """Return how many sums the column takes."""
        if self.column.kind == "number":
            return len(self.edges) + 1
        if self.column.kind == "category":
            return len(self.categories) + 1
        return 1 if self.column.kind == "flag" else VECTOR_SIZE + 2 * RANDOM_FEATURES


@dataclass(frozen=True, slots=True)
class Plan:
    """How traffic is summed; the same for the reference and every window that is compared with it."""

    columns: tuple[ColumnPlan, ...]
    max_sessions: int
    seed: int

    @property
    def starts(self) -> list[int]:
        """Return where each column's sums start; one more entry for the end of the last."""
        return [0, *np.cumsum([column.size for column in self.columns]).tolist()]


@dataclass(frozen=True, slots=True)
class Sketch:
    """Sums of some traffic under a plan with J sums, C columns; K sessions are kept one by one.

    Attributes:
        rows, sessions: of all the traffic; sessions are estimated where they are more than are kept.
        start, end: first and last `received_at`, unix s.
        totals, values: [J] sums and [C] values that are there, over all rows.
        sums, counts: [K, J] and [K, C] the same by session kept, sessions in order of their first row.
        session_rows: [K] rows.
        halves: [K] to which of two halves a session belongs: one finds a direction, the other measures.
        samples: of each vector column some rows, [at most SAMPLE_ROWS, VECTOR_SIZE], and their halves.
        others: of each category column the classes without a bin, and how often they came.
    """

    rows: int
    sessions: int
    start: float
    end: float
    totals: Floats
    values: Floats
    sums: Singles
    counts: Singles
    session_rows: Floats
    halves: Bools
    samples: dict[str, tuple[Singles, Bools]]
    others: dict[str, dict[str, int]]


def plan(
    tables: Iterable[pa.Table],
    columns: Sequence[Column],
    max_categories: int,
    max_sessions: int,
    seed: int,
) -> Plan:
    """Return how to sum traffic, from a first look at the reference.

    Raises:
        InputError: the reference has no rows.
    """
    seen = {column.name: _Seen(column, seed) for column in columns}
    rows = 0
    for table in tables:
        rows += table.num_rows
        if table.num_rows:
            names, codes = _coded_sessions(table)
            keys = np.array([_key(name) for name in names], dtype=np.uint64)
            for each in seen.values():
                each.add(table, np.array(names, dtype=object)[codes], _aside(keys)[codes])
    if not rows:
        raise InputError("the reference has no rows", "watch again when the champion has answered more")
    planned = [each for column in columns for each in seen[column.name].planned(max_categories, seed)]
    return Plan(tuple(planned), max_sessions, seed)


def sketch(tables: Iterable[pa.Table], plan: Plan) -> Sketch:
    """Return the sums of some traffic; tables are looked at once, one after the other."""
    adder = _Adder(plan)
    for table in tables:
        if table.num_rows:
            adder.add(table)
    return adder.result()


def features(vectors: Singles, waves: Singles) -> Singles:
    """Return the features of vectors whose means are compared: [rows, VECTOR_SIZE + 2 * RANDOM_FEATURES].

    Their inner product is the kernel (x·y + exp(-|x-y|²/2s²)) / 2: the first part sees a shift of the mean
    with little noise, the second every other change (random Fourier features: Rahimi & Recht 2007, NeurIPS).
    """
    angles = vectors @ waves
    scale = np.float32(np.sqrt(0.5 / RANDOM_FEATURES))
    return np.hstack([vectors * np.float32(np.sqrt(0.5)), np.cos(angles) * scale, np.sin(angles) * scale])


def _waves(sample: Singles, seed: int) -> Singles:
    # The bandwidth is the median distance, as usual for kernel tests (Gretton et al. 2012, JMLR 13).
    few = sample[:300].astype(np.float64)
    squares = (few**2).sum(axis=1)
    distances = np.sqrt(np.maximum(squares[:, None] + squares[None, :] - 2 * few @ few.T, 0.0))
    apart = distances[np.triu_indices(len(few), 1)]
    apart = apart[apart > 0]
    bandwidth = float(np.median(apart)) if len(apart) else 1.0
    drawn = np.random.default_rng([seed, 64]).standard_normal((VECTOR_SIZE, RANDOM_FEATURES))
    return (drawn / bandwidth).astype(np.float32)


def _numbers(table: pa.Table, name: str) -> Floats:
    """Return a number or flag column with NaN for null; what is not finite counts as not known."""
    values = table.column(name).to_numpy(zero_copy_only=False).astype(np.float64)
    return np.where(np.isfinite(values), values, np.nan)


def _vectors(table: pa.Table, name: str) -> tuple[Singles, Bools]:
    """Return the vectors that are there, [values, VECTOR_SIZE], and which rows have one."""
    chunk = table.column(name).combine_chunks()
    there = np.asarray(chunk.is_valid())
    # `flatten` leaves out what lies under nulls.
    flat = chunk.flatten().to_numpy(zero_copy_only=False).astype(np.float32)
    return flat.reshape(-1, VECTOR_SIZE), there


def _key(session: str) -> int:
    return int.from_bytes(blake2b(session.encode("utf-8", "replace"), digest_size=8).digest(), "big")


def _half(keys: Keys) -> Bools:
    first: Bools = (keys & np.uint64(1)) == 1
    return first


def _aside(keys: Keys) -> Bools:
    """Return which sessions give the anchors of novelty, a quarter; they have no novelty themselves.

    Nor have those of the window: a session is near to itself, and a user of the reference comes back.
    """
    quarter: Bools = ((keys >> np.uint64(1)) & np.uint64(3)) == 0
    return quarter


def _coded_sessions(table: pa.Table) -> tuple[list[str], Places]:
    coded = table.column("session").combine_chunks().dictionary_encode()
    return coded.dictionary.to_pylist(), coded.indices.to_numpy(zero_copy_only=False).astype(np.int64)


def _novelty(vectors: Singles, anchors: Singles) -> Floats:
    """Return 1 - the cosine to the nearest anchor, for vectors of length 1."""
    nearest: Floats = 1.0 - (vectors @ anchors.T).max(axis=1).astype(np.float64)
    return nearest


class _Seen:
    """What a first look at a column of the reference gathers."""

    def __init__(self, column: Column, seed: int) -> None:
        self._column = column
        self._values, self._classes = _Thinned(), _Classes()
        self._usual, self._anchors = _RowSample(seed), _RowSample(seed + 1)

    def add(self, table: pa.Table, sessions: NDArray[Any], aside: Bools) -> None:
        name, kind = self._column.name, self._column.kind
        if kind == "number":
            values = _numbers(table, name)
            self._values.add(values[~np.isnan(values)])
        elif kind == "category":
            self._classes.add(table.column(name).to_numpy(zero_copy_only=False), sessions)
        elif kind == "vector":
            vectors, there = _vectors(table, name)
            self._anchors.add(vectors[aside[there]])
            self._usual.add(vectors[~aside[there]])

    def planned(self, max_categories: int, seed: int) -> Iterator[ColumnPlan]:
        column = self._column
        if column.kind == "number":
            yield ColumnPlan(column, edges=_edges(self._values.values()))
        elif column.kind == "category":
            yield ColumnPlan(column, categories=self._classes.common(max_categories))
        elif column.kind == "flag":
            yield ColumnPlan(column)
        else:
            usual, anchors = self._usual.rows(), self._anchors.rows()[:ANCHORS]
            yield ColumnPlan(column, waves=_waves(usual, seed))
            novelty = Column(
                column.name.removesuffix("_vector") + "_novelty",
                column.question,
                "number",
                None,
                "",
                f"how far from anything usual: {column.meaning}",
            )
            values = _novelty(usual, anchors) if len(usual) and len(anchors) else np.empty(0)
            yield ColumnPlan(novelty, edges=_edges(values), source=column.name, anchors=anchors)


def _edges(values: Floats) -> Floats:
    if not len(values):
        return np.empty(0)
    edges = np.unique(np.quantile(values, QUANTILES, method="inverted_cdf"))
    # Most conversations have one turn: that edge has nothing below it. One more shows what falls.
    return np.concatenate([[np.nextafter(edges[0], -np.inf)], edges])


class _Thinned:
    """Values of a stream, evenly thinned: at most MAX_PLAN_VALUES."""

    def __init__(self) -> None:
        self._kept: list[Floats] = []
        self._count, self._stride, self._skip = 0, 1, 0

    def add(self, values: Floats) -> None:
        taken = values[self._skip :: self._stride]
        self._skip = (self._skip - len(values)) % self._stride
        self._kept.append(taken)
        self._count += len(taken)
        if self._count > MAX_PLAN_VALUES:
            self._kept = [np.concatenate(self._kept)[::2]]
            self._count, self._stride = len(self._kept[0]), self._stride * 2

    def values(self) -> Floats:
        return np.concatenate(self._kept) if self._kept else np.empty(0)


class _Classes:
    """The classes of a column, how often each came, and from how many sessions (up to the few needed)."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._sessions: dict[str, set[str]] = {}

    def add(self, values: NDArray[Any], sessions: NDArray[Any]) -> None:
        self._counts.update(value for value in values if value is not None)
        for value, session in set(zip(values, sessions, strict=True)):
            if value is not None:
                known = self._sessions.setdefault(value, set())
                if len(known) < MIN_CLASS_SESSIONS:
                    known.add(session)
        if len(self._counts) > 20 * MAX_NAMES:  # names without end: those that come again come back in
            kept = dict(self._counts.most_common(10 * MAX_NAMES))
            self._counts = Counter(kept)
            self._sessions = {value: self._sessions[value] for value in kept}

    def common(self, limit: int) -> tuple[str, ...]:
        often = sorted(
            (-count, value)
            for value, count in self._counts.items()
            if value != OTHER and len(self._sessions[value]) >= MIN_CLASS_SESSIONS
        )
        return tuple(value for _, value in often[:limit])


class _RowSample:
    """A uniform sample of rows: those with the smallest of random numbers that are drawn for all."""

    def __init__(self, seed: int) -> None:
        self._random = np.random.default_rng([seed, SAMPLE_ROWS])
        self._keys = np.empty(0)
        self._rows = np.empty((0, VECTOR_SIZE), dtype=np.float32)
        self._halves = np.empty(0, dtype=np.bool_)

    def add(self, rows: Singles, halves: Bools | None = None) -> None:
        keys = self._random.random(len(rows))
        halves = np.zeros(len(rows), dtype=np.bool_) if halves is None else halves
        if len(self._keys) == SAMPLE_ROWS:
            better = keys < self._keys.max()
            keys, rows, halves = keys[better], rows[better], halves[better]
        self._keys = np.concatenate([self._keys, keys])
        self._rows = np.concatenate([self._rows, rows])
        self._halves = np.concatenate([self._halves, halves])
        if len(self._keys) > SAMPLE_ROWS:
            smallest = np.argpartition(self._keys, SAMPLE_ROWS)[:SAMPLE_ROWS]
            self._keys, self._rows = self._keys[smallest], self._rows[smallest]
            self._halves = self._halves[smallest]

    def rows(self) -> Singles:
        return self._rows

    def halves(self) -> Bools:
        return self._halves


@dataclass(slots=True)
class _Sessions:
    """Which sessions are kept, and in which line of the sums: those with the smallest hashes."""

    most: int
    lines: dict[int, int] = field(default_factory=dict)
    # Largest hash first, so that it is the one to give way.
    heap: list[int] = field(default_factory=list)
    full: bool = False

    def line(self, key: int) -> tuple[int, bool]:
        """Return the line of a session, -1 if it is not kept, and whether the line must be emptied first."""
        line = self.lines.get(key)
        if line is not None:
            return line, False
        if len(self.lines) < self.most:
            line = self.lines[key] = len(self.lines)
            heapq.heappush(self.heap, -key)
            return line, False
        self.full = True
        if key > -self.heap[0]:
            return -1, False
        largest = -heapq.heappushpop(self.heap, -key)
        line = self.lines[key] = self.lines.pop(largest)
        return line, True

    def estimate(self) -> int:
        """Return how many sessions there were: exact, or (k - 1) / k-th smallest hash as a share."""
        return round((self.most - 1) / (-self.heap[0] / 2**64)) if self.full else len(self.lines)


class _Adder:
    """The sums while tables come in."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._starts = plan.starts
        self._sessions = _Sessions(plan.max_sessions)
        lines = 256
        self._sums = np.zeros((lines, self._starts[-1]), dtype=np.float32)
        self._counts = np.zeros((lines, len(plan.columns)), dtype=np.float32)
        self._rows = np.zeros(lines)
        self._began = np.full(lines, np.inf)
        self._totals = np.zeros(self._starts[-1])
        self._values = np.zeros(len(plan.columns))
        self._start, self._end, self._all_rows = np.inf, -np.inf, 0
        self._samples = {
            each.column.name: _RowSample(plan.seed) for each in plan.columns if each.column.kind == "vector"
        }
        self._others: dict[str, Counter[str]] = {
            each.column.name: Counter() for each in plan.columns if each.column.kind == "category"
        }

    def add(self, table: pa.Table) -> None:
        times = table.column("received_at").to_numpy()
        self._start, self._end = min(self._start, times.min()), max(self._end, times.max())
        self._all_rows += table.num_rows
        names, codes = _coded_sessions(table)
        keys = np.array([_key(name) for name in names], dtype=np.uint64)
        lines = self._lines(keys)[codes]
        halves, aside = _half(keys)[codes], _aside(keys)[codes]
        kept = lines >= 0
        np.add.at(self._rows, lines[kept], 1.0)
        np.minimum.at(self._began, lines[kept], times[kept])
        for place, each in enumerate(self._plan.columns):
            start, stop = self._starts[place], self._starts[place + 1]
            if each.column.kind == "vector":
                vectors, there = _vectors(table, each.column.name)
                self._samples[each.column.name].add(vectors, halves[there])
                summed = features(vectors, each.waves)
                self._totals[start:stop] += summed.sum(axis=0, dtype=np.float64)
                inside = lines[there] >= 0
                _add_rows(self._sums[:, start:stop], lines[there][inside], summed[inside])
            elif each.column.kind == "flag":
                flags = _numbers(table, each.column.name)
                there = ~np.isnan(flags)
                self._totals[start] += flags[there].sum()
                inside = there & kept
                np.add.at(self._sums[:, start], lines[inside], flags[inside].astype(np.float32))
            else:
                bins, there = self._bins(table, each, aside)
                self._totals[start:stop] += np.bincount(bins[there], minlength=each.size)
                inside = there & kept
                np.add.at(self._sums, (lines[inside], start + bins[inside]), np.float32(1.0))
            self._values[place] += np.count_nonzero(there)
            np.add.at(self._counts[:, place], lines[there & kept], np.float32(1.0))

    def _bins(self, table: pa.Table, each: ColumnPlan, aside: Bools) -> tuple[Places, Bools]:
        if each.column.kind == "number":
            if each.source:
                numbers = np.full(table.num_rows, np.nan)
                vectors, known_vector = _vectors(table, each.source)
                if len(each.anchors):
                    numbers[known_vector] = _novelty(vectors, each.anchors)
                numbers[aside] = np.nan
            else:
                numbers = _numbers(table, each.column.name)
            there = ~np.isnan(numbers)
            return np.searchsorted(each.edges, np.where(there, numbers, 0.0), side="left"), there
        coded = table.column(each.column.name).combine_chunks().dictionary_encode()
        names = coded.dictionary.to_pylist()
        there = np.asarray(coded.is_valid())
        codes = coded.indices.fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)
        known = {name: place for place, name in enumerate(each.categories)}
        places = np.array([known.get(name, len(known)) for name in names] or [0], dtype=np.int64)
        times = np.bincount(codes[there], minlength=len(names))
        others = self._others[each.column.name]
        for name, count in zip(names, times, strict=True):
            if name not in known and count:
                others[name] += int(count)
        if len(others) > 2 * MAX_NAMES:
            self._others[each.column.name] = Counter(dict(others.most_common(MAX_NAMES)))
        return places[codes], there

    def _lines(self, keys: Keys) -> Places:
        """Return the line of each session of a table, -1 where it is not kept."""
        lines = np.empty(len(keys), dtype=np.int64)
        for place, key in enumerate(keys.tolist()):
            line, emptied = self._sessions.line(key)
            lines[place] = line
            if line >= len(self._rows):
                self._grow()
            if emptied:
                # An earlier session of this table may have had the line: it is not kept either.
                lines[:place][lines[:place] == line] = -1
                self._sums[line], self._counts[line] = 0.0, 0.0
                self._rows[line], self._began[line] = 0.0, np.inf
        return lines

    def _grow(self) -> None:
        more = min(len(self._rows), self._plan.max_sessions - len(self._rows))
        self._sums = np.vstack([self._sums, np.zeros((more, self._sums.shape[1]), dtype=np.float32)])
        self._counts = np.vstack([self._counts, np.zeros((more, self._counts.shape[1]), dtype=np.float32)])
        self._rows = np.concatenate([self._rows, np.zeros(more)])
        self._began = np.concatenate([self._began, np.full(more, np.inf)])

    def result(self) -> Sketch:
        # Lines by time, and by hash where two sessions began together, so that equal traffic is equal sums.
        keys = np.empty(len(self._sessions.lines), dtype=np.uint64)
        for key, line in self._sessions.lines.items():
            keys[line] = key
        order = np.lexsort([keys, self._began[: len(keys)]])
        return Sketch(
            rows=self._all_rows,
            sessions=self._sessions.estimate(),
            start=float(self._start) if self._all_rows else 0.0,
            end=float(self._end) if self._all_rows else 0.0,
            totals=self._totals,
            values=self._values,
            sums=self._sums[order],
            counts=self._counts[order],
            session_rows=self._rows[order],
            halves=_half(keys[order]),
            samples={name: (sample.rows(), sample.halves()) for name, sample in self._samples.items()},
            others={name: dict(counter.most_common(MAX_NAMES)) for name, counter in self._others.items()},
        )


def _add_rows(sums: Singles, lines: Places, rows: Singles) -> None:
    """Add rows to the lines of `sums`; sorted first, because `np.add.at` is slow for whole rows."""
    if not len(lines):
        return
    order = np.argsort(lines, kind="stable")
    ordered = lines[order]
    firsts = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))
    sums[ordered[firsts]] += np.add.reduceat(rows[order], firsts, axis=0)
