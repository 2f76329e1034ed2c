"""The grams of a text, and the similarity of two texts by them.

The similarity is that of the sets of character 3-grams, by Jaccard: shared over all. Long texts of few
characters have nearly all 3-grams that there can be (64 of DNA, 1,000 of digits), whatever they say. So a
text that repeats 3-grams has its 12-grams, too, and two such texts are as similar as both kinds allow. A
12-gram is shared where four 3-grams in a row are: the fourth root brings the Jaccard similarity of 12-grams
to the scale of 3-grams. A letter changed in a text without repetitions lowers both alike.

Of the 12-grams of a long text, those with the smallest hashes are kept (a bottom-k sketch; Broder, "On the
resemblance and containment of documents", 1997): two texts are compared by the hashes up to the one where the
first sketch ends. With 256 of them, a similarity of 0.9 has a standard error of 0.01.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from stages.common.similarity.compared_text import fold_text

CODE_POINT_BITS = 21
GRAM = 3
LONG = 4 * GRAM
MIN_REPEATED = 16  # 3-grams that a text repeats; commands have fewer, and it has eight 12-grams then
MAX_LONG = 256  # of the 12-grams of a text
MIXER = np.uint64(0x9E3779B97F4A7C15)  # Knuth's multiplicative hashing, by the golden ratio

Ordered = NDArray[np.int64]  # different numbers, in order
NONE: Ordered = np.zeros(0, np.int64)


class Grams(NamedTuple):
    """The grams of a text.

    Attributes:
        short: the 3-grams as numbers.
        long: hashes of 12-grams, the smallest, of a text that repeats 3-grams; of another one, none.
    """

    short: Ordered
    long: Ordered


def extract_grams(text: str) -> Grams:
    """Return the grams of a text after `fold_text`."""
    plain = fold_text(text)
    codes = np.frombuffer(plain.encode("utf-32-le", errors="surrogatepass"), np.uint32).astype(np.int64)
    if len(codes) < GRAM:
        codes = np.concatenate([np.zeros(GRAM - len(codes), np.int64), codes])
    all_grams = codes[:-2] << 2 * CODE_POINT_BITS | codes[1:-1] << CODE_POINT_BITS | codes[2:]
    short = _select_different(np.sort(all_grams))
    if len(all_grams) - len(short) < MIN_REPEATED:
        return Grams(short, NONE)
    return Grams(short, _select_long(all_grams))


def _select_different(ordered: Ordered) -> Ordered:
    if len(ordered) < 2:
        return ordered
    return ordered[np.concatenate(([True], ordered[1:] != ordered[:-1]))]


def _select_long(grams: Ordered) -> Ordered:
    """Return the smallest hashes of the 12-grams, in order, given the 3-grams as they follow each other."""
    hashes = grams.view(np.uint64) * MIXER
    for step in (GRAM, 2 * GRAM):
        hashes = _mix(hashes[:-step], hashes[step:])
    found: Ordered = (hashes >> np.uint64(1)).view(np.int64)
    enough = 4 * MAX_LONG
    if len(found) > 2 * enough:
        smallest = _select_different(np.sort(np.partition(found, enough)[:enough]))
        if len(smallest) >= MAX_LONG:
            return smallest[:MAX_LONG]
    return _select_different(np.sort(found))[:MAX_LONG]


def _mix(left: NDArray[np.uint64], right: NDArray[np.uint64]) -> NDArray[np.uint64]:
    mixed: NDArray[np.uint64] = (left ^ (right << np.uint64(31)) ^ (right >> np.uint64(33))) * MIXER
    return mixed ^ (mixed >> np.uint64(29))


def compute_similarity(left: Grams, right: Grams) -> float:
    """Return the similarity of two texts, from 0 to 1."""
    short = _compute_jaccard(left.short, right.short)
    if not len(left.long) or not len(right.long):
        return short
    ends = [int(one[-1]) for one in (left.long, right.long) if len(one) == MAX_LONG]
    ours, theirs = (
        one[: np.searchsorted(one, min(ends), side="right")] if ends else one
        for one in (left.long, right.long)
    )
    return min(short, float(_compute_jaccard(ours, theirs) ** (GRAM / LONG)))


def _compute_jaccard(left: Ordered, right: Ordered) -> float:
    places = np.minimum(np.searchsorted(right, left), len(right) - 1)
    shared = int((right[places] == left).sum())
    return shared / (len(left) + len(right) - shared)


def to_long_scale(similarity: float) -> float:
    """Return the Jaccard similarity of 12-grams from which on two texts can be this similar."""
    return float(similarity ** (LONG / GRAM))


def bound_long(shared: NDArray[np.int64], size: int, sizes: NDArray[np.int64]) -> NDArray[Any]:
    """Return how similar texts can be at most whose 12-grams share as many.

    The sketch that ends first is compared whole: all that is compared is at least as much as the smaller one.

    Args:
        size: of the sketch of one text; sizes: of the others', of which some have none.
    """
    limits: NDArray[Any] = (shared / np.maximum(1, np.minimum(size, sizes))) ** (GRAM / LONG)
    return limits


def count_bytes(grams: Grams) -> int:
    """Return the size of a text's grams."""
    return grams.short.nbytes + grams.long.nbytes
