"""Find texts that are almost the same: Jaccard similarity of their sets of character 3-grams.

The search is exact. MinHash with LSH would miss some pairs, and `split` has to prove that there
are none. It is fast because two sets with similarity t or more share one of their rarest grams:
only the first n - ceil(t n) + 1 grams of a set, the rarest first, need an index (prefix
filtering; Bayardo, Ma and Srikant, "Scaling up all pairs similarity search", 2007; Xiao and
others, "Efficient similarity joins for near duplicate detection", 2008).
"""

from __future__ import annotations

import math
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence

from stages.common.records import Row

GRAM = 3
ROUNDING = 1e-9  # 0.7 * 10 is 7.000000000000001


def join_prompt(row: Row) -> str:
    """Return the text of a row that is compared: all turns before the answer, without the system message."""
    return "\n".join(message.content for message in row.prompt if message.role != "system")


def extract_grams(text: str) -> frozenset[str]:
    """Return the character 3-grams of a text; case and runs of space do not count."""
    plain = " ".join(text.casefold().split())
    if len(plain) <= GRAM:
        return frozenset((plain,))
    return frozenset(plain[start : start + GRAM] for start in range(len(plain) - GRAM + 1))


def compute_similarity(left: frozenset[str], right: frozenset[str]) -> float:
    """Return the Jaccard similarity of two sets of grams: shared over all."""
    shared = len(left & right)
    return shared / (len(left) + len(right) - shared)


class SimilarTexts:
    """An index to find the texts that are near duplicates of another one.

    Args:
        threshold: the similarity from which on two texts are near.
        expected: texts to estimate from which grams are rare; other texts work, too, but slower.
    """

    def __init__(self, threshold: float, expected: Iterable[str]) -> None:
        self.threshold = threshold
        self._frequency = Counter(gram for text in expected for gram in extract_grams(text))
        self._texts: list[frozenset[str]] = []
        # Arrays, so that numpy can check thousands of candidates at once.
        self._sizes = array("q")
        self._by_gram: defaultdict[str, array[int]] = defaultdict(lambda: array("q"))

    def add(self, text: str) -> int:
        """Add a text to the index and return its number, from 0."""
        own = extract_grams(text)
        for gram in self._prefix(own):
            self._by_gram[gram].append(len(self._texts))
        self._texts.append(own)
        self._sizes.append(len(own))
        return len(self._texts) - 1

    def find_near(self, text: str) -> Iterator[tuple[int, float]]:
        """Yield the number and the similarity of each text in the index that is near `text`, in order."""
        own = extract_grams(text)
        for number in self._candidates(own):
            score = compute_similarity(own, self._texts[number])
            if score >= self.threshold - ROUNDING:
                yield number, score

    def _candidates(self, own: frozenset[str]) -> list[int]:
        """Return the texts whose prefix shares enough with the prefix of `own` (the filter of PPJoin).

        Grams shared beyond both prefixes come after one of them, so there are at most as many as there.
        """
        import numpy as np

        prefix = self._prefix(own)
        holders = [np.frombuffer(self._by_gram[gram], np.int64) for gram in prefix if gram in self._by_gram]
        if not holders:
            return []
        numbers, shared = np.unique(np.concatenate(holders), return_counts=True)
        sizes = np.frombuffer(self._sizes, np.int64)[numbers]
        beyond = np.maximum(len(own) - len(prefix), np.ceil(self.threshold * sizes - ROUNDING) - 1)
        at_most = np.minimum(shared + np.maximum(beyond, 0), np.minimum(sizes, len(own)))
        needed = self.threshold / (1 + self.threshold) * (len(own) + sizes)
        found: list[int] = numbers[at_most >= needed - ROUNDING].tolist()
        return found

    def _prefix(self, own: frozenset[str]) -> list[str]:
        """Return the grams of which a near duplicate must have one: the rarest, in the same order for all."""
        rarest_first = sorted(own, key=lambda gram: (self._frequency[gram], gram))
        return rarest_first[: len(own) - max(1, math.ceil(self.threshold * len(own) - ROUNDING)) + 1]


def find_closest(texts: Sequence[str], others: Sequence[str]) -> tuple[int, int, float] | None:
    """Return the most similar pair (i of texts, j of others, similarity), or None if one side is empty.

    Every pair is compared, which a proof requires.
    """
    import numpy as np

    sets = [extract_grams(text) for text in others]
    sizes = np.array([len(own) for own in sets])
    holders: defaultdict[str, array[int]] = defaultdict(lambda: array("q"))
    for number, own in enumerate(sets):
        for gram in own:
            holders[gram].append(number)
    postings = {gram: np.frombuffer(numbers, np.int64) for gram, numbers in holders.items()}
    best: tuple[int, int, float] | None = None
    for number, text in enumerate(texts):
        own = extract_grams(text)
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
