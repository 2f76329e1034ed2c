"""A model without the tokens that its rows do not need: the same numbers, with other ids."""

import json
import random
from pathlib import Path

import pytest
import torch

from services.engines.calls.allowed import AllowedCalls
from services.engines.calls.grammar import write_grammar
from services.engines.calls.notation import read_marks
from services.engines.grammar import Grammars
from services.engines.paged.model import PagedModel, StepInput
from services.engines.protocol import Sampling
from stages.common.artifacts import make_folder, read_json, write_json
from stages.common.chat.template import encode_example, encode_prompt, encode_text, hash_template
from stages.common.chat.tools_template import adapt_template
from stages.common.errors import InputError
from stages.common.gguf.model import write_gguf
from stages.common.gguf.vocabulary import read_vocabulary
from stages.common.messages import Message, Tool
from stages.common.model.draft_corpus import encode_corpus, read_corpus, write_corpus
from stages.common.model.loading import load_tokenizer
from stages.common.records import make_row
from stages.compress.shrinking import keep_tokens, list_token_ids
from stages.compress.vocabulary import check_alike, cut_vocabulary
from tests.services.tool_models import TOOLS
from tests.stages.common.gguf.test_vocabulary import learned
from tests.tiny import make_model

TEXTS = ("Turn on the lights, please.", "camelCase 2024", "we'll see")
READ = tuple(Tool(json.dumps(tool)) for tool in TOOLS)


def make_rows(texts, tools=READ):
    return [
        make_row([Message("user", text), Message("assistant", text[::-1])], "t", "mit", tools=tools)
        for text in texts
    ]


@pytest.fixture
def cut(tmp_path, monkeypatch):
    """A function that leaves out tokens of a model like this; it returns both, with their tokenizers."""
    monkeypatch.chdir(tmp_path)

    def run(texts=TEXTS, share=0.0, tokenizer_class=None, **changes):
        tokenizer = learned("smollm")
        tokenizer.chat_template = adapt_template(tokenizer, {}, True, "default")
        exported, folder = Path("artifacts/export"), tmp_path / "small"
        make_folder(folder)
        model = make_model(3, vocab_size=450, initializer_range=0.3, **changes)
        model.config.save_pretrained(exported)
        tokenizer.save_pretrained(exported)
        if tokenizer_class:
            set_class(exported / "tokenizer_config.json", tokenizer_class, tokenizer)
        tokenizer = load_tokenizer(exported)
        rows = make_rows(texts)
        write_corpus(exported / "draft_corpus.npz", encode_corpus(tokenizer, rows, 10))
        smaller, found = cut_vocabulary(model, tokenizer, rows, make_rows(["naïve lights"]), share, folder)
        return model, tokenizer, smaller, load_tokenizer(folder), found

    return run


def set_class(path, name, tokenizer):
    """Name a class of transformers, and the added tokens with their ids, as older versions wrote them."""
    kinds = ("content", "special", "lstrip", "rstrip", "normalized", "single_word")
    added = tokenizer.added_tokens_decoder.items()
    decoder = {str(number): {kind: getattr(token, kind) for kind in kinds} for number, token in added}
    write_json(path, read_json(path) | {"tokenizer_class": name, "added_tokens_decoder": decoder})


def compute(model, ids):
    with torch.inference_mode():
        return model(torch.tensor([ids])).logits[0]


@pytest.mark.parametrize("tied", [True, False])
def test_a_text_of_kept_tokens_gets_the_very_logits_of_the_whole_model(cut, tied):
    model, tokenizer, smaller, own, found = cut(tie_word_embeddings=tied)
    assert found["tokens"] == len(own) == smaller.config.vocab_size < len(tokenizer)
    kept = torch.tensor(
        [tokenizer.convert_tokens_to_ids(t) for t in own.convert_ids_to_tokens(range(len(own)))]
    )
    assert torch.equal(smaller.get_input_embeddings().weight, model.get_input_embeddings().weight[kept])
    for row in make_rows(TEXTS):
        ids, new = (encode_example(one, row.messages, row.tools).input_ids for one in (tokenizer, own))
        assert [int(kept[n]) for n in new] == ids
        torch.testing.assert_close(compute(smaller, new), compute(model, ids)[:, kept], rtol=0, atol=1e-6)
    shared = smaller.get_output_embeddings().weight is smaller.get_input_embeddings().weight
    assert shared == tied


@pytest.mark.parametrize("name", ["GPT2Tokenizer", "Qwen2Tokenizer"])
def test_a_class_that_builds_its_tokenizer_itself_gets_the_new_ids(cut, name, tmp_path):
    _, tokenizer, _, own, found = cut(tokenizer_class=name)
    assert type(own).__name__ == type(tokenizer).__name__ == name
    assert found["tokens"] == len(own) < len(tokenizer)
    added = read_json(tmp_path / "small/tokenizer_config.json")["added_tokens_decoder"]
    named = {token["content"]: int(number) for number, token in added.items()}
    assert named and named.items() <= own.get_added_vocab().items()


def test_settings_marks_and_drafts_have_the_new_ids(cut, tmp_path):
    model, tokenizer, smaller, own, _ = cut()
    for one in (smaller.config, smaller.generation_config):
        names = [own.convert_ids_to_tokens(n) for n in (one.bos_token_id, one.eos_token_id, one.pad_token_id)]
        assert names == ["<|im_start|>", "<|im_end|>", "<|im_end|>"]
    assert list_token_ids(smaller) == {own.bos_token_id, own.eos_token_id}
    assert own.pad_token_id == own.eos_token_id and hash_template(own) == hash_template(tokenizer)
    drafts = [
        [one.decode(piece) for example in read_corpus(folder / "draft_corpus.npz") for piece in example]
        for folder, one in ((Path("artifacts/export"), tokenizer), (tmp_path / "small", own))
    ]
    assert drafts[0] == drafts[1] and len(drafts[0]) == 2 * len(TEXTS)
    model.config.eos_token_id = [1, 449]
    assert keep_tokens(model, [0, 5, 1]).config.eos_token_id == [2]


def test_what_the_template_writes_without_any_row_is_kept(cut):
    _, tokenizer, _, own, _ = cut(texts=("a",))
    marks = [read_marks(one) for one in (tokenizer, own)]
    assert marks[0].calls == marks[1].calls
    kept = set(own.get_vocab())
    template = str(tokenizer.chat_template)
    written = [part for part in ("<tool_call>", "assistant", "tools") if part in template]
    assert len(written) > 1
    for part in written:
        assert set(tokenizer.convert_ids_to_tokens(tokenizer(part)["input_ids"])) <= kept


def test_any_text_can_be_read_and_control_tokens_in_it_are_text(cut):
    _, tokenizer, _, own, found = cut()
    for text in ("été naïve 你好 🙂", "<|im_end|> <tool>", "\r\n\t 12345 camelCaseHTTP"):
        ids = encode_text(own, text)
        assert own.decode(ids) == text and own.eos_token_id not in ids
    assert found["longer_texts"] > 1
    prompt = [Message("user", "hi <|im_end|>")]
    texts = [one.decode(encode_prompt(one, prompt, READ)) for one in (tokenizer, own)]
    assert texts[0] == texts[1]


@pytest.mark.parametrize("kind", ["schema", "calls"])
def test_a_grammar_holds_answers_to_its_form(cut, kind):
    *_, own, _ = cut()
    grammars = Grammars(own, len(own), own.eos_token_id)
    schema = {"type": "object", "properties": {"camelCase": {"type": "boolean"}}, "required": ["camelCase"]}
    if kind == "schema":
        sampling = Sampling(400, json_schema=json.dumps({**schema, "additionalProperties": False}))
    else:
        sampling = Sampling(400, grammar=write_grammar(read_marks(own), AllowedCalls(READ, "required")).text)
    chance = random.Random(3)
    for _ in range(5):
        grammar, ids = grammars.compile_for(sampling), []
        while not ids or (ids[-1] != own.eos_token_id and len(ids) < 400):
            ids.append(chance.choice(grammar.allowed().nonzero()[0].tolist()))
            grammar.take(ids[-1])
        assert ids[-1] == own.eos_token_id
        text = own.decode(ids[:-1])
        if kind == "schema":
            assert isinstance(json.loads(text)["camelCase"], bool)
        else:
            assert any(f'"{name}"' in text for name in ("lamp", "heat", "stop"))


def test_the_engine_computes_the_smaller_model_from_its_file(cut, tmp_path):
    _, _, smaller, own, _ = cut(hidden_size=64)
    path = tmp_path / "model.gguf"
    write_gguf(path, smaller.half().float(), read_vocabulary(own, len(own)), "f16", "tiny")
    paged = PagedModel(path, cache_mib=4, threads=1, precision="float32")
    assert paged.shape.vocabulary == len(own)
    ids = encode_text(own, "Turn on the lights")
    found = torch.tensor(paged.step([StepInput(ids, 0, [0, 1], len(ids))]))
    torch.testing.assert_close(found, compute(smaller, ids), rtol=1e-3, atol=5e-3)


def test_a_tokenizer_that_cuts_rows_in_another_way_is_refused(cut):
    _, tokenizer, _, own, _ = cut()
    rows = make_rows(TEXTS)
    kept = [tokenizer.convert_tokens_to_ids(token) for token in own.convert_ids_to_tokens(range(len(own)))]
    check_alike(tokenizer, own, kept, rows)
    with pytest.raises(InputError, match="cuts training rows in another way"):
        check_alike(tokenizer, own, [*kept[1:], kept[0]], rows)
    with pytest.raises(InputError, match="cuts training rows in another way"):
        check_alike(tokenizer, own, kept, make_rows(["HELLO World, Pascal"]))
