"""The tokenizer in a GGUF file: a list of tokens, merges or scores, and the name of a pre-tokenizer.

llama.cpp has its pre-tokenizers built in, and a GGUF file contains only the name of one. A wrong name loads
and answers without an error, with other tokens than the model was trained on. So the name is derived from the
tokenizer's own pre-tokenizer, never from the name of the model, and the written file is read and compared.
Byte-level BPE has merges; SentencePiece's BPE has scores (`stages.common.gguf.sentencepiece`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.common.chat.template import end_of_turn_ids, write_served_template
from stages.common.errors import InputError
from stages.common.gguf import sentencepiece
from stages.common.gguf.trimming import list_merges

if TYPE_CHECKING:
    from gguf import GGUFReader, GGUFWriter

FIX = (
    "set export.gguf: false to serve base model and adapter with the transformers or vLLM engine, "
    "or choose a base model that GGUF supports"
)

# As in tokenizer.json; PRE_TOKENIZERS has their names in llama.cpp.
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_PUNCTUATION_AND_SPACE = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
ONE_DIGIT = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _PUNCTUATION_AND_SPACE
THREE_DIGITS = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _PUNCTUATION_AND_SPACE
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
BY_CASE = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True, slots=True)
class PreTokenizer:
    """How text is split before the merges.

    Attributes:
        pre: its name in llama.cpp.
        steps: in order: `words` is GPT-2's split into words and bytes, `bytes` the bytes alone, `digits`
            splits digits one by one, and anything else is a regular expression.
        ignore_merges: whether a word that is a token is never split, regardless of the merges.
    """

    pre: str
    steps: tuple[str, ...]
    ignore_merges: bool = False


PRE_TOKENIZERS = (
    PreTokenizer("gpt-2", ("words",)),
    PreTokenizer("smollm", ("digits", "words")),
    PreTokenizer("qwen2", (ONE_DIGIT, "bytes")),
    PreTokenizer("smaug-bpe", (THREE_DIGITS, "bytes")),
    PreTokenizer("llama-bpe", (THREE_DIGITS, "bytes"), ignore_merges=True),
    PreTokenizer("tekken", (BY_CASE, "bytes"), ignore_merges=True),
)


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The tokenizer in a GGUF file.

    Attributes:
        pre: the pre-tokenizer of byte-level BPE, or `SENTENCEPIECE`.
        tokens: by id, one for each row of the embedding.
        types: of each token, as `gguf.TokenType`.
        merges: pairs of tokens with a space between, in the order in which they are merged.
        scores: of each token of SentencePiece, which has no merges.
        space_prefix: whether a blank is put before each stretch of text between control tokens.
        ends: ids that end an answer: the end of turn first, then others.
    """

    pre: str
    tokens: tuple[str, ...]
    types: tuple[int, ...]
    merges: tuple[str, ...]
    scores: tuple[float, ...]
    space_prefix: bool
    ends: tuple[int, ...]
    bos: int | None
    pad: int | None
    unknown: int | None
    chat_template: str


SENTENCEPIECE = "default"  # llama.cpp has one pre-tokenizer for it


def read_vocabulary(tokenizer: Any, size: int) -> Vocabulary:
    """Return the vocabulary of a loaded tokenizer, padded to `size` tokens, the rows of the embedding.

    Raises:
        InputError: GGUF or llama.cpp does not support this tokenizer.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise InputError("the base model's tokenizer is not a fast one (tokenizer.json)", FIX)
    described = json.loads(backend.to_str())
    pre, space_prefix = _find_splitting(described)
    # Of two names of one id that of the byte, which llama.cpp looks for.
    names = sorted(tokenizer.get_vocab().items(), key=lambda item: sentencepiece.is_byte(item[0]))
    by_id = {index: token for token, index in names}
    if max(by_id) >= size:
        raise InputError(
            f"the tokenizer has the token id {max(by_id)}, and the model's embedding {size} rows", FIX
        )
    if not described["model"]["merges"]:
        raise InputError("the base model's tokenizer has no merges, which llama.cpp requires", FIX)
    tokens = tuple(by_id.get(index, f"[PAD{index}]") for index in range(size))
    merges = list_merges(described)
    ends = end_of_turn_ids(tokenizer)
    return Vocabulary(
        pre=pre,
        tokens=tokens,
        types=tuple(_list_types(described, [index in by_id for index in range(size)], tokens)),
        merges=() if pre == SENTENCEPIECE else tuple(" ".join(merge) for merge in merges),
        scores=tuple(_list_scores(described, merges, tokens)) if pre == SENTENCEPIECE else (),
        space_prefix=space_prefix,
        # llama.cpp's page and Ollama show the first as the model's end: the tokenizer's own, if there is one.
        ends=tuple(sorted(ends, key=lambda end: end != tokenizer.eos_token_id)),
        bos=tokenizer.bos_token_id,
        pad=tokenizer.pad_token_id,
        unknown=tokenizer.unk_token_id if pre == SENTENCEPIECE else None,
        chat_template=write_served_template(tokenizer),
    )


def _find_splitting(described: dict[str, Any]) -> tuple[str, bool]:
    """Return the name of a tokenizer's pre-tokenizer, and whether blanks are put before stretches of text."""
    model = described["model"]
    if model.get("type") != "BPE" or not model.get("byte_fallback"):
        return find_pre_tokenizer(described).pre, False
    steps = (
        _flat(described.get(part), key)
        for part, key in (("normalizer", "normalizers"), ("pre_tokenizer", "pretokenizers"))
    )
    try:
        if model.get("ignore_merges"):
            raise ValueError("ignore_merges is true")
        return SENTENCEPIECE, sentencepiece.find_space_prefix(*steps)
    except ValueError as error:
        raise sentencepiece.explain(error, FIX) from None


def _list_types(described: dict[str, Any], used: list[bool], tokens: tuple[str, ...]) -> Iterator[int]:
    """Yield the type of each token, as `gguf.TokenType`."""
    from gguf import TokenType

    model = described["model"]
    special = {token["id"]: token["special"] for token in described["added_tokens"]}
    for index, token in enumerate(tokens):
        if not used[index]:
            yield int(TokenType.UNUSED)
        elif model.get("byte_fallback") and token == model.get("unk_token"):
            yield int(TokenType.UNKNOWN)
        elif index in special:
            yield int(TokenType.CONTROL if special[index] else TokenType.USER_DEFINED)
        elif model.get("byte_fallback") and sentencepiece.is_byte(token):
            yield int(TokenType.BYTE)
        else:
            yield int(TokenType.NORMAL)


def _list_scores(
    described: dict[str, Any], merges: list[tuple[str, str]], tokens: tuple[str, ...]
) -> Iterator[float]:
    """Yield the score of each token of SentencePiece; of one that no merge makes, the lowest."""
    added = [token["content"] for token in described["added_tokens"]]
    try:
        scores = sentencepiece.read_scores(described["model"]["vocab"], merges, added)
    except ValueError as error:
        raise sentencepiece.explain(error, FIX) from None
    return (scores.get(token, -float(len(tokens) + len(merges))) for token in tokens)


def find_pre_tokenizer(described: dict[str, Any]) -> PreTokenizer:
    """Return the pre-tokenizer of llama.cpp that splits text as the tokenizer.json of a byte-level BPE does.

    Raises:
        InputError: it is not BPE, or llama.cpp has no equal pre-tokenizer.
    """
    model = described["model"]
    if model.get("type") != "BPE":
        raise InputError(f"the base model's tokenizer is {model.get('type')}, not BPE", FIX)
    for key in ("continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise InputError(f"the base model's tokenizer has the {key} {model[key]!r}", FIX)
    unequal = [n["type"] for n in _flat(described.get("normalizer"), "normalizers") if n["type"] != "NFC"]
    if unequal:
        raise InputError(
            f"the base model's tokenizer changes its text ({', '.join(unequal)}), as llama.cpp cannot", FIX
        )
    steps = tuple(_step(part) for part in _flat(described.get("pre_tokenizer"), "pretokenizers"))
    ignore_merges = bool(model.get("ignore_merges"))
    for pre_tokenizer in PRE_TOKENIZERS:
        if pre_tokenizer.steps == steps and pre_tokenizer.ignore_merges == ignore_merges:
            return pre_tokenizer
    raise InputError(
        f"the base model's pre-tokenizer has no known equivalent in llama.cpp: {steps}, "
        f"ignore_merges {ignore_merges}",
        FIX,
    )


def _flat(part: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    if part is None:
        return []
    return [inner for p in part[key] for inner in _flat(p, key)] if part["type"] == "Sequence" else [part]


def _step(part: dict[str, Any]) -> str:
    """Return the step for one part of a tokenizer.json's pre-tokenizer, or its JSON if there is none."""
    if part["type"] == "ByteLevel" and not part["add_prefix_space"]:
        return "words" if part["use_regex"] else "bytes"
    if part["type"] == "Digits" and part["individual_digits"]:
        return "digits"
    if part["type"] == "Split" and part["behavior"] == "Isolated" and not part["invert"]:
        return str(part["pattern"].get("Regex", part))
    return json.dumps(part, sort_keys=True)


def add_vocabulary(writer: GGUFWriter, vocabulary: Vocabulary) -> None:
    """Write the vocabulary into the metadata of a GGUF file."""
    # GGUF's words for any byte-level BPE, and for any BPE of SentencePiece.
    writer.add_tokenizer_model("llama" if vocabulary.pre == SENTENCEPIECE else "gpt2")
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(list(vocabulary.tokens))
    writer.add_token_types(list(vocabulary.types))
    if vocabulary.pre == SENTENCEPIECE:
        writer.add_token_scores(list(vocabulary.scores))
        writer.add_add_space_prefix(vocabulary.space_prefix)
    else:
        writer.add_token_merges(list(vocabulary.merges))
    if vocabulary.unknown is not None:
        writer.add_unk_token_id(vocabulary.unknown)
    if vocabulary.bos is not None:
        writer.add_bos_token_id(vocabulary.bos)
    if vocabulary.pad is not None:
        writer.add_pad_token_id(vocabulary.pad)
    writer.add_eos_token_id(vocabulary.ends[0])
    if len(vocabulary.ends) > 1:
        writer.add_eot_token_id(vocabulary.ends[1])
    # The model was trained on text as its chat template renders it, with nothing before it.
    writer.add_add_bos_token(False)
    writer.add_chat_template(vocabulary.chat_template)


def read_gguf_vocabulary(reader: GGUFReader) -> Vocabulary:
    """Return the vocabulary of a GGUF file."""

    def value(key: str) -> Any:
        field = reader.fields.get(f"tokenizer.{key}")
        return None if field is None else field.contents()

    ends = (value("ggml.eos_token_id"), value("ggml.eot_token_id"))
    return Vocabulary(
        pre=value("ggml.pre"),
        tokens=tuple(value("ggml.tokens")),
        types=tuple(value("ggml.token_type")),
        merges=tuple(value("ggml.merges") or ()),
        scores=tuple(value("ggml.scores") or ()),
        space_prefix=bool(value("ggml.add_space_prefix")),
        ends=tuple(end for end in ends if end is not None),
        bos=value("ggml.bos_token_id"),
        pad=value("ggml.padding_token_id"),
        unknown=value("ggml.unknown_token_id"),
        chat_template=value("chat_template"),
    )


def build_encoder(vocabulary: Vocabulary) -> Callable[[str], list[int]]:
    """Return a function that gives a text its token ids from the vocabulary alone, as llama.cpp does."""
    from gguf import TokenType
    from tokenizers import AddedToken, Tokenizer, models

    marks = {
        token: kind == TokenType.CONTROL
        for token, kind in zip(vocabulary.tokens, vocabulary.types, strict=True)
        if kind in (TokenType.CONTROL, TokenType.USER_DEFINED, TokenType.UNKNOWN)
    }
    if vocabulary.pre == SENTENCEPIECE:
        tokens, scores = vocabulary.tokens, vocabulary.scores
        return sentencepiece.build_encoder(tokens, scores, marks, vocabulary.space_prefix)
    pre_tokenizer = next(
        pre_tokenizer for pre_tokenizer in PRE_TOKENIZERS if pre_tokenizer.pre == vocabulary.pre
    )
    ids = {token: index for index, token in enumerate(vocabulary.tokens)}
    pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in vocabulary.merges)]
    built = Tokenizer(models.BPE(vocab=ids, merges=pairs, ignore_merges=pre_tokenizer.ignore_merges))
    built.pre_tokenizer = _build_pre_tokenizer(pre_tokenizer)
    built.add_tokens([AddedToken(mark, normalized=False, special=control) for mark, control in marks.items()])
    return lambda text: list(built.encode(text, add_special_tokens=False).ids)


def _build_pre_tokenizer(pre_tokenizer: PreTokenizer) -> Any:
    from tokenizers import Regex, pre_tokenizers

    parts: list[Any] = []
    for step in pre_tokenizer.steps:
        if step in ("words", "bytes"):
            parts.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=step == "words"))
        elif step == "digits":
            parts.append(pre_tokenizers.Digits(individual_digits=True))
        else:
            parts.append(pre_tokenizers.Split(Regex(step), "isolated"))
    return pre_tokenizers.Sequence(parts)


def count_equal(vocabulary: Vocabulary, tokenizer: Any, texts: Iterable[str], file: Path) -> int:
    """Return how many texts have the same token ids in the vocabulary as in the tokenizer.

    They may differ only where a byte-level tokenizer normalizes the text first (NFC), as llama.cpp does not.

    Raises:
        InputError: the ids of any other text differ; the message has the first such text.
    """
    encode = build_encoder(vocabulary)
    normalizer = None if vocabulary.pre == SENTENCEPIECE else tokenizer.backend_tokenizer.normalizer
    equal = 0
    for text in texts:
        ours = encode(text)
        theirs = tokenizer(text, add_special_tokens=False)["input_ids"]
        if ours == theirs:
            equal += 1
        elif normalizer is None or normalizer.normalize_str(text) == text:
            raise InputError(f"{file} gives {text[:80]!r} other tokens than the base model's", FIX)
    return equal
