"""A small linear text classifier: hashed n-grams of characters, words and concepts, in numpy.

Concepts (`data/concepts.csv` maps "ignore", "vergiss" and "bypass" to one) generalise from one wording to
others. A text is scored in windows of two widths and gets its highest window score, so that a long document
does not dilute an attack. All work is linear in the length of the text.

scikit-learn's HashingVectorizer and SGDClassifier would be shorter, but would add scikit-learn and SciPy
(about 195 MB) to the serving image.
"""

from __future__ import annotations

import csv
import re
import unicodedata
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt

from stages.common.artifacts import atomic_write

BUCKETS = 1 << 16
CHAR_ORDERS = (4, 6)  # 3 adds little, and 5 is redundant between them
WIDTHS = (80, 240)  # characters: a sentence, a paragraph
STRIDES = (20, 60)  # a quarter of the width, so that nearly every sentence fits into one window
BASE = 0x9E3779B97F4A7C15  # odd, so that it has an inverse modulo 2**64

Uints = npt.NDArray[np.uint64]
Floats = npt.NDArray[np.float32]

# Letters of other scripts that look Latin. Attackers use them to break up words, so all of them become Latin,
# even where they are genuine: only the classifier reads the result.
LOOKALIKES = str.maketrans(
    dict(zip("аеорсухіјѕһԁԛԝαεορτυνικχ", "aeopcyxijshdqwaeoptuvikx", strict=True))
    | dict.fromkeys("“”„«»", '"')
    | dict.fromkeys("‘’‚`´", "'")
    | dict.fromkeys("–—−", "-")
)
# Invisible tag characters, to the ASCII characters that they encode.
UNHIDDEN = {0xE0000 + code: code for code in range(0x20, 0x7F)}
LEET = str.maketrans("013457@$!", "oieastasi")
LEET_WORD = re.compile(r"[a-z0-9@$!]+")
SPACED = re.compile(r"(?<!\w)(?:\w[ ._*-]){3,}\w(?!\w)")
WORD = re.compile(r"[^\W_]+")
CONCEPTS = Path(__file__).parent / "data" / "concepts.csv"
MAX_PREFIX = 8
NEAR_CONCEPTS = 4  # a concept is paired with up to this many later ones
NEAR_CHARS = 70
SPACES = re.compile(r"\s+")


@dataclass(frozen=True, slots=True)
class TextClassifier:
    """Weights of the hashed n-grams, and the score above which a text is positive."""

    weights: Floats
    bias: float
    threshold: float

    def score(self, text: str) -> float:
        """Return the highest window score of a text; any real number."""
        return float(self.score_windows(normalise(text)).max())

    def score_windows(self, normalised: str) -> Floats:
        """Return the scores of all windows of a normalised text."""
        buckets, ends = hash_ngrams(normalised)
        size = max(1, len(normalised))
        totals = np.concatenate(([0.0], np.bincount(ends, self.weights[buckets], size).cumsum()))
        counts = np.concatenate(([0], np.bincount(ends, minlength=size).cumsum()))
        starts, stops = split_windows(size)
        number = np.maximum(1, counts[stops] - counts[starts])
        scores: Floats = ((totals[stops] - totals[starts]) / np.sqrt(number) + self.bias).astype(np.float32)
        return scores


def normalise(text: str) -> str:
    """Return the text in one alphabet and one case, without accents or obfuscation.

    NFKC folds full-width and styled letters. Invisible characters (zero-width, soft hyphens, bidirectional
    marks) are removed, and tag characters (U+E0000) become the ASCII characters that they encode.
    """
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text.translate(UNHIDDEN))
        text = unicodedata.normalize("NFD", text).translate(LOOKALIKES)
        text = "".join(c for c in text if unicodedata.category(c) not in ("Mn", "Cf"))
        text = unicodedata.normalize("NFC", text)
    text = text.casefold().translate(LOOKALIKES)
    text = LEET_WORD.sub(_decode_leet, text)
    text = SPACED.sub(lambda match: re.sub(r"[ ._*-]", "", match.group()), text)
    return f" {SPACES.sub(' ', text).strip()} "


def _decode_leet(match: re.Match[str]) -> str:
    """Decode leetspeak in a word that has letters; numbers and final exclamation marks stay."""
    word = match.group()
    body = word.rstrip("!")
    if body.isalpha() or not any("a" <= c <= "z" for c in body):
        return word
    return body.translate(LEET) + word[len(body) :]


def hash_ngrams(normalised: str) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return the hash buckets of all n-grams of a normalised text, and the position where each ends."""
    codes = np.frombuffer(normalised.encode("utf-32-le", "surrogatepass"), dtype=np.uint32).astype(np.uint64)
    if codes.size == 0:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    powers, inverses = _powers(codes.size)
    sums = np.concatenate((np.zeros(1, np.uint64), (codes * powers[:-1]).cumsum(dtype=np.uint64)))
    hashes, ends = [], []
    for order in CHAR_ORDERS:
        if codes.size >= order:
            grams = (sums[order:] - sums[:-order]) * inverses[: codes.size - order + 1]
            hashes.append(_mix(grams + np.uint64(order)))
            ends.append(np.arange(order - 1, codes.size))
    starts, stops = _find_words(codes)
    words = _mix((sums[stops] - sums[starts]) * inverses[starts])
    hashes.append(_mix(words ^ np.uint64(0xA5)))
    ends.append(stops - 1)
    # Word pairs, with no word between them or one: "ignore previous", "ignore all previous".
    for gap in (1, 2):
        if words.size > gap:
            hashes.append(_mix(words[:-gap] * np.uint64(31) + words[gap:] + np.uint64(gap)))
            ends.append(stops[gap:] - 1)
    concepts, places = find_concepts(normalised)
    hashes.append(_mix(np.array(concepts, dtype=np.uint64) + np.uint64(0xC0FFEE)))
    ends.append(np.array(places, dtype=np.int64))
    return (np.concatenate(hashes) >> np.uint64(48)).astype(np.int64), np.concatenate(ends)


def find_concepts(normalised: str) -> tuple[list[int], list[int]]:
    """Return the concepts of a normalised text and pairs of nearby ones, as numbers, with their positions."""
    lexicon = _load_lexicon()
    found: list[tuple[int, int]] = []
    numbers, places = [], []
    for match in WORD.finditer(normalised):
        concept = _find_concept(match.group(), lexicon)
        if concept is None:
            continue
        place = match.start()
        numbers.append(concept)
        places.append(place)
        for earlier, where in found[-NEAR_CONCEPTS:]:
            if place - where <= NEAR_CHARS:
                numbers.append(1000 * (earlier + 1) + concept)
                places.append(place)
        found.append((concept, place))
    return numbers, places


def _find_concept(word: str, lexicon: dict[str, int]) -> int | None:
    """Return the number of the concept of a word, or else of its longest known prefix."""
    if (whole := lexicon.get(word + "$")) is not None:
        return whole
    for length in range(min(MAX_PREFIX, len(word)), 2, -1):
        if (concept := lexicon.get(word[:length])) is not None:
            return concept
    return None


@cache
def _load_lexicon() -> dict[str, int]:
    """Return the concept number of every prefix; `$` marks a whole word."""
    with CONCEPTS.open(encoding="utf-8", newline="") as file:
        rows = [(row["concept"], row["prefix"]) for row in csv.DictReader(file)]
    number = {concept: place for place, concept in enumerate(dict.fromkeys(concept for concept, _ in rows))}
    return {
        normalise(prefix.rstrip("$")).strip() + ("$" if prefix.endswith("$") else ""): number[concept]
        for concept, prefix in rows
    }


def split_windows(size: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return the starts and ends of the windows over a text of `size` characters."""
    starts, stops = [], []
    for width, stride in zip(WIDTHS, STRIDES, strict=True):
        begins = np.arange(0, max(1, size - width + stride), stride)
        begins = np.minimum(begins, max(0, size - width))
        starts.append(begins)
        stops.append(np.minimum(begins + width, size))
    return np.concatenate(starts), np.concatenate(stops)


def _find_words(codes: Uints) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return the starts and ends of words: runs of letters and digits of any script."""
    inside = ((codes >= 97) & (codes <= 122)) | ((codes >= 48) & (codes <= 57)) | (codes >= 0xC0)
    edges = np.diff(np.concatenate(([False], inside, [False])).astype(np.int8))
    return np.flatnonzero(edges == 1), np.flatnonzero(edges == -1)


def _powers(size: int) -> tuple[Uints, Uints]:
    """Return BASE**0 … BASE**size modulo 2**64, and their inverses, which make hashes position-free."""
    known = 1 << max(10, size.bit_length())
    powers, inverses = _power_tables(known)
    return powers[: size + 1], inverses[: size + 1]


@cache
def _power_tables(size: int) -> tuple[Uints, Uints]:
    def table(base: int) -> Uints:
        factors = np.full(size + 1, base, dtype=np.uint64)
        factors[0] = 1
        powers: Uints = np.multiply.accumulate(factors)
        return powers

    return table(BASE), table(pow(BASE, -1, 1 << 64))


def _mix(values: Uints) -> Uints:
    """Spread the bits (the finaliser of MurmurHash3)."""
    values = (values ^ (values >> np.uint64(33))) * np.uint64(0xFF51AFD7ED558CCD)
    values = (values ^ (values >> np.uint64(33))) * np.uint64(0xC4CEB9FE1A85EC53)
    mixed: Uints = values ^ (values >> np.uint64(33))
    return mixed


def save_classifier(path: Path, model: TextClassifier) -> None:
    """Write a classifier, its weights quantised to 8 bits."""
    scale = float(np.abs(model.weights).max()) / 127
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(
            file,
            weights=np.round(model.weights / scale).astype(np.int8),
            numbers=np.array([scale, model.bias, model.threshold], dtype=np.float64),
        )


def load_classifier(path: Path) -> TextClassifier:
    """Read a classifier that `save_classifier` wrote."""
    with np.load(path, allow_pickle=False) as stored:
        scale, bias, threshold = (float(number) for number in stored["numbers"])
        return TextClassifier(stored["weights"].astype(np.float32) * np.float32(scale), bias, threshold)
