import asyncio
import json

import pytest

from services.engines.openvino import BLOCK_TOKENS, OpenvinoEngine
from services.engines.openvino_grammar import check_keywords, check_size
from services.engines.protocol import Sampling, SchemaUnsupported
from stages.common.errors import InputError
from tests.services.engines.makers import make_openvino, tiny
from tests.services.engines.test_contract import answer, ids_of


@pytest.mark.parametrize("precision", ["auto", "float32"])
def test_the_cache_takes_the_memory_it_is_given(precision):
    made = tiny()
    engine = OpenvinoEngine(
        made.folder / "model.gguf",
        made.folder / "config.json",
        made.tokenizer,
        kv_cache_mib=1,
        precision=precision,
    )
    asyncio.run(answer(engine, ids_of("hello"), Sampling(4)))
    taken = engine._pipeline.get_metrics().cache_size_in_bytes
    engine.close()
    assert taken == 2**20


def test_more_long_answers_than_the_cache_holds_all_come_whole():
    # 1 MiB holds 8,192 tokens of this model; 24 answers of 480 take 11,520.
    prompts = [ids_of(f"{n} is the number of this question") for n in range(24)]
    count = 480 - max(map(len, prompts))

    def write_all(kv_cache_mib):
        engine = make_openvino(kv_cache_mib=kv_cache_mib, max_running=24)

        async def ask():
            return await asyncio.gather(*(answer(engine, prompt, Sampling(count)) for prompt in prompts))

        answers = asyncio.run(ask())
        usage = engine._pipeline.get_metrics().max_cache_usage
        engine.close()
        return answers, usage

    answers, usage = write_all(kv_cache_mib=1)
    assert usage == 100  # percent: some had to give way
    assert answers == write_all(kv_cache_mib=4)[0]


def test_a_cache_that_holds_no_block_is_refused(tmp_path):
    settings = json.loads((tiny().folder / "config.json").read_text()) | {"num_hidden_layers": 10_000}
    config = tmp_path / "config.json"
    config.write_text(json.dumps(settings))
    with pytest.raises(InputError, match=f"no room for {BLOCK_TOKENS} tokens"):
        OpenvinoEngine(tiny().folder / "model.gguf", config, tiny().tokenizer, kv_cache_mib=1)


def test_a_file_that_is_no_model_is_refused(tmp_path):
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF but no more")
    with pytest.raises(InputError, match="cannot read"):
        OpenvinoEngine(file, tiny().folder / "config.json", tiny().tokenizer)


def test_an_unknown_keyword_is_found_at_any_depth():
    for schema in (
        {"pattern": "a"},
        {"properties": {"a": {"items": {"format": "date"}}}},
        {"anyOf": [{"type": "null"}, {"additionalProperties": {"if": {}}}]},
        {"$defs": {"a": {"oneOf": []}}},
        {"$ref": "https://example.org/schema"},
    ):
        with pytest.raises(SchemaUnsupported):
            check_keywords(schema)


def test_properties_may_be_named_like_keywords():
    check_keywords({"properties": {"pattern": {"type": "string"}, "not": {"enum": [{"format": 1}]}}})


def optional(count):
    return {"type": "object", "properties": {f"k{n}": {"type": "string"} for n in range(count)}}


def test_a_schema_that_would_hold_up_the_other_answers_is_refused_before_a_step():
    """The pipeline compiles it in the middle of a step."""
    several = {"anyOf": [optional(60), {"type": "array", "items": optional(60)}, optional(60)]}
    named = optional(300) | {"required": [f"k{n}" for n in range(300)]}
    for schema in (optional(100), named, {"enum": ["x" * 100] * 100}):
        check_size(json.dumps(schema))
    for schema, problem in (
        (optional(101), "10201 pairs of properties that are not required"),
        (several, "10800 pairs"),
        ({"enum": ["x" * 100] * 200}, "characters; the openvino engine takes 16384"),
    ):
        with pytest.raises(SchemaUnsupported, match=problem):
            check_size(json.dumps(schema))
    engine = make_openvino()
    with pytest.raises(SchemaUnsupported, match="10201 pairs"):
        asyncio.run(answer(engine, ids_of("hello"), Sampling(4, json_schema=json.dumps(optional(101)))))
    engine.close()
