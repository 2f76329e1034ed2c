"""Find texts that are almost the same: Jaccard similarity of their sets of character 3-grams.

The search is exact. MinHash with LSH would miss some pairs, and `split` has to prove that there
are none. It is fast because two sets with similarity t or more share one of their rarest grams:
only the first n - ceil(t n) + 1 grams of a set, the rarest first, need an index (prefix
filtering; Bayardo, Ma and Srikant, "Scaling up all pairs similarity search", 2007; Xiao and
others, "Efficient similarity joins for near duplicate detection", 2008).

Texts that repeat their 3-grams may have the same ones and be different: all sequences of DNA do, and all
long rows of digits. Two such texts are as similar as their 3-grams and their 12-grams are (`grams.py`), and
12-grams, which few of them share, find them where 3-grams would find all.

A gram is a number, and the grams of many passages are in a spool, so that 100,000 passages can be searched.
"""

from __future__ import annotations

import math
from array import array
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stages.common.similarity.grams import (
    MIXER,
    Grams,
    Ordered,
    bound_long,
    compute_similarity,
    count_bytes,
    extract_grams,
    to_long_scale,
)
from stages.common.spool import Spool, spool

ROUNDING = 1e-9  # 0.7 * 10 is 7.000000000000001
MAX_EXPECTED = 20_000  # texts from which it is estimated which grams are rare
MAX_EXPECTED_GRAMS = 10_000_000  # of those texts: a few thousand passages tell as much
MAX_CHUNK_GRAMS = 20_000_000  # of the texts that a proof reads at a time: about 400 MB

BUCKET_BITS = 22


class SimilarTexts:
    """An index to find the texts that are near duplicates of another one.

    Args:
        threshold: the similarity from which on two texts are near.
        expected: the grams of texts that tell which grams are rare; other texts work, too, but slower.
    """

    def __init__(self, threshold: float, expected: Iterable[Grams]) -> None:
        self.threshold = threshold
        self._known, counts = _count_grams(grams.short for grams in expected)
        self._ranks = np.empty(len(self._known), np.int64)
        self._ranks[np.lexsort((self._known, counts))] = np.arange(len(self._known))
        self._texts: Spool[Grams] = Spool(count_bytes)
        # Two texts that repeat 3-grams are found by either kind, others by 3-grams.
        self._plain, self._repeating = PrefixIndex(threshold), PrefixIndex(threshold)
        self._long = PrefixIndex(to_long_scale(threshold), are_sketches=True)

    def add(self, grams: Grams) -> int:
        """Add a text to the index and return its number, from 0."""
        return self._add(self._rank_grams(grams))

    def find_near(self, grams: Grams) -> Iterator[tuple[int, float]]:
        """Yield the number and the similarity of each text in the index that is near, in order."""
        return self._find_near(self._rank_grams(grams))

    def find_or_add(self, grams: Grams) -> tuple[int, float] | None:
        """Return the first text in the index that is near, or add this one and return None."""
        own = self._rank_grams(grams)
        near = next(self._find_near(own), None)
        if near is None:
            self._add(own)
        return near

    def _add(self, own: Grams) -> int:
        number = len(self._texts)
        if len(own.long):
            self._repeating.add(number, own.short)
            self._long.add(number, own.long)
        else:
            self._plain.add(number, own.short)
        self._texts.append(own)
        return number

    def _find_near(self, own: Grams) -> Iterator[tuple[int, float]]:
        for number in sorted(self._list_candidates(own)):
            score = compute_similarity(own, self._texts[number])
            if score >= self.threshold - ROUNDING:
                yield number, score

    def _list_candidates(self, own: Grams) -> list[int]:
        found = self._plain.find(own.short)
        if len(own.long) and self._long.count_holders(own.long) < self._repeating.count_holders(own.short):
            return found + self._long.find(own.long)
        return found + self._repeating.find(own.short)

    def _rank_grams(self, grams: Grams) -> Grams:
        """Return the 3-grams of a text by rank, the rarest first; those of no expected text are below 0."""
        own = grams.short
        if not len(self._known):
            return Grams(-1 - own[::-1], grams.long)
        places = np.minimum(np.searchsorted(self._known, own), len(self._known) - 1)
        ranks = np.where(self._known[places] == own, self._ranks[places], -1 - own)
        ranks.sort()
        return Grams(ranks, grams.long)


class PrefixIndex:
    """Sets of grams, to find those that may be similar to another one by the first grams of both.

    Args:
        threshold: the Jaccard similarity from which on sets are found; all sets are in one order.
        are_sketches: whether sets are cut, and compared up to where the first of two ends. How many they must
            share in all is not known then, but of a longer prefix, several: threshold * n / 8 of n.
    """

    def __init__(self, threshold: float, are_sketches: bool = False) -> None:
        self.threshold = threshold
        self._are_sketches = are_sketches
        # Arrays, so that numpy can check thousands of candidates at once.
        self._sizes, self._numbers = array("i"), array("i")
        self._by_bucket: defaultdict[int, array[int]] = defaultdict(lambda: array("i"))

    def add(self, number: int, own: Ordered) -> None:
        """Add the set of the text with this number."""
        for bucket in _find_buckets(self._prefix(own)):
            self._by_bucket[bucket].append(len(self._sizes))
        self._sizes.append(len(own))
        self._numbers.append(number)

    def count_holders(self, own: Ordered) -> int:
        """Return how much `find` has to read."""
        return sum(map(len, self._list_holders(self._prefix(own))))

    def find(self, own: Ordered) -> list[int]:
        """Return the texts whose prefix shares enough with the prefix of `own`.

        Two grams in one bucket count as shared: that lets more texts through, and none less.
        """
        holders = self._list_holders(self._prefix(own))
        if not holders:
            return []
        places, shared = _count_equal(np.sort(np.concatenate(holders)))
        enough = self._share_enough(len(own), np.frombuffer(self._sizes, np.int32)[places], shared)
        found: list[int] = np.frombuffer(self._numbers, np.int32)[places[enough]].tolist()
        return found

    def _share_enough(
        self, size: int, sizes: NDArray[np.int32], shared: NDArray[np.int64]
    ) -> NDArray[np.bool_]:
        """Return which sets share as many grams of the prefixes as similar ones do (the filter of PPJoin).

        Grams shared beyond both prefixes come after one of them, so there are at most as many as there.
        """
        enough: NDArray[np.bool_]
        if self._are_sketches:
            enough = shared >= self._count_spare(np.minimum(size, sizes))
        else:
            prefix = self._measure_prefix(size)
            beyond = np.maximum(size - prefix, np.ceil(self.threshold * sizes - ROUNDING) - 1)
            at_most = np.minimum(shared + np.maximum(beyond, 0), np.minimum(sizes, size))
            needed = self.threshold / (1 + self.threshold) * (size + sizes)
            enough = at_most >= needed - ROUNDING
        return enough

    def _list_holders(self, prefix: Ordered) -> list[array[int]]:
        buckets = _find_buckets(prefix)
        return [self._by_bucket[bucket] for bucket in buckets if bucket in self._by_bucket]

    def _prefix(self, own: Ordered) -> Ordered:
        """Return the grams of which a near duplicate must have one: the rarest, in the same order for all."""
        return own[: self._measure_prefix(len(own))]

    def _measure_prefix(self, size: int) -> int:
        spare = int(self._count_spare(np.int64(size))) if self._are_sketches else 1
        return size - max(1, math.ceil(self.threshold * size - ROUNDING)) + spare

    def _count_spare(self, sizes: Any) -> Any:
        """Return how many grams of their prefixes two sketches share, the smaller one of this size.

        One of the two is compared whole, and of what is compared of the larger, they share the threshold. Of
        n grams that share o with others, the first n - o + k share k (Wang, Li and Feng, "Can we beat the
        prefix filtering?", 2012).
        """
        return np.maximum(1, np.floor(self.threshold * sizes / 8 + ROUNDING))


def _find_buckets(grams: Ordered) -> list[int]:
    """Return the bucket of each gram: so many that few share one, so few that the index has a limit."""
    mixed = grams.view(np.uint64) * MIXER >> np.uint64(64 - BUCKET_BITS)
    found: list[int] = mixed.tolist()
    return found


def spool_grams(texts: Iterable[str]) -> Sequence[Grams]:
    """Return the grams of each text."""
    return spool(map(extract_grams, texts), count_bytes)


def find_near_earlier(texts: Iterable[str], threshold: float) -> Iterator[tuple[int, float] | None]:
    """Yield for each text the first one kept before it that it is near, or None: then it is kept itself.

    Yielded are its place among those kept, and the similarity. Texts are read once.
    """
    grams = spool_grams(texts)
    return map(SimilarTexts(threshold, grams).find_or_add, grams)


def _count_grams(texts: Iterable[Ordered]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the different grams of the first texts, in order, and how many of these texts have each."""
    sample: list[Ordered] = []
    held = 0
    for grams in islice(texts, MAX_EXPECTED):
        sample.append(grams)
        held += len(grams)
        if held >= MAX_EXPECTED_GRAMS:
            break
    joined = np.concatenate(sample) if sample else np.zeros(0, np.int64)
    joined.sort()
    return _count_equal(joined)


def _count_equal(ordered: NDArray[Any]) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """Return the different values of an ordered array, and how often each is in it."""
    if not len(ordered):
        return ordered, np.zeros(0, np.int64)
    edges = np.flatnonzero(np.concatenate(([True], ordered[1:] != ordered[:-1], [True])))
    return ordered[edges[:-1]], edges[1:] - edges[:-1]


def find_closest(texts: Sequence[str], others: Iterable[str]) -> tuple[int, int, float] | None:
    """Return the most similar pair (i of texts, j of others, similarity), or None if one side is empty.

    Every pair is compared, which a proof requires.
    """
    own = [extract_grams(text) for text in texts]
    best: tuple[int, int, float] | None = None
    first = 0
    for chunk in _chunk_grams(others):
        short, long = Holders([grams.short for grams in chunk]), Holders([grams.long for grams in chunk])
        for number, grams in enumerate(own):
            shared = short.count_shared(grams.short)
            scores = shared / (short.sizes + len(grams.short) - shared)
            if len(grams.long):
                limits = bound_long(long.count_shared(grams.long), len(grams.long), long.sizes)
                scores = np.where(long.sizes > 0, np.minimum(scores, limits), scores)
            # Of texts that repeat 3-grams, these scores are the most that their similarity can be.
            while True:
                nearest = int(scores.argmax())
                if best is not None and scores[nearest] < best[2]:
                    break
                exact = compute_similarity(grams, chunk[nearest])
                # Of equal scores the first text's counts, in whatever chunks the others come.
                if best is None or (exact, -number) > (best[2], -best[0]):
                    best = (number, first + nearest, exact)
                if scores[nearest] <= exact:
                    break
                scores[nearest] = exact
        first += len(chunk)
    return best


class Holders:
    """Sets of grams, to count how many each shares with another one: all at once, and without an index.

    Attributes:
        sizes: the number of grams of each set.
    """

    def __init__(self, sets: Sequence[Ordered]) -> None:
        self.sizes = np.array([len(grams) for grams in sets])
        joined = np.concatenate(sets)
        order = np.argsort(joined, kind="stable")
        self._holders = np.repeat(np.arange(len(sets), dtype=np.int32), self.sizes)[order]
        self._ordered = joined[order]

    def count_shared(self, own: Ordered) -> NDArray[np.int64]:
        """Return the number of grams that each set shares with `own`."""
        starts = np.searchsorted(self._ordered, own).tolist()
        ends = np.searchsorted(self._ordered, own, side="right").tolist()
        hits = [self._holders[start:end] for start, end in zip(starts, ends, strict=True) if start < end]
        count = len(self.sizes)
        return np.bincount(np.concatenate(hits), minlength=count) if hits else np.zeros(count, np.int64)


def _chunk_grams(texts: Iterable[str]) -> Iterator[list[Grams]]:
    """Yield the grams of the texts, of as many texts at a time as fit into memory."""
    chunk: list[Grams] = []
    held = 0
    for text in texts:
        chunk.append(extract_grams(text))
        held += len(chunk[-1].short) + len(chunk[-1].long)
        if held >= MAX_CHUNK_GRAMS:
            yield chunk
            chunk, held = [], 0
    if chunk:
        yield chunk
