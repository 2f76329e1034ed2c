"""Find texts that are almost the same: Jaccard similarity of their sets of character 3-grams.

The search is exact. MinHash with LSH would miss some pairs, and `split` has to prove that there
are none. It is fast because two sets with similarity t or more share one of their rarest grams:
only the first n - ceil(t n) + 1 grams of a set, the rarest first, need an index (prefix
filtering; Bayardo, Ma and Srikant, "Scaling up all pairs similarity search", 2007; Xiao and
others, "Efficient similarity joins for near duplicate detection", 2008).

A gram is a number, so that the grams of 100,000 passages fit into memory.
"""

from __future__ import annotations

import math
from array import array
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from stages.common.similarity.compared_text import fold_text

GRAM = 3
ROUNDING = 1e-9  # 0.7 * 10 is 7.000000000000001
CODE_POINT_BITS = 21
MAX_EXPECTED = 20_000  # texts from which it is estimated which grams are rare
MAX_CHUNK_GRAMS = 20_000_000  # of the texts that a proof reads at a time: about 400 MB

Grams = NDArray[np.int64] | NDArray[np.int32]  # int32: by rank


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
        expected: texts to estimate from which grams are rare; other texts work, too, but slower.
    """

    def __init__(self, threshold: float, expected: Iterable[str]) -> None:
        self.threshold = threshold
        sample = [extract_grams(text) for text in islice(expected, MAX_EXPECTED)]
        joined = np.concatenate(sample) if sample else np.zeros(0, np.int64)
        self._known, counts = np.unique(joined, return_counts=True)
        self._ranks = np.empty(len(self._known), np.int32)
        self._ranks[np.lexsort((self._known, counts))] = np.arange(len(self._known), dtype=np.int32)
        self._unknown: dict[int, int] = {}  # grams of no expected text are rarer than all others: below 0
        self._texts: list[NDArray[np.int32]] = []
        # Arrays, so that numpy can check thousands of candidates at once.
        self._sizes = array("i")
        self._by_gram: defaultdict[int, array[int]] = defaultdict(lambda: array("i"))

    def add(self, text: str) -> int:
        """Add a text to the index and return its number, from 0."""
        return self._add(self._rank_grams(text))

    def find_near(self, text: str) -> Iterator[tuple[int, float]]:
        """Yield the number and the similarity of each text in the index that is near `text`, in order."""
        return self._find_near(self._rank_grams(text))

    def find_or_add(self, text: str) -> tuple[int, float] | None:
        """Return the first text in the index that is near `text`, or add it and return None."""
        own = self._rank_grams(text)
        near = next(self._find_near(own), None)
        if near is None:
            self._add(own)
        return near

    def _add(self, own: NDArray[np.int32]) -> int:
        for gram in self._prefix(own).tolist():
            self._by_gram[gram].append(len(self._texts))
        self._texts.append(own)
        self._sizes.append(len(own))
        return len(self._texts) - 1

    def _find_near(self, own: NDArray[np.int32]) -> Iterator[tuple[int, float]]:
        for number in self._candidates(own):
            score = compute_similarity(own, self._texts[number])
            if score >= self.threshold - ROUNDING:
                yield number, score

    def _rank_grams(self, text: str) -> NDArray[np.int32]:
        """Return the grams of a text by their rank, the rarest first."""
        own = extract_grams(text)
        if not len(self._known):
            return self._rank_unknown(own)
        places = np.minimum(np.searchsorted(self._known, own), len(self._known) - 1)
        is_known = self._known[places] == own
        ranks = self._ranks[places]
        if not is_known.all():
            ranks[~is_known] = self._rank_unknown(own[~is_known])
        ranks.sort()
        return ranks

    def _rank_unknown(self, grams: Grams) -> NDArray[np.int32]:
        ranks = [self._unknown.setdefault(gram, -1 - len(self._unknown)) for gram in grams.tolist()]
        return np.sort(np.array(ranks, dtype=np.int32))

    def _candidates(self, own: NDArray[np.int32]) -> list[int]:
        """Return the texts whose prefix shares enough with the prefix of `own` (the filter of PPJoin).

        Grams shared beyond both prefixes come after one of them, so there are at most as many as there.
        """
        prefix = self._prefix(own).tolist()
        holders = [np.frombuffer(self._by_gram[gram], np.int32) for gram in prefix if gram in self._by_gram]
        if not holders:
            return []
        numbers, shared = np.unique(np.concatenate(holders), return_counts=True)
        sizes = np.frombuffer(self._sizes, np.int32)[numbers]
        beyond = np.maximum(len(own) - len(prefix), np.ceil(self.threshold * sizes - ROUNDING) - 1)
        at_most = np.minimum(shared + np.maximum(beyond, 0), np.minimum(sizes, len(own)))
        needed = self.threshold / (1 + self.threshold) * (len(own) + sizes)
        found: list[int] = numbers[at_most >= needed - ROUNDING].tolist()
        return found

    def _prefix(self, own: NDArray[np.int32]) -> NDArray[np.int32]:
        """Return the grams of which a near duplicate must have one: the rarest, in the same order for all."""
        return own[: len(own) - max(1, math.ceil(self.threshold * len(own) - ROUNDING)) + 1]


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
