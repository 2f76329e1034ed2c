"""The bytes of tokens, of the kinds of tokenizer that models have."""

import random

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from services.engines.token_bytes import TokenBytes
from tests.tiny import make_tokenizer

TEXTS = ["turn on the lights", "é🙂 漢字\n\t", "a 👩‍👩‍👧 b", "\x00\x7f\xa0\xad"]


def make_sentencepiece():
    """Return a tokenizer of Llama 2's kind: blanks as ▁, and bytes as <0xNN> for what it has no token for."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2}
    vocabulary |= {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    for token in ("▁", "t", "u", "r", "n", "▁t", "é"):
        vocabulary[token] = len(vocabulary)
    tokenizer = Tokenizer(
        models.BPE(vocab=vocabulary, merges=[("▁", "t")], unk_token="<unk>", byte_fallback=True)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


TOKENIZERS = {
    "bytes": make_tokenizer(),
    "merges": make_tokenizer(merges=(("Ġ", "t"), ("Ã", "©"), ("ð", "Ł"))),
    "sentencepiece": make_sentencepiece(),
}


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("text", TEXTS)
def test_the_bytes_of_the_tokens_are_the_text(kind, text):
    tokenizer = TOKENIZERS[kind]
    tokens = TokenBytes(tokenizer)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert b"".join(tokens.get_bytes(token) for token in ids) == text.encode()


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_whole_characters_are_text_and_parts_of_them_are_told_apart(kind):
    tokenizer = TOKENIZERS[kind]
    tokens = TokenBytes(tokenizer)
    ids = tokenizer("t🙂", add_special_tokens=False)["input_ids"]
    texts = [tokens.get_text(token) for token in ids]
    assert texts[0] == "t" and all(text.startswith("bytes:\\x") for text in texts[1:])
    assert len(set(texts)) == len(set(ids))


def test_control_tokens_have_their_name_and_unknown_ids_nothing():
    tokens = TokenBytes(TOKENIZERS["bytes"])
    assert tokens.get_bytes(0) == b"<|im_start|>" and tokens.get_text(1) == "<|im_end|>"
    assert tokens.get_bytes(100_000) == b""


def test_any_ids_join_to_what_the_tokenizer_decodes():
    tokenizer, draw = TOKENIZERS["merges"], random.Random(3)
    tokens = TokenBytes(tokenizer)
    for _ in range(200):
        ids = [draw.randrange(2, len(tokenizer)) for _ in range(20)]
        joined = b"".join(tokens.get_bytes(token) for token in ids).decode(errors="replace")
        assert joined == tokenizer.decode(ids, clean_up_tokenization_spaces=False)
