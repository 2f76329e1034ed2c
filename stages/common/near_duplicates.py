"""Find texts that are almost the same: Jaccard similarity of their sets of character 3-grams.

The search is exact. MinHash with LSH would miss some pairs, and `split` has to prove that there
are none. It is fast because two sets with similarity t or more share one of their rarest grams:
only the first n - ceil(t n) + 1 grams of a set, the rarest first, need an index (prefix
filtering; Bayardo, Ma and Srikant, "Scaling up all pairs similarity search", 2007).
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence

from stages.common.records import Row

GRAM = 3
ROUNDING = 1e-9  # 0.7 * 10 is 7.000000000000001


def prompt_text(row: Row) -> str:
    """Return what is compared of a row: all turns before the answer, without the shared system message."""
    return "\n".join(message.content for message in row.prompt if message.role != "system")


def grams(text: str) -> frozenset[str]:
    """Return the character 3-grams of a text; case and runs of space do not count."""
    plain = " ".join(text.casefold().split())
    if len(plain) <= GRAM:
        return frozenset((plain,))
    return frozenset(plain[start : start + GRAM] for start in range(len(plain) - GRAM + 1))


def similarity(left: frozenset[str], right: frozenset[str]) -> float:
    """Return the Jaccard similarity of two sets of grams: shared over all."""
    shared = len(left & right)
    return shared / (len(left) + len(right) - shared)


class SimilarTexts:
    """An index of texts that can be asked which of them are near another one.

    Args:
        threshold: the similarity from which on two texts are near.
        expected: the texts to come, to know which grams are rare; others are served too, more slowly.
    """

    def __init__(self, threshold: float, expected: Iterable[str]) -> None:
        self.threshold = threshold
        self._frequency = Counter(gram for text in expected for gram in grams(text))
        self._texts: list[frozenset[str]] = []
        self._by_gram: defaultdict[str, list[int]] = defaultdict(list)
        self.compared = 0

    def add(self, text: str) -> int:
        """Put a text in the index and return its number there, counted from 0."""
        own = grams(text)
        for gram in self._prefix(own):
            self._by_gram[gram].append(len(self._texts))
        self._texts.append(own)
        return len(self._texts) - 1

    def near(self, text: str) -> Iterator[tuple[int, float]]:
        """Yield the number and the similarity of each text in the index that is near `text`, in order."""
        own = grams(text)
        candidates = {number for gram in self._prefix(own) for number in self._by_gram.get(gram, ())}
        for number in sorted(candidates):
            other = self._texts[number]
            sizes = sorted((len(own), len(other)))
            if sizes[0] < self.threshold * sizes[1] - ROUNDING:
                continue
            self.compared += 1
            score = similarity(own, other)
            if score >= self.threshold - ROUNDING:
                yield number, score

    def _prefix(self, own: frozenset[str]) -> list[str]:
        """The grams of which a near text must share one: the rarest, in an order all texts agree on."""
        rarest_first = sorted(own, key=lambda gram: (self._frequency[gram], gram))
        return rarest_first[: len(own) - max(1, math.ceil(self.threshold * len(own) - ROUNDING)) + 1]


def near_duplicate_pairs(texts: Sequence[str], threshold: float) -> list[tuple[int, int, float]]:
    """Return every pair (i, j, similarity) with i < j whose similarity is `threshold` or more."""
    index = SimilarTexts(threshold, texts)
    pairs = []
    for number, text in enumerate(texts):
        pairs += [(other, number, score) for other, score in index.near(text)]
        index.add(text)
    return sorted(pairs)


def closest(texts: Sequence[str], others: Sequence[str]) -> tuple[int, int, float] | None:
    """Return the most similar pair (i of texts, j of others, similarity), or None where one side is empty.

    Every pair is compared, however far apart, which is what a proof needs.
    """
    import numpy as np

    sets = [grams(text) for text in others]
    sizes = np.array([len(own) for own in sets])
    holders: defaultdict[str, list[int]] = defaultdict(list)
    for number, own in enumerate(sets):
        for gram in own:
            holders[gram].append(number)
    postings = {gram: np.array(numbers) for gram, numbers in holders.items()}
    best: tuple[int, int, float] | None = None
    for number, text in enumerate(texts):
        own = grams(text)
        hits = [postings[gram] for gram in sorted(own) if gram in postings]
        shared = (
            np.bincount(np.concatenate(hits), minlength=len(sets)) if hits else np.zeros(len(sets), dtype=int)
        )
        if not len(shared):
            continue
        scores = shared / (sizes + len(own) - shared)
        nearest = int(scores.argmax())
        if best is None or scores[nearest] > best[2]:
            best = (number, nearest, float(scores[nearest]))
    return best
