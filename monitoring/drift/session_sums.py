"""Sum traffic by session: all that the drift tests need, in memory independent of the number of rows.

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
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from monitoring.drift.bins import (
    MAX_NAMES,
    Binning,
    Bools,
    ColumnBinning,
    Floats,
    Keys,
    Places,
    RowSample,
    Singles,
    compute_fourier_features,
    compute_novelty,
    encode_sessions,
    gives_anchors,
    read_numbers,
    read_vectors,
)
from monitoring.traffic.sessions import hash_text

if TYPE_CHECKING:
    import pyarrow as pa


@dataclass(frozen=True, slots=True)
class SessionSums:
    """Sums of some traffic under a binning of C columns and J sums, by session for K sessions.

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


def sum_sessions(tables: Iterable[pa.Table], binning: Binning) -> SessionSums:
    """Return the sums of some traffic, in one pass over its tables."""
    adder = _Accumulator(binning)
    for table in tables:
        if table.num_rows:
            adder.add(table)
    return adder.result()


def _half(keys: Keys) -> Bools:
    first: Bools = (keys & np.uint64(1)) == 1
    return first


@dataclass(slots=True)
class _Sessions:
    """The kept sessions (those with the smallest hashes) and the line of the sums each one has."""

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


class _Accumulator:
    """Accumulate the sums table by table."""

    def __init__(self, binning: Binning) -> None:
        self._binning = binning
        self._starts = binning.starts
        self._sessions = _Sessions(binning.max_sessions)
        lines = 256
        self._sums = np.zeros((lines, self._starts[-1]), dtype=np.float32)
        self._counts = np.zeros((lines, len(binning.columns)), dtype=np.float32)
        self._rows = np.zeros(lines)
        self._began = np.full(lines, np.inf)
        self._totals = np.zeros(self._starts[-1])
        self._values = np.zeros(len(binning.columns))
        self._start, self._end, self._all_rows = np.inf, -np.inf, 0
        self._samples = {
            each.column.name: RowSample(binning.seed)
            for each in binning.columns
            if each.column.kind == "vector"
        }
        self._others: dict[str, Counter[str]] = {
            each.column.name: Counter() for each in binning.columns if each.column.kind == "category"
        }

    def add(self, table: pa.Table) -> None:
        times = table.column("received_at").to_numpy()
        self._start, self._end = min(self._start, times.min()), max(self._end, times.max())
        self._all_rows += table.num_rows
        names, codes = encode_sessions(table)
        keys = np.array([hash_text(name) for name in names], dtype=np.uint64)
        lines = self._lines(keys)[codes]
        halves, aside = _half(keys)[codes], gives_anchors(keys)[codes]
        kept = lines >= 0
        np.add.at(self._rows, lines[kept], 1.0)
        np.minimum.at(self._began, lines[kept], times[kept])
        for place, each in enumerate(self._binning.columns):
            start, stop = self._starts[place], self._starts[place + 1]
            if each.column.kind == "vector":
                vectors, there = read_vectors(table, each.column.name)
                self._samples[each.column.name].add(vectors, halves[there])
                summed = compute_fourier_features(vectors, each.waves)
                self._totals[start:stop] += summed.sum(axis=0, dtype=np.float64)
                inside = lines[there] >= 0
                _add_rows(self._sums[:, start:stop], lines[there][inside], summed[inside])
            elif each.column.kind == "flag":
                flags = read_numbers(table, each.column.name)
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

    def _bins(self, table: pa.Table, each: ColumnBinning, aside: Bools) -> tuple[Places, Bools]:
        if each.column.kind == "number":
            if each.source:
                numbers = np.full(table.num_rows, np.nan)
                vectors, known_vector = read_vectors(table, each.source)
                if len(each.anchors):
                    numbers[known_vector] = compute_novelty(vectors, each.anchors)
                numbers[aside] = np.nan
            else:
                numbers = read_numbers(table, each.column.name)
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
        more = min(len(self._rows), self._binning.max_sessions - len(self._rows))
        self._sums = np.vstack([self._sums, np.zeros((more, self._sums.shape[1]), dtype=np.float32)])
        self._counts = np.vstack([self._counts, np.zeros((more, self._counts.shape[1]), dtype=np.float32)])
        self._rows = np.concatenate([self._rows, np.zeros(more)])
        self._began = np.concatenate([self._began, np.full(more, np.inf)])

    def result(self) -> SessionSums:
        # Lines by time, and by hash where two sessions began together, so that equal traffic is equal sums.
        keys = np.empty(len(self._sessions.lines), dtype=np.uint64)
        for key, line in self._sessions.lines.items():
            keys[line] = key
        order = np.lexsort([keys, self._began[: len(keys)]])
        return SessionSums(
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
