import json
from dataclasses import replace

import pytest
from gguf import GGUFReader, TokenType
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

from stages.common.errors import InputError
from stages.common.gguf.model import write_gguf
from stages.common.gguf.vocabulary import (
    BY_CASE,
    ONE_DIGIT,
    THREE_DIGITS,
    count_equal,
    find_pre_tokenizer,
    read_gguf_vocabulary,
    read_vocabulary,
)
from tests.llama_cpp import LlamaCpp
from tests.stages.common.chat_templates import FAMILIES
from tests.stages.common.sentencepiece import CORPUS, STYLES, make_learned_tokenizer
from tests.tiny import make_model, make_tokenizer

LEARNED_FROM = [
    "Turn on the lights, please. Don't turn off the lights; we'll see 12345 and 2024.",
    "HELLO World, camelCase and PascalCase\n\n\tif x == 10:\n        return x  # done",
    "été naïve café 你好 你好 Привет мир",
] * 3
TRICKY = [
    "Don't  STOP, we'Ll SEE\n\n\tnow   12345 1 22 333 ٣٤ ½",
    " leading, trailing ",
    "\n",
    "\r\n  \r\n a\rb",
    "été e\u0301t\u0301 你好，世界 Привет 🙂👩‍👩‍👧\u00a0x\u200b",
    "camelCaseHTTPServer/path//to\n/x.y(z)[0]!?…",
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|> <tool>x</tool> <tool>",
    "x" * 50 + " " * 17 + "lights" * 3,
    '{"intent":"A","minutes":13}',
]


def words():
    return pre_tokenizers.ByteLevel(add_prefix_space=False)


def split(pattern):
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def digits():
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), words()])


PRE_TOKENIZERS = {
    "gpt-2": (words, False),
    "smollm": (digits, False),
    "qwen2": (lambda: split(ONE_DIGIT), False),
    "smaug-bpe": (lambda: split(THREE_DIGITS), False),
    "llama-bpe": (lambda: split(THREE_DIGITS), True),
    "tekken": (lambda: split(BY_CASE), True),
}


def learned(pre):
    """Return a tokenizer with merges learned under this way of splitting, and one token that is no mark."""
    make_pre_tokenizer, ignore_merges = PRE_TOKENIZERS[pre]
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = make_pre_tokenizer()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trained.train_from_iterator(LEARNED_FROM, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet))
    merges = json.loads(trained.to_str())["model"]["merges"]
    tokenizer = make_tokenizer(tuple(map(tuple, merges)), make_pre_tokenizer(), ignore_merges)
    tokenizer.add_tokens(["<tool>"])
    return tokenizer


def write(path, tokenizer, rows=450):
    vocabulary = read_vocabulary(tokenizer, rows)
    write_gguf(path, make_model(0, vocab_size=rows), vocabulary, "f16", "tiny")
    return vocabulary


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_llama_cpp_splits_text_into_the_tokens_of_the_tokenizer(pre, tmp_path):
    tokenizer = learned(pre)
    assert write(tmp_path / "model.gguf", tokenizer).pre == pre
    llama_cpp = LlamaCpp(tmp_path / "model.gguf")
    for text in TRICKY:
        assert llama_cpp.tokens(text) == tokenizer(text, add_special_tokens=False)["input_ids"], text


@pytest.mark.parametrize("style", STYLES)
def test_llama_cpp_splits_text_into_the_tokens_of_sentencepiece(style, tmp_path):
    tokenizer = make_learned_tokenizer(style, FAMILIES["chatml"])
    vocabulary = write(tmp_path / "model.gguf", tokenizer, len(tokenizer) + 5)
    assert vocabulary.pre == "default" and vocabulary.space_prefix == (style == "prefix")
    assert read_gguf_vocabulary(GGUFReader(tmp_path / "model.gguf")) == vocabulary
    llama_cpp = LlamaCpp(tmp_path / "model.gguf")
    begin = "<|im_start|>" if style == "first" else ""
    texts = [begin + text for text in (*TRICKY, *CORPUS, "bananasbananana", "été 我 <unk>", "a " * 40)]
    for text in texts:
        assert llama_cpp.tokens(text) == tokenizer(text, add_special_tokens=False)["input_ids"], text
    assert count_equal(vocabulary, tokenizer, texts, tmp_path / "model.gguf") == len(texts)
    if style == "first":
        with pytest.raises(InputError, match="gives 'the lights' other tokens"):
            count_equal(vocabulary, tokenizer, ["the lights"], tmp_path / "model.gguf")


def test_the_types_of_sentencepiece_are_those_that_llama_cpp_looks_for():
    tokenizer = make_learned_tokenizer("plain", replace(FAMILIES["chatml"], added=("<tool>",)))
    vocabulary = read_vocabulary(tokenizer, len(tokenizer) + 1)
    kinds = dict(zip(vocabulary.tokens, vocabulary.types, strict=True))
    assert kinds["<unk>"] == TokenType.UNKNOWN and kinds["<0x0A>"] == TokenType.BYTE
    assert kinds["<|im_end|>"] == TokenType.CONTROL and kinds["<tool>"] == TokenType.USER_DEFINED
    assert kinds["▁the"] == TokenType.NORMAL and TokenType.UNUSED in vocabulary.types
    assert vocabulary.merges == () and len(vocabulary.scores) == len(vocabulary.tokens)


def describe_sentencepiece(**changes):
    tokenizer = make_learned_tokenizer("plain", FAMILIES["chatml"])
    described = json.loads(tokenizer.backend_tokenizer.to_str())
    described |= {key: value for key, value in changes.items() if key in described}
    described["model"] |= {key: value for key, value in changes.items() if key in described["model"]}
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(described))
    return tokenizer


def mixed_merges():
    merges = describe_sentencepiece()._tokenizer
    found = json.loads(merges.to_str())["model"]["merges"]
    several = next(n for n, pair in enumerate(found) if "".join(pair) == "".join(found[n + 1]))
    return [*found[:several], *found[several + 1 :], found[several]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"normalizer": {"type": "Lowercase"}}, "normalizers .*Lowercase"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "pre-tokenizers .*Whitespace"),
        ({"ignore_merges": True}, "ignore_merges is true"),
        ({"merges": mixed_merges()}, "are mixed"),
        ({"merges": mixed_merges()[:-1]}, "the merges lack a pair that makes"),
    ],
)
def test_a_sentencepiece_that_llama_cpp_would_cut_otherwise_is_refused(changes, message):
    tokenizer = describe_sentencepiece(**changes)
    with pytest.raises(InputError, match=message) as error:
        read_vocabulary(tokenizer, len(tokenizer))
    assert "export.gguf: false" in error.value.fix


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_the_vocabulary_read_back_gives_the_tokens_of_the_tokenizer(pre, tmp_path):
    tokenizer = learned(pre)
    written = write(tmp_path / "model.gguf", tokenizer)
    found = read_gguf_vocabulary(GGUFReader(tmp_path / "model.gguf"))
    assert found == written
    assert count_equal(found, tokenizer, TRICKY, tmp_path / "model.gguf") == len(TRICKY)


def test_another_way_of_splitting_is_found_out(tmp_path):
    vocabulary = read_vocabulary(learned("smollm"), 450)
    with pytest.raises(InputError, match=r"(?s)model\.gguf gives .*12345.* other tokens"):
        count_equal(vocabulary, learned("gpt-2"), TRICKY, tmp_path / "model.gguf")


def test_marks_added_words_and_empty_rows_have_their_types():
    vocabulary = read_vocabulary(learned("gpt-2"), 450)
    kinds = dict(zip(vocabulary.tokens, vocabulary.types, strict=True))
    assert kinds["<|im_start|>"] == TokenType.CONTROL
    assert kinds["<tool>"] == TokenType.USER_DEFINED
    assert kinds["[PAD449]"] == TokenType.UNUSED
    assert vocabulary.ends == (1,)


def test_an_end_of_turn_that_is_not_the_end_of_sequence_is_kept_beside_it(tmp_path):
    tokenizer = learned("gpt-2")
    tokenizer.add_special_tokens({"eos_token": "<|endoftext|>"})
    vocabulary = write(tmp_path / "model.gguf", tokenizer)
    assert vocabulary.ends == (tokenizer.eos_token_id, 1)
    assert read_gguf_vocabulary(GGUFReader(tmp_path / "model.gguf")).ends == vocabulary.ends


def test_text_that_the_tokenizer_normalises_may_differ_and_is_counted(tmp_path):
    tokenizer = learned("qwen2")
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    vocabulary = read_vocabulary(tokenizer, 450)
    assert count_equal(vocabulary, tokenizer, ["cafe", "cafe\u0301"], tmp_path / "model.gguf") == 1


def described(**changes):
    return {**json.loads(learned("gpt-2").backend_tokenizer.to_str()), **changes}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"type": "Unigram"}}, "is Unigram, not BPE"),
        ({"normalizer": {"type": "Lowercase"}}, "changes its text .Lowercase."),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "no known equivalent in llama.cpp"),
        ({"pre_tokenizer": None}, "no known equivalent in llama.cpp"),
    ],
)
def test_a_tokenizer_that_llama_cpp_does_not_have_is_refused_with_the_way_out(changes, message):
    with pytest.raises(InputError, match=rf"(?s){message}.*export\.gguf: false"):
        find_pre_tokenizer(described(**changes))


def test_more_tokens_than_rows_of_the_embedding_are_refused():
    with pytest.raises(InputError, match="embedding 300 rows"):
        read_vocabulary(learned("gpt-2"), 300)
