"""A tokenizer with fewer tokens cuts texts of kept tokens as before, and others into smaller pieces."""

import json
import random

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from stages.common.gguf.trimming import (
    choose_tokens,
    describe_tokenizer,
    list_merges,
    list_parts,
    renumber_settings,
    trim_tokenizer,
)
from stages.common.gguf.vocabulary import read_vocabulary
from tests.llama_cpp import LlamaCpp
from tests.stages.common.chat_templates import FAMILIES
from tests.stages.common.gguf.test_vocabulary import LEARNED_FROM, PRE_TOKENIZERS, TRICKY, learned
from tests.stages.common.sentencepiece import CORPUS, make_learned_tokenizer
from tests.tiny import make_model, make_tokenizer

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())


def encode(tokenizer, text):
    return tokenizer.encode(text, add_special_tokens=False).ids


def trim(described, used, share=0.0):
    kept = choose_tokens(described, used, share)
    return kept, Tokenizer.from_str(json.dumps(trim_tokenizer(described, kept)))


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_texts_of_kept_tokens_are_cut_alike_and_others_lose_no_letter(pre, tmp_path):
    tokenizer = learned(pre)
    whole = tokenizer.backend_tokenizer
    kept, own = trim(describe_tokenizer(tokenizer), encode(whole, LEARNED_FROM[0] + "<tool>"))
    assert 256 < len(kept) < len(tokenizer) and own.get_vocab_size() == len(kept)
    for text in (LEARNED_FROM[0], "<tool>the lights<|im_end|>", "Turn on 2024"):
        assert [kept[n] for n in encode(own, text)] == encode(whole, text)
    texts = [*TRICKY, *LEARNED_FROM]
    assert any(len(encode(own, text)) > len(encode(whole, text)) for text in texts)
    for text in texts:
        assert own.decode(encode(own, text), skip_special_tokens=False) == whole.decode(
            encode(whole, text), skip_special_tokens=False
        )
    check_llama_cpp(own, tokenizer, texts, tmp_path)


@pytest.mark.parametrize("style", ["prefix", "plain"])
def test_texts_of_kept_pieces_are_cut_alike_and_others_become_bytes(style, tmp_path):
    tokenizer = make_learned_tokenizer(style, FAMILIES["chatml"])
    whole = tokenizer.backend_tokenizer
    kept, own = trim(describe_tokenizer(tokenizer), encode(whole, CORPUS[0]))
    assert 256 < len(kept) < len(tokenizer) and own.get_vocab_size() == len(kept)
    for text in (CORPUS[0], "the lights<|im_end|>", "Turn on 2024"):
        assert [kept[n] for n in encode(own, text)] == encode(whole, text)
    assert len(encode(own, "bananas")) > len(encode(whole, "bananas"))
    assert own.decode(encode(own, CORPUS[2])) == whole.decode(encode(whole, CORPUS[2]))
    check_llama_cpp(own, tokenizer, [*TRICKY, *CORPUS], tmp_path)


def check_llama_cpp(own, tokenizer, texts, folder):
    from stages.common.gguf.model import write_gguf

    tokenizer._tokenizer = own
    vocabulary = read_vocabulary(tokenizer, own.get_vocab_size())
    path = folder / "model.gguf"
    write_gguf(path, make_model(0, vocab_size=own.get_vocab_size()), vocabulary, "f16", "tiny")
    llama_cpp = LlamaCpp(path)
    for text in texts:
        assert llama_cpp.tokens(text) == encode(own, text), text


def test_a_token_keeps_the_parts_from_which_it_really_grows():
    """Converted tokenizers (Llama 3) list every way to make a token, and the first of them is not the one."""
    merges = (("a", "b"), ("b", "c"), ("a", "bc"), ("ab", "c"))
    assert [*list_parts("abc", {pair: n for n, pair in enumerate(merges)})] == ["a", "b", "c", "ab", "abc"]
    described = describe_tokenizer(make_tokenizer(merges))
    ids = described["model"]["vocab"]
    kept, own = trim(described, [ids["abc"]])
    assert {ids["ab"], ids["abc"]} < {*kept} and ids["bc"] not in kept
    assert [kept[n] for n in encode(own, "abc")] == [ids["abc"]]


def test_a_token_that_no_merge_makes_is_kept_as_it_is():
    described = describe_tokenizer(make_tokenizer((("a", "b"), ("b", "c"))))
    described["model"]["vocab"]["你abc"] = 260
    kept, own = trim(described, [260])
    assert own.token_to_id("你abc") == kept.index(260) and own.token_to_id("ab") is not None
    assert own.token_to_id("bc") is None


def test_however_the_merges_were_made_texts_of_kept_tokens_are_cut_alike():
    chance = random.Random(1)
    for _ in range(30):
        pieces, merges = list("abcd"), []
        for _ in range(40):
            left, right = chance.choice(pieces), chance.choice(pieces)
            merges.append((left, right))
            pieces.append(left + right)
        chance.shuffle(merges)
        tokenizer = make_tokenizer(tuple(dict.fromkeys(merges)))
        whole = tokenizer.backend_tokenizer
        words = ["".join(chance.choices("abcd", k=12)) for _ in range(20)]
        kept, own = trim(
            describe_tokenizer(tokenizer), [n for word in words[:4] for n in encode(whole, word)]
        )
        assert len(kept) < len(tokenizer)
        for word in words:
            ids = encode(whole, word)
            if {*ids} <= {*kept}:
                assert [kept[n] for n in encode(own, word)] == ids
            assert own.decode(encode(own, word)) == word


def test_the_first_merges_are_kept_whatever_the_rows_have():
    described = describe_tokenizer(learned("gpt-2"))
    sizes = [len(choose_tokens(described, (), share)) for share in (0.0, 0.5, 0.99)]
    assert sizes[0] < sizes[1] < sizes[2]
    kept, own = trim(described, (), 0.5)
    merges = list_merges(described)
    half = {left + right for left, right in merges[: round(len(merges) / 2)]}
    assert half <= own.get_vocab().keys() and kept == [*sorted(kept[:-1]), kept[-1]]


def test_added_tokens_beyond_the_words_follow_them_without_gaps_and_processors_know_them():
    words = {"<s>": 0, **{byte: n + 1 for n, byte in enumerate(ALPHABET)}, "th": 300, "ab": 400}
    whole = Tokenizer(models.BPE(vocab=words, merges=[("t", "h"), ("a", "b")]))
    whole.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    whole.add_special_tokens(["<s>", "<end>", "<call>"])
    ends = [("<s>", 0), ("<end>", whole.token_to_id("<end>"))]
    template = processors.TemplateProcessing(single="<s> $A <end>", special_tokens=ends)
    whole.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
    kept, own = trim(json.loads(whole.to_str()), [words["ab"]])
    names = {number: text for text, number in whole.get_vocab().items()}
    assert own.get_vocab() == {names[old]: new for new, old in enumerate(kept)}
    assert own.token_to_id("th") is None and own.token_to_id("<call>") == len(kept) - 1 == 259
    assert own.encode("abth").tokens == ["<s>", "ab", "t", "h", "<end>"]
    assert own.encode("abth").ids[0] == own.token_to_id("<s>")
    whole.post_processor = processors.RobertaProcessing(("<end>", ends[1][1]), ("<s>", 0))
    _, own = trim(json.loads(whole.to_str()), [words["ab"]])
    assert own.encode("ab").ids == [own.token_to_id(token) for token in ("<s>", "ab", "<end>")]


def test_the_settings_name_the_new_ids():
    settings = {
        "added_tokens_decoder": {"7": {"content": "<end>"}, "9": {"content": "x"}},
        "eos_token": "<end>",
    }
    assert renumber_settings(settings, [3, 7]) == {
        "added_tokens_decoder": {"1": {"content": "<end>"}},
        "eos_token": "<end>",
    }
    assert renumber_settings({"eos_token": "<end>"}, [3]) == {"eos_token": "<end>"}
