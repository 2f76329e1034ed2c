"""A small linear model of text: hashed n-grams of characters, words and concepts; numpy alone.

Concepts (`guard_data/concepts.csv`: "ignore", "vergiss" and "bypass" are one) carry what was learned from
one wording to others.

A text is scored in windows, at two widths, and gets the score of its worst one: an attack hidden in a long
document is not diluted by it. All work is linear in the text's length.
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

BUCKETS = 1 << 16
CHAR_ORDERS = (4, 6)  # 3 says little, and 5 lies between
WIDTHS = (80, 240)  # characters: a sentence, a paragraph
# Of its width: every sentence stands whole in some window, or nearly.
STRIDES = (20, 60)
BASE = 0x9E3779B97F4A7C15  # odd, so that it has an inverse modulo 2**64

Uints = npt.NDArray[np.uint64]
Floats = npt.NDArray[np.float32]

# Letters of other scripts that look Latin: an attacker swaps one to break a word, so all become Latin,
# also where they are honest. The model never shows its text to anybody.
LOOKALIKES = str.maketrans(
    dict(zip("аеорсухіјѕһԁԛԝαεορτυνικχ", "aeopcyxijshdqwaeoptuvikx", strict=True))
    | dict.fromkeys("“”„«»", '"')
    | dict.fromkeys("‘’‚`´", "'")
    | dict.fromkeys("–—−", "-")
)
# Tag characters, which nothing shows, to the ASCII that they stand for.
UNHIDDEN = {0xE0000 + code: code for code in range(0x20, 0x7F)}
LEET = str.maketrans("013457@$!", "oieastasi")
LEET_WORD = re.compile(r"[a-z0-9@$!]+")
SPACED = re.compile(r"(?<!\w)(?:\w[ ._*-]){3,}\w(?!\w)")
WORD = re.compile(r"[^\W_]+")
CONCEPTS = Path(__file__).parent / "data" / "concepts.csv"
MAX_PREFIX = 8
NEAR_CONCEPTS = 4  # a concept is paired with as many that follow it
NEAR_CHARS = 70
SPACES = re.compile(r"\s+")


@dataclass(frozen=True, slots=True)
class TextModel:
    """The weights of all n-grams, and the score above which a text is taken for what the model looks for."""

    weights: Floats
    bias: float
    threshold: float

    def score(self, text: str) -> float:
        """Return the score of the text's worst window; any real number."""
        return float(self.window_scores(normalise(text)).max())

    def window_scores(self, normalised: str) -> Floats:
        """Return the scores of all windows of a normalised text."""
        buckets, ends = features(normalised)
        size = max(1, len(normalised))
        totals = np.concatenate(([0.0], np.bincount(ends, self.weights[buckets], size).cumsum()))
        counts = np.concatenate(([0], np.bincount(ends, minlength=size).cumsum()))
        starts, stops = windows(size)
        number = np.maximum(1, counts[stops] - counts[starts])
        scores: Floats = ((totals[stops] - totals[starts]) / np.sqrt(number) + self.bias).astype(np.float32)
        return scores


def normalise(text: str) -> str:
    """Return the text as the model reads it: one alphabet, one case, no accents, no disguise.

    NFKC folds full-width and styled letters. What is invisible goes (zero-width, soft hyphens, bidirectional
    marks), tag characters (U+E0000) become the ASCII that they smuggle.
    """
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text.translate(UNHIDDEN))
        text = unicodedata.normalize("NFD", text).translate(LOOKALIKES)
        text = "".join(c for c in text if unicodedata.category(c) not in ("Mn", "Cf"))
        text = unicodedata.normalize("NFC", text)
    text = text.casefold().translate(LOOKALIKES)
    text = LEET_WORD.sub(_plain_letters, text)
    text = SPACED.sub(lambda match: re.sub(r"[ ._*-]", "", match.group()), text)
    return f" {SPACES.sub(' ', text).strip()} "


def _plain_letters(match: re.Match[str]) -> str:
    """Undo leetspeak in a word that has letters; a number stays a number, and final marks stay marks."""
    word = match.group()
    body = word.rstrip("!")
    if body.isalpha() or not any("a" <= c <= "z" for c in body):
        return word
    return body.translate(LEET) + word[len(body) :]


def features(normalised: str) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return the buckets of all n-grams of a normalised text, and the position where each ends."""
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
    starts, stops = _words(codes)
    words = _mix((sums[stops] - sums[starts]) * inverses[starts])
    hashes.append(_mix(words ^ np.uint64(0xA5)))
    ends.append(stops - 1)
    for gap in (
        1,
        2,
    ):  # neighbours, and words with one between them: "ignore previous", "ignore all previous"
        if words.size > gap:
            hashes.append(_mix(words[:-gap] * np.uint64(31) + words[gap:] + np.uint64(gap)))
            ends.append(stops[gap:] - 1)
    concepts, places = concept_pairs(normalised)
    hashes.append(_mix(np.array(concepts, dtype=np.uint64) + np.uint64(0xC0FFEE)))
    ends.append(np.array(places, dtype=np.int64))
    return (np.concatenate(hashes) >> np.uint64(48)).astype(np.int64), np.concatenate(ends)


def concept_pairs(normalised: str) -> tuple[list[int], list[int]]:
    """Return the concepts of a normalised text, and those that follow another closely, as numbers.

    Each comes with the place of its (last) word.
    """
    lexicon = _lexicon()
    found: list[tuple[int, int]] = []
    numbers, places = [], []
    for match in WORD.finditer(normalised):
        concept = _concept(match.group(), lexicon)
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


def _concept(word: str, lexicon: dict[str, int]) -> int | None:
    """Return the number of the word's concept: of the word itself, or else of its longest known prefix."""
    if (whole := lexicon.get(word + "$")) is not None:
        return whole
    for length in range(min(MAX_PREFIX, len(word)), 2, -1):
        if (concept := lexicon.get(word[:length])) is not None:
            return concept
    return None


@cache
def _lexicon() -> dict[str, int]:
    """Return the number of the concept of every prefix; a prefix with `$` is a whole word."""
    with CONCEPTS.open(encoding="utf-8", newline="") as file:
        rows = [(row["concept"], row["prefix"]) for row in csv.DictReader(file)]
    number = {concept: place for place, concept in enumerate(dict.fromkeys(concept for concept, _ in rows))}
    return {
        normalise(prefix.rstrip("$")).strip() + ("$" if prefix.endswith("$") else ""): number[concept]
        for concept, prefix in rows
    }


def windows(size: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return where the windows of a text of `size` characters start and stop; the last ones end with it."""
    starts, stops = [], []
    for width, stride in zip(WIDTHS, STRIDES, strict=True):
        begins = np.arange(0, max(1, size - width + stride), stride)
        begins = np.minimum(begins, max(0, size - width))
        starts.append(begins)
        stops.append(np.minimum(begins + width, size))
    return np.concatenate(starts), np.concatenate(stops)


def _words(codes: Uints) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return where words start and stop: runs of letters and digits of any script."""
    inside = ((codes >= 97) & (codes <= 122)) | ((codes >= 48) & (codes <= 57)) | (codes >= 0xC0)
    edges = np.diff(np.concatenate(([False], inside, [False])).astype(np.int8))
    return np.flatnonzero(edges == 1), np.flatnonzero(edges == -1)


def _powers(size: int) -> tuple[Uints, Uints]:
    """Return BASE**0 … BASE**size modulo 2**64, and their inverses: a gram's hash is free of its place."""
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


def save(path: Path, model: TextModel) -> None:
    """Write a model, its weights rounded to 8 bits: the largest gets 127."""
    scale = float(np.abs(model.weights).max()) / 127
    from stages.common.artifacts import atomic_write

    with atomic_write(path) as beside, beside.open("wb") as file:
        np.savez_compressed(
            file,
            weights=np.round(model.weights / scale).astype(np.int8),
            numbers=np.array([scale, model.bias, model.threshold], dtype=np.float64),
        )


def load(path: Path) -> TextModel:
    """Read a model that `save` wrote."""
    with np.load(path, allow_pickle=False) as stored:
        scale, bias, threshold = (float(number) for number in stored["numbers"])
        return TextModel(stored["weights"].astype(np.float32) * np.float32(scale), bias, threshold)
