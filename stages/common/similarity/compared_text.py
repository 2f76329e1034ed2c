"""The part of a prompt that is compared with other prompts: without spelling, and without what many share.

Two prompts that a reader takes for one must be one text here: invisible characters, case, width, runs of
space and punctuation are excluded, and letters of other alphabets that look Latin are Latin. An instruction
that many prompts repeat is excluded, too: it would make all of them look alike. None of this changes a row.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from math import ceil

from stages.common.records import Row
from stages.common.task.text_metrics import is_unspaced

# Unicode's Default_Ignorable_Code_Point (zero-width, direction, soft hyphen, tags), and what else
# shows nothing: signs around annotations or in place of an object, the blank of Braille, private use.
IGNORABLE = (
    "\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e\u2060-\u206f\u3164"
    "\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufff8\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff"
    "\ufff9-\ufffc\u2800\ue000-\uf8ff"
)
INVISIBLE = re.compile(f"[{IGNORABLE}\\x00-\\x08\\x0e-\\x1b\\x7f-\\x84\\x86-\\x9f]")
# Vowel signs of Arabic and Hebrew, which most people leave out, and the stroke that lengthens Arabic.
OPTIONAL_MARKS = re.compile("[\u0640\u064b-\u0652\u0670\u0591-\u05bd\u05bf\u05c1\u05c2\u05c4\u05c5\u05c7]")
APOSTROPHES = "'’‘`´ʼ＇"
# Letters of Cyrillic, Greek and phonetic script, and the Latin ones that they look like: those of Unicode's
# confusables.txt (UTS #39, "Unicode Security Mechanisms") that are single letters, but not two of one
# alphabet for one Latin letter (σ and ο), which would make two words one. In any text, small letters:
LIKE_LATIN = str.maketrans("агеорсухѕіјѵһԁԛԝѡαγινορυϳɑɡ", "areopcyxsijvhdqwwayivopujag")
# Capitals whose small letters look different (Т and т), in texts that are Latin otherwise:
CAPITALS_LIKE_LATIN = str.maketrans("ВЕКМНОРСТХԌԜΒΕΖΗΚΜΝΡΤΥΧ", "BEKMHOPCTXGWBEZHKMNPTYX")
_CAPITALS = re.compile(f"[{''.join(map(chr, CAPITALS_LIKE_LATIN))}]")
_LATIN = re.compile("[A-Za-z]")
_NOT_LATIN = re.compile(f"[^\\W\\d_A-Za-z\u00aa-\u024f{''.join(map(chr, LIKE_LATIN | CAPITALS_LIKE_LATIN))}]")
OPERATORS = "#%&*/@\\_"  # punctuation for Unicode, but "2*3" and "2/3" are two questions

MAX_PROMPTS_READ = 10_000  # to find what many share: a share of a tenth is known to a hundredth
MAX_EDGE_CHARS = 4000  # of a prompt, in which one round looks for a shared beginning or end
MAX_ROUNDS = 20
MIN_SHARING_PROMPTS = 20
MIN_SHARE = 0.1  # of the prompts; a passage with its questions has less in all but the smallest data sets
MIN_CHARS = 60  # of a beginning or end; a shorter one is how questions begin, unless
MIN_SHARE_OF_SHORT = 0.5  # of the prompts have it, and it has
MIN_CHARS_OF_SHORT = 20


@cache
def _punctuation() -> re.Pattern[str]:
    """Return the pattern of punctuation that is no part of a number: "1.5", "12:30", "-5" keep theirs."""
    signs = (chr(code) for code in range(0x20000))
    found = "".join(c for c in signs if unicodedata.category(c)[0] == "P" and c not in OPERATORS)
    return re.compile(f"[{re.escape(found)}](?!\\d)")


@cache
def _signs() -> dict[int, str | None]:
    """Return what each apostrophe and each letter that looks Latin becomes, also under an accent."""
    signs: dict[int, str | None] = {code: chr(latin) for code, latin in LIKE_LATIN.items()}
    for code in (*range(0x370, 0x530), *range(0x1F00, 0x2000)):
        letter, *accents = list(unicodedata.normalize("NFD", chr(code)))
        if accents and ord(letter) in LIKE_LATIN:
            signs[code] = unicodedata.normalize("NFC", chr(LIKE_LATIN[ord(letter)]) + "".join(accents))
    return signs | dict.fromkeys(map(ord, APOSTROPHES))


def _write_latin_capitals(text: str) -> str:
    """Return a text that is mostly Latin with the capitals in Latin that look so.

    In Cyrillic and Greek texts they stay: there, Т is the capital of т, which looks like no Latin letter.
    """
    if not _CAPITALS.search(text) or len(_LATIN.findall(text)) <= len(_NOT_LATIN.findall(text)):
        return text
    return text.translate(CAPITALS_LIKE_LATIN)


# The same for ASCII, as bytes: most rows are, and a table is ten times as fast as a pattern.
_ASCII = "".join(map(chr, range(128)))
_ASCII_PUNCTUATION = "".join(c for c in string.punctuation if unicodedata.category(c)[0] == "P")
_ASCII_SIGNS = "".join(c for c in _ASCII_PUNCTUATION if c not in OPERATORS + APOSTROPHES)
_ASCII_INVISIBLE = "".join(filter(INVISIBLE.match, _ASCII)).encode()
_ASCII_LEFT_OUT = _ASCII_INVISIBLE + "".join(c for c in APOSTROPHES if c.isascii()).encode()
_ASCII_WORDS = bytes.maketrans(_ASCII_SIGNS.encode(), b" " * len(_ASCII_SIGNS))
_ASCII_NUMBER = re.compile(rb"[%b]\d" % re.escape(_ASCII_SIGNS.encode()))


def _fold_ascii(text: str) -> str | None:
    """Return the words of an ASCII text in small letters; None if it has signs before digits, or no word."""
    left = text.encode().translate(None, _ASCII_LEFT_OUT)
    if _ASCII_NUMBER.search(left):
        return None
    return " ".join(left.translate(_ASCII_WORDS).decode().lower().split()) or None


def fold_text(text: str) -> str:
    """Return a text as it is compared: two texts that a reader takes for one have one such form."""
    if text.isascii() and (words := _fold_ascii(text)):
        return words
    if not text.isascii():
        text = OPTIONAL_MARKS.sub("", unicodedata.normalize("NFKC", text))
        text = _write_latin_capitals(text)
    visible = fold_spelling(text)
    latin = unicodedata.normalize("NFC", visible.translate(_signs()))
    words = " ".join(_punctuation().sub(" ", latin).split())
    return words or visible  # ":-)" and "?!" are two texts


def fold_spelling(text: str) -> str:
    """Return a text in NFC and small letters, without invisible characters, each run of space one blank."""
    if text.isascii():
        return " ".join(text.encode().translate(None, _ASCII_INVISIBLE).decode().lower().split())
    text = unicodedata.normalize("NFC", text.casefold())
    return " ".join(INVISIBLE.sub("", text).split())


def has_visible(text: str) -> bool:
    """Return whether a text has a character that can be seen."""
    first = text[:1]
    if first.isascii() and first.isprintable() and not first.isspace():
        return bool(first)
    return bool(INVISIBLE.sub("", text).strip())


def fold_prompt(row: Row) -> str:
    """Return what is compared of a row: the turns before the answer but the system's, line by line."""
    turns = (message.answer for message in row.prompt if message.role != "system")
    return "\n".join(line for turn in turns for part in turn.splitlines() if (line := fold_text(part)))


@dataclass(frozen=True, slots=True)
class SharedParts:
    """What many of a set of prompts have in common, as `fold_prompt` writes it.

    Attributes:
        beginnings, ends: shared first and last characters, in the order in which they are cut off.
        lines: hashes of shared lines; the texts may be as long as passages.
    """

    beginnings: tuple[str, ...] = ()
    ends: tuple[str, ...] = ()
    lines: frozenset[int] = field(default_factory=frozenset)

    def strip(self, prompt: str) -> str:
        """Return the own part of a folded prompt, in one line; a prompt that has none is kept whole."""
        own = prompt
        for beginning in self.beginnings:
            own = own.removeprefix(beginning)
        for end in self.ends:
            own = own.removesuffix(end)
        if self.lines:
            own = "\n".join(line for line in own.split("\n") if hash(line) not in self.lines)
        return " ".join(own.split()) or " ".join(prompt.split())

    def read(self, row: Row) -> str:
        """Return the own part of a row's prompt."""
        return self.strip(fold_prompt(row))


def find_shared_parts(rows: Sequence[Row]) -> SharedParts:
    """Return what many of the rows' prompts share: their beginning, their end, or whole lines."""
    step = max(1, ceil(len(rows) / MAX_PROMPTS_READ))
    prompts = [fold_prompt(row) for row in rows[::step]]
    least = max(MIN_SHARING_PROMPTS, ceil(MIN_SHARE * len(prompts)))
    lines = _find_lines(prompts, least)
    beginnings = _cut_repeatedly(prompts, least, str.removeprefix, _read_beginning)
    ends = _cut_repeatedly(prompts, least, str.removesuffix, _read_end)
    return SharedParts(beginnings, tuple(end[::-1] for end in ends), lines)


def _find_lines(prompts: Iterable[str], least: int) -> frozenset[int]:
    """Return the hashes of the lines of at least `least` prompts that have other lines, too."""
    counts: Counter[int] = Counter()
    for prompt in prompts:
        if "\n" in prompt:
            counts.update({hash(line) for line in prompt.split("\n")})
    return frozenset(line for line, count in counts.items() if count >= least)


def _read_beginning(prompt: str) -> str:
    return prompt[:MAX_EDGE_CHARS]


def _read_end(prompt: str) -> str:
    return prompt[: -MAX_EDGE_CHARS - 1 : -1]


def _cut_repeatedly(
    prompts: list[str], least: int, cut: Callable[[str, str], str], read: Callable[[str], str]
) -> tuple[str, ...]:
    """Return the shared edges, and cut them off in `prompts`; after one there may be another."""
    found: list[str] = []
    for _ in range(MAX_ROUNDS):
        edge = _find_shared_edge([read(prompt) for prompt in prompts], least)
        if not edge:
            break
        found.append(edge)
        prompts[:] = [cut(prompt, edge if read is _read_beginning else edge[::-1]) for prompt in prompts]
    return tuple(found)


def _find_shared_edge(texts: Sequence[str], least: int) -> str:
    """Return the beginning that most texts share, "" for none.

    In order, texts of one beginning are neighbours: the first and the last of `least` neighbours have only
    that in common which all between them have.
    """
    ordered = sorted(texts)
    best, most = "", 0
    for first in range(0, len(ordered) - least + 1, max(1, least // 4)):
        edge = _end_at_word(_common_beginning(ordered[first], ordered[first + least - 1]))
        if len(edge) < MIN_CHARS_OF_SHORT or edge == best:
            continue
        sharing = sum(text.startswith(edge) for text in texts)
        is_shared = len(edge) >= MIN_CHARS or sharing >= MIN_SHARE_OF_SHORT * len(texts)
        if is_shared and sharing > most:
            best, most = edge, sharing
    return best


def _common_beginning(left: str, right: str) -> str:
    length = next((i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), None)
    return left[: min(len(left), len(right)) if length is None else length]


def _end_at_word(text: str) -> str:
    """Return a text without the word that it may have been cut in."""
    if not text or text[-1].isspace() or is_unspaced(text[-1]):
        return text
    return text[: max(text.rfind(" "), text.rfind("\n")) + 1]
