"""Choose the bins of each column from the reference; every window is summed with them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from monitoring.traffic.columns import VECTOR_SIZE, Column
from monitoring.traffic.sessions import hash_text

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
# represent the unseen ones of the window, as in Good's estimate of unseen species (1953, Biometrika 40).
MIN_CLASS_SESSIONS = 5
MAX_NAMES = 1000  # classes that are counted by name outside the bins, to report what "(other)" was
MAX_BINNING_VALUES = 40_000  # of a number column, to find its quantiles
SAMPLE_ROWS = 1000  # vectors kept, to measure how far apart they are
ANCHORS = 400  # rows of the reference that novelty is measured from
RANDOM_FEATURES = 64  # pairs of cosine and sine


@dataclass(frozen=True, slots=True)
class ColumnBinning:
    """The bins or features that one column is summed into.

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
        """Return the number of sums of the column."""
        if self.column.kind == "number":
            return len(self.edges) + 1
        if self.column.kind == "category":
            return len(self.categories) + 1
        return 1 if self.column.kind == "flag" else VECTOR_SIZE + 2 * RANDOM_FEATURES


@dataclass(frozen=True, slots=True)
class Binning:
    """The binning of all columns, shared by the reference and every window compared with it."""

    columns: tuple[ColumnBinning, ...]
    max_sessions: int
    seed: int

    @property
    def starts(self) -> list[int]:
        """Return where each column's sums start; one more entry for the end of the last."""
        return [0, *np.cumsum([column.size for column in self.columns]).tolist()]


def plan_bins(
    tables: Iterable[pa.Table],
    columns: Sequence[Column],
    max_categories: int,
    max_sessions: int,
    seed: int,
) -> Binning:
    """Return the binning, from a first pass over the reference.

    Raises:
        ValueError: the reference has no rows.
    """
    seen = {column.name: _Seen(column, seed) for column in columns}
    rows = 0
    for table in tables:
        rows += table.num_rows
        if table.num_rows:
            names, codes = encode_sessions(table)
            keys = np.array([hash_text(name) for name in names], dtype=np.uint64)
            for each in seen.values():
                each.add(table, np.array(names, dtype=object)[codes], gives_anchors(keys)[codes])
    if not rows:
        raise ValueError("the reference has no rows")
    planned = [each for column in columns for each in seen[column.name].planned(max_categories, seed)]
    return Binning(tuple(planned), max_sessions, seed)


def compute_fourier_features(vectors: Singles, waves: Singles) -> Singles:
    """Return random Fourier features of vectors: [rows, VECTOR_SIZE + 2 * RANDOM_FEATURES].

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


def read_numbers(table: pa.Table, name: str) -> Floats:
    """Return a number or flag column with NaN for null and for values that are not finite."""
    values = table.column(name).to_numpy(zero_copy_only=False).astype(np.float64)
    return np.where(np.isfinite(values), values, np.nan)


def read_vectors(table: pa.Table, name: str) -> tuple[Singles, Bools]:
    """Return the vectors that are not null, [values, VECTOR_SIZE], and which rows have one."""
    chunk = table.column(name).combine_chunks()
    there = np.asarray(chunk.is_valid())
    # `flatten` drops the values under nulls.
    flat = chunk.flatten().to_numpy(zero_copy_only=False).astype(np.float32)
    return flat.reshape(-1, VECTOR_SIZE), there


def gives_anchors(keys: Keys) -> Bools:
    """Return which sessions provide the novelty anchors (a quarter); they get no novelty of their own.

    Nor have those of the window: a session is near to itself, and a user of the reference comes back.
    """
    quarter: Bools = ((keys >> np.uint64(1)) & np.uint64(3)) == 0
    return quarter


def encode_sessions(table: pa.Table) -> tuple[list[str], Places]:
    """Return the session names of a table and the index of each row\'s session."""
    coded = table.column("session").combine_chunks().dictionary_encode()
    return coded.dictionary.to_pylist(), coded.indices.to_numpy(zero_copy_only=False).astype(np.int64)


def compute_novelty(vectors: Singles, anchors: Singles) -> Floats:
    """Return 1 minus the cosine to the nearest anchor, for vectors of length 1."""
    nearest: Floats = 1.0 - (vectors @ anchors.T).max(axis=1).astype(np.float64)
    return nearest


class _Seen:
    """Statistics of one column of the reference, gathered in the first pass."""

    def __init__(self, column: Column, seed: int) -> None:
        self._column = column
        self._values, self._classes = _DecimatedValues(), _Classes()
        self._usual, self._anchors = RowSample(seed), RowSample(seed + 1)

    def add(self, table: pa.Table, sessions: NDArray[Any], aside: Bools) -> None:
        name, kind = self._column.name, self._column.kind
        if kind == "number":
            values = read_numbers(table, name)
            self._values.add(values[~np.isnan(values)])
        elif kind == "category":
            self._classes.add(table.column(name).to_numpy(zero_copy_only=False), sessions)
        elif kind == "vector":
            vectors, there = read_vectors(table, name)
            self._anchors.add(vectors[aside[there]])
            self._usual.add(vectors[~aside[there]])

    def planned(self, max_categories: int, seed: int) -> Iterator[ColumnBinning]:
        column = self._column
        if column.kind == "number":
            yield ColumnBinning(column, edges=_edges(self._values.values()))
        elif column.kind == "category":
            yield ColumnBinning(column, categories=self._classes.common(max_categories))
        elif column.kind == "flag":
            yield ColumnBinning(column)
        else:
            usual, anchors = self._usual.rows(), self._anchors.rows()[:ANCHORS]
            yield ColumnBinning(column, waves=_waves(usual, seed))
            novelty = Column(
                column.name.removesuffix("_vector") + "_novelty",
                column.drift_type,
                "number",
                None,
                "",
                f"how far from anything usual: {column.meaning}",
            )
            values = compute_novelty(usual, anchors) if len(usual) and len(anchors) else np.empty(0)
            yield ColumnBinning(novelty, edges=_edges(values), source=column.name, anchors=anchors)


def _edges(values: Floats) -> Floats:
    if not len(values):
        return np.empty(0)
    edges = np.unique(np.quantile(values, QUANTILES, method="inverted_cdf"))
    # Most conversations have one turn: that edge has nothing below it. One more shows what falls.
    return np.concatenate([[np.nextafter(edges[0], -np.inf)], edges])


class _DecimatedValues:
    """Values of a stream, decimated evenly to at most MAX_BINNING_VALUES."""

    def __init__(self) -> None:
        self._kept: list[Floats] = []
        self._count, self._stride, self._skip = 0, 1, 0

    def add(self, values: Floats) -> None:
        taken = values[self._skip :: self._stride]
        self._skip = (self._skip - len(values)) % self._stride
        self._kept.append(taken)
        self._count += len(taken)
        if self._count > MAX_BINNING_VALUES:
            self._kept = [np.concatenate(self._kept)[::2]]
            self._count, self._stride = len(self._kept[0]), self._stride * 2

    def values(self) -> Floats:
        return np.concatenate(self._kept) if self._kept else np.empty(0)


class _Classes:
    """Classes of a column with their counts and sessions (up to MIN_CLASS_SESSIONS)."""

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


class RowSample:
    """A uniform sample of rows: those with the smallest random keys."""

    def __init__(self, seed: int) -> None:
        self._random = np.random.default_rng([seed, SAMPLE_ROWS])
        self._keys = np.empty(0)
        self._rows = np.empty((0, VECTOR_SIZE), dtype=np.float32)
        self._halves = np.empty(0, dtype=np.bool_)

    def add(self, rows: Singles, halves: Bools | None = None) -> None:
        """Offer rows to the sample: [rows, VECTOR_SIZE], with the half each belongs to."""
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
        """Return the rows sampled."""
        return self._rows

    def halves(self) -> Bools:
        """Return the half of each row sampled."""
        return self._halves
