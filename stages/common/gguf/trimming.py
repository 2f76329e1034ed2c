"""A BPE tokenizer with fewer tokens, which cuts texts of kept tokens as the whole one does.

A word is cut by merging, again and again, the pair that stands first in the list of merges. With each kept
token all tokens are kept from which it grows in that way. So a word whose tokens are kept grows by the same
merges as before; in any other word the missing merges are left out, down to its bytes.

Everything here works on the JSON of the library tokenizers (tokenizer.json).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

from stages.common.gguf.sentencepiece import is_byte

Described = Mapping[str, Any]  # a tokenizer.json
Pair = tuple[str, str]


def describe_tokenizer(tokenizer: Any) -> Described:
    """Return the tokenizer.json of a loaded tokenizer, whatever the last call left of padding and cutting."""
    described = json.loads(tokenizer.backend_tokenizer.to_str())
    return {**described, "padding": None, "truncation": None}


def choose_tokens(described: Described, used: Iterable[int], share: float) -> list[int]:
    """Return the ids of the tokens that are kept; the place of each is its id in the smaller vocabulary.

    They are those used, all added tokens, all bytes, and what the first merges make.

    Args:
        described: of a BPE that GGUF has (`read_vocabulary` refuses others).
        used: token ids; those that the tokenizer lacks are passed over.
        share: of the merges, the most frequent in the texts from which the tokenizer was made.
    """
    from tokenizers import pre_tokenizers

    model, merges = described["model"], list_merges(described)
    ids: dict[str, int] = model["vocab"]
    added = {token["content"]: token["id"] for token in described["added_tokens"]}
    wanted = set(used) | set(added.values())
    kept = {text for text, number in ids.items() if number in wanted}
    kept |= {*pre_tokenizers.ByteLevel.alphabet(), model.get("unk_token")} & ids.keys()
    kept |= {text for text in ids if model.get("byte_fallback") and is_byte(text)}
    kept |= {left + right for left, right in merges[: round(share * len(merges))]}
    ranks = {pair: rank for rank, pair in enumerate(merges)}
    grown = {part for text in kept - added.keys() for part in list_parts(text, ranks)}
    kept |= grown & ids.keys()  # a token that no merge makes may have letters that are no tokens
    # Added tokens that are no words come last: the library numbers them anew, behind the words.
    return [*sorted(ids[text] for text in kept), *sorted(added[text] for text in added.keys() - ids.keys())]


def list_merges(described: Described) -> list[Pair]:
    """Return the pairs of a tokenizer.json in the order in which they are merged."""
    pairs = (m.split(" ", 1) if isinstance(m, str) else m for m in described["model"]["merges"])
    return [(left, right) for left, right in pairs]


def list_parts(text: str, ranks: Mapping[Pair, int]) -> Iterator[str]:
    """Yield the tokens from which a token grows, from its bytes on, and itself.

    Args:
        ranks: of the merges; the lowest is merged first, and of several the one on the left.
    """
    pieces = list(text)
    yield from pieces
    while pairs := [pair for pair in pairwise(pieces) if pair in ranks]:
        left, right = min(pairs, key=ranks.__getitem__)
        place = next(n for n in range(len(pieces) - 1) if (pieces[n], pieces[n + 1]) == (left, right))
        pieces[place : place + 2] = [left + right]
        yield left + right


def trim_tokenizer(described: Described, kept: Sequence[int]) -> dict[str, Any]:
    """Return the tokenizer.json that has only these tokens, with the ids of their places."""
    places = {old: new for new, old in enumerate(kept)}
    model = described["model"]
    ids = {text: places[number] for text, number in model["vocab"].items() if number in places}
    merges = [pair for pair in list_merges(described) if {*pair, "".join(pair)} <= ids.keys()]
    return {
        **described,
        "added_tokens": [{**token, "id": places[token["id"]]} for token in described["added_tokens"]],
        "model": {**model, "vocab": ids, "merges": merges},
        "post_processor": _renumber_processor(described.get("post_processor"), places),
    }


def _renumber_processor(part: Any, places: Mapping[int, int]) -> Any:
    """Return the part of a tokenizer.json that puts tokens around a text, with their new ids."""
    if part is None:
        return None
    if part["type"] == "Sequence":
        return {**part, "processors": [_renumber_processor(one, places) for one in part["processors"]]}
    if part["type"] == "TemplateProcessing":
        tokens = {
            name: {**token, "ids": [places[number] for number in token["ids"]]}
            for name, token in part["special_tokens"].items()
        }
        return {**part, "special_tokens": tokens}
    ends = {key: [part[key][0], places[part[key][1]]] for key in ("sep", "cls") if key in part}
    return {**part, **ends}


def renumber_settings(settings: Mapping[str, Any], kept: Sequence[int]) -> dict[str, Any]:
    """Return a tokenizer_config.json with new ids; added tokens that the tokenizer lacks are left out."""
    places = {str(old): str(new) for new, old in enumerate(kept)}
    added = settings.get("added_tokens_decoder")
    if added is None:
        return dict(settings)
    numbered = {places[number]: token for number, token in added.items() if number in places}
    return {**settings, "added_tokens_decoder": numbered}
