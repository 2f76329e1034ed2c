"""Find texts that are almost the same: Jaccard similarity of their sets of character 3-grams.

The search is exact. MinHash with LSH would miss some pairs, and `split` has to prove that there
are none. It is fast because two sets with similarity t or more share one of their rarest grams:
only the first n - ceil(t n) + 1 grams of a set, the rarest first, need an index (prefix
filtering; Bayardo, Ma and Srikant, "Scaling up all pairs similarity search", 2007; Xiao and
others, "Efficient similarity joins for near duplicate detection", 2008).

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

from stages.common.similarity.compared_text import fold_text
from stages.common.spool import Spool, spool

GRAM = 3
ROUNDING = 1e-9  # 0.7 * 10 is 7.000000000000001
CODE_POINT_BITS = 21
MAX_EXPECTED = 20_000  # texts from which it is estimated which grams are rare
MAX_EXPECTED_GRAMS = 10_000_000  # of those texts: a few thousand passages tell as much
MAX_CHUNK_GRAMS = 20_000_000  # of the texts that a proof reads at a time: about 400 MB

BUCKET_BITS = 22
MIXER = np.uint64(0x9E3779B97F4A7C15)  # Knuth's multiplicative hashing, by the golden ratio

Grams = NDArray[np.int64]


def extract_grams(text: str) -> Grams:
    """Return the character 3-grams of a text as numbers, in order, after `fold_text`."""
    plain = fold_text(text)
    codes = np.frombuffer(plain.encode("utf-32-le", errors="surrogatepass"), np.uint32).astype(np.int64)
    if len(codes) < GRAM:
        codes = np.concatenate([np.zeros(GRAM - len(codes), np.int64), codes])
    grams = codes[:-2] << 2 * CODE_POINT_BITS | codes[1:-1] << CODE_POINT_BITS | codes[2:]
    grams.sort()
    if len(grams) > 1:
        grams = grams[np.concatenate(([True], grams[1:] != grams[:-1]))]
    return grams


def compute_similarity(left: Grams, right: Grams) -> float:
    """Return the Jaccard similarity of two sets of grams, each in order: shared over all."""
    places = np.minimum(np.searchsorted(right, left), len(right) - 1)
    shared = int((right[places] == left).sum())
    return shared / (len(left) + len(right) - shared)


class SimilarTexts:
    """An index to find the texts that are near duplicates of another one.

    Args:
        threshold: the similarity from which on two texts are near.
        expected: the grams of texts that tell which grams are rare; other texts work, too, but slower.
    """

    def __init__(self, threshold: float, expected: Iterable[Grams]) -> None:
        self.threshold = threshold
        self._known, counts = _count_grams(expected)
        self._ranks = np.empty(len(self._known), np.int64)
        self._ranks[np.lexsort((self._known, counts))] = np.arange(len(self._known))
        self._texts: Spool[Grams] = Spool(_count_bytes)
        # Arrays, so that numpy can check thousands of candidates at once.
        self._sizes = array("i")
        self._by_bucket: defaultdict[int, array[int]] = defaultdict(lambda: array("i"))

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
        for bucket in _find_buckets(self._prefix(own)):
            self._by_bucket[bucket].append(len(self._texts))
        self._sizes.append(len(own))
        self._texts.append(own)
        return len(self._texts) - 1

    def _find_near(self, own: Grams) -> Iterator[tuple[int, float]]:
        for number in self._candidates(own):
            score = compute_similarity(own, self._texts[number])
            if score >= self.threshold - ROUNDING:
                yield number, score

    def _rank_grams(self, own: Grams) -> Grams:
        """Return the grams of a text by rank, the rarest first; those of no expected text are below 0."""
        if not len(self._known):
            return -1 - own[::-1]
        places = np.minimum(np.searchsorted(self._known, own), len(self._known) - 1)
        ranks = np.where(self._known[places] == own, self._ranks[places], -1 - own)
        ranks.sort()
        return ranks

    def _candidates(self, own: Grams) -> list[int]:
        """Return the texts whose prefix shares enough with the prefix of `own` (the filter of PPJoin).

        Grams shared beyond both prefixes come after one of them, so there are at most as many as there. Two
        grams in one bucket count as shared: that lets more texts through, and none less.
        """
        prefix = self._prefix(own)
        buckets = _find_buckets(prefix)
        holders = [self._by_bucket[bucket] for bucket in buckets if bucket in self._by_bucket]
        if not holders:
            return []
        numbers, shared = _count_equal(np.sort(np.concatenate(holders)))
        sizes = np.frombuffer(self._sizes, np.int32)[numbers]
        beyond = np.maximum(len(own) - len(prefix), np.ceil(self.threshold * sizes - ROUNDING) - 1)
        at_most = np.minimum(shared + np.maximum(beyond, 0), np.minimum(sizes, len(own)))
        needed = self.threshold / (1 + self.threshold) * (len(own) + sizes)
        found: list[int] = numbers[at_most >= needed - ROUNDING].tolist()
        return found

    def _prefix(self, own: Grams) -> Grams:
        """Return the grams of which a near duplicate must have one: the rarest, in the same order for all."""
        return own[: len(own) - max(1, math.ceil(self.threshold * len(own) - ROUNDING)) + 1]


def _find_buckets(grams: Grams) -> list[int]:
    """Return the bucket of each gram: so many that few share one, so few that the index has a limit."""
    mixed = grams.view(np.uint64) * MIXER >> np.uint64(64 - BUCKET_BITS)
    found: list[int] = mixed.tolist()
    return found


def spool_grams(texts: Iterable[str]) -> Sequence[Grams]:
    """Return the grams of each text."""
    return spool(map(extract_grams, texts), _count_bytes)


def find_near_earlier(texts: Iterable[str], threshold: float) -> Iterator[tuple[int, float] | None]:
    """Yield for each text the first one kept before it that it is near, or None: then it is kept itself.

    Yielded are its place among those kept, and the similarity. Texts are read once.
    """
    grams = spool_grams(texts)
    return map(SimilarTexts(threshold, grams).find_or_add, grams)


def _count_grams(texts: Iterable[Grams]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the different grams of the first texts, in order, and how many of these texts have each."""
    sample: list[Grams] = []
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


def _count_bytes(grams: Grams) -> int:
    return grams.nbytes


def find_closest(texts: Sequence[str], others: Iterable[str]) -> tuple[int, int, float] | None:
    """Return the most similar pair (i of texts, j of others, similarity), or None if one side is empty.

    Every pair is compared, which a proof requires.
    """
    own = [extract_grams(text) for text in texts]
    best: tuple[int, int, float] | None = None
    first = 0
    for chunk in _chunk_grams(others):
        sizes = np.array([len(grams) for grams in chunk])
        joined = np.concatenate(chunk)
        order = np.argsort(joined, kind="stable")
        holders = np.repeat(np.arange(len(chunk), dtype=np.int32), sizes)[order]
        ordered = joined[order]
        for number, grams in enumerate(own):
            starts = np.searchsorted(ordered, grams).tolist()
            ends = np.searchsorted(ordered, grams, side="right").tolist()
            hits = [holders[start:end] for start, end in zip(starts, ends, strict=True) if start < end]
            shared = np.bincount(np.concatenate(hits), minlength=len(chunk)) if hits else np.zeros(len(chunk))
            scores = shared / (sizes + len(grams) - shared)
            nearest = int(scores.argmax())
            # Of equal scores the first text's counts, in whatever chunks the others come.
            if best is None or (scores[nearest], -number) > (best[2], -best[0]):
                best = (number, first + nearest, float(scores[nearest]))
        first += len(chunk)
    return best


def _chunk_grams(texts: Iterable[str]) -> Iterator[list[Grams]]:
    """Yield the grams of the texts, of as many texts at a time as fit into memory."""
    chunk: list[Grams] = []
    held = 0
    for text in texts:
        chunk.append(extract_grams(text))
        held += len(chunk[-1])
        if held >= MAX_CHUNK_GRAMS:
            yield chunk
            chunk, held = [], 0
    if chunk:
        yield chunk
