"""SentencePiece's BPE in a GGUF file: tokens with scores in place of merges.

llama.cpp joins, again and again, the two neighbours that together are the token with the highest score; of
equal ones the leftmost. A tokenizer.json that was made of SentencePiece's file lists merges: for each token
all pairs of tokens that make it, the tokens in the order of their scores. So their order gives scores back.
What is SentencePiece: Kudo and Richardson 2018, https://arxiv.org/abs/1808.06226.
"""

from __future__ import annotations

import heapq
import itertools
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

from stages.common.errors import InputError

SPACE = "▁"
_BLANK = {"String": " "}
_REPLACE = {"type": "Replace", "pattern": _BLANK, "content": SPACE}
_PREPEND = {"type": "Prepend", "prepend": SPACE}
# Gemma's: it splits nothing, as no blank is left.
_SPLIT = {"type": "Split", "pattern": _BLANK, "behavior": "MergedWithPrevious", "invert": False}


def is_byte(token: str) -> bool:
    """Return whether a token stands for a byte: `<0x0A>`."""
    return re.fullmatch(r"<0x[0-9A-F]{2}>", token) is not None


def find_space_prefix(normalizers: Sequence[Mapping[str, Any]], steps: Sequence[Mapping[str, Any]]) -> bool:
    """Return whether a blank is put before each stretch of text between control tokens.

    Args:
        normalizers, steps: of a tokenizer.json, in order.

    Raises:
        ValueError: they do what llama.cpp does not.
    """
    normal, split = list(normalizers), list(steps)
    if normal in ([_PREPEND, _REPLACE], [_REPLACE]) and split in ([], [_SPLIT]):
        return _PREPEND in normal
    # `first` is the beginning of a conversation; templates begin it with a control token, and not with text.
    for scheme in ("first", "never"):
        step = {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": scheme, "split": False}
        if not normal and split == [step]:
            return False
    raise ValueError(f"normalizers {normal}, pre-tokenizers {list(steps)}")


def read_scores(
    tokens: Mapping[str, int], merges: Sequence[tuple[str, str]], added: Collection[str]
) -> dict[str, float]:
    """Return the score of each token that merges make: 0 for the first, less for those after it.

    Runs of one character have one score together, as Llama 2 has for runs of blanks: its merges are sorted so
    that the leftmost run grows first, which is what llama.cpp does with equal scores.

    Args:
        added: tokens that are cut out of a text before any merge.

    Raises:
        ValueError: no scores give these merges.
    """
    lefts: dict[str, set[int]] = {}
    ends: dict[str, int] = {}
    for place, (left, right) in enumerate(merges):
        lefts.setdefault(left + right, set()).add(len(left))
        ends[left + right] = place
    merged = tokens.keys() - set(added)
    for token in merged:
        # An added token is no part of another: it is cut out first, and converters may leave out its merges.
        needed = {end for end in range(1, len(token)) if token[:end] in merged and token[end:] in merged}
        if not is_byte(token) and not needed <= lefts.get(token, set()):
            raise ValueError(f"the merges lack a pair that makes {token!r}")
    scores: dict[str, float] = {}
    score, until, first = 0.0, -1, ""
    for place, (left, right) in enumerate(merges):
        token = left + right
        if place > until:  # no token before this one has a merge after it
            score, first = -float(place), token
        elif token != first and len({*token, *first}) > 1:
            raise ValueError(f"the merges of {first!r} and {token!r} are mixed")
        scores[token] = score
        until = max(until, ends[token])
    return scores


def build_encoder(
    tokens: Sequence[str], scores: Sequence[float], marks: Collection[str], space_prefix: bool
) -> Callable[[str], list[int]]:
    """Return a function that gives a text the ids that llama.cpp gives it.

    Args:
        tokens, scores: by id.
        marks: tokens that are cut out of the text first.
    """
    ids = {token: number for number, token in enumerate(tokens)}
    cut = re.compile("|".join(re.escape(mark) for mark in sorted(marks, key=len, reverse=True)) or r"(?!)")

    def encode(text: str) -> list[int]:
        found: list[int] = []
        for stretch, mark in _cut(cut, text):
            if stretch:
                joined = _join((" " if space_prefix else "") + stretch, ids, scores)
                found += itertools.chain.from_iterable(_find_ids(part, ids) for part in joined)
            if mark:
                found.append(ids[mark])
        return found

    return encode


def _cut(cut: re.Pattern[str], text: str) -> Iterator[tuple[str, str]]:
    """Yield stretches of a text, each with the mark that ends it; the last has none."""
    start = 0
    for match in cut.finditer(text):
        yield text[start : match.start()], match[0]
        start = match.end()
    yield text[start:], ""


def _join(text: str, ids: Mapping[str, int], scores: Sequence[float]) -> list[str]:
    """Return the parts of a text once no two neighbours make a token."""
    parts = list(text.replace(" ", SPACE))
    after = [*range(1, len(parts)), -1]
    before = [*range(-1, len(parts) - 1)]
    waiting: list[tuple[float, int, int, str]] = []

    def offer(left: int, right: int) -> None:
        if left >= 0 and right >= 0 and (joined := parts[left] + parts[right]) in ids:
            heapq.heappush(waiting, (-scores[ids[joined]], left, right, joined))

    for left, right in enumerate(after):
        offer(left, right)
    while waiting:
        _, left, right, joined = heapq.heappop(waiting)
        if after[left] != right or not parts[left] or parts[left] + parts[right] != joined:
            continue  # one of them is part of a longer token by now
        parts[left], parts[right] = joined, ""
        after[left] = after[right]
        if after[left] >= 0:
            before[after[left]] = left
        offer(before[left], left)
        offer(left, after[left])
    return [part for part in parts if part]


def _find_ids(part: str, ids: Mapping[str, int]) -> list[int]:
    """Return the id of a part, or those of its bytes."""
    return [ids[part]] if part in ids else [ids[f"<0x{byte:02X}>"] for byte in part.encode()]


def explain(error: ValueError, fix: str) -> InputError:
    """Return the refusal of a tokenizer that llama.cpp would cut in another way."""
    return InputError(f"llama.cpp has no equal of the base model's SentencePiece tokenizer: {error}", fix)
