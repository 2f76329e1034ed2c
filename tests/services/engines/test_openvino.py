import asyncio
import json

import jsonschema
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


A, NULL = {"type": "object", "properties": {"a": {"type": "null"}}, "required": ["a"]}, {"type": "null"}
FROM_3 = {"$defs": {"x": {"type": "integer", "minimum": 3}}}


@pytest.mark.parametrize(
    ("schema", "told"),
    [
        # Of these the pipeline reads the first keyword, and nothing else.
        ({"$ref": "#/$defs/x", "maximum": 5, **FROM_3}, r"maximum next to \$ref"),
        ({"items": {"$ref": "#/$defs/x", "minimum": 2}, **FROM_3}, r"minimum next to \$ref"),
        ({**A, "anyOf": [{"required": ["a"]}, NULL]}, "type, properties, required next to anyOf"),
        ({"type": "integer", "maximum": 3, "enum": [1, 7]}, "a value of enum that type, maximum excludes"),
        ({"type": "string", "const": None}, "a value of const that type excludes"),
        ({"enum": ["a"], "$ref": "#/$defs/x", **FROM_3}, r"enum next to \$ref"),
        # Ranges of numbers have a point that may be any sign, and too wide an end.
        ({"type": "number", "minimum": 0, "maximum": 1}, "minimum of the type integer only"),
        ({"properties": {"a": {"type": ["null", "number"], "maximum": -0.5}}}, "maximum of the type integer"),
        ({"minimum": 3}, "minimum of the type integer only"),
        ({"minItems": 1}, "of the type array only"),
        ({"type": "object", "required": ["b"]}, "required 'b'"),
        # These ended the pipeline, and all answers with it.
        ({"type": "integer", "minimum": 1.5, "maximum": 2.5}, "minimum is 1.5"),
        ({"type": "array", "minItems": 2}, "with a schema of items"),
        ({"type": "object", "properties": {"a": False}}, "the schema false"),
        ({"anyOf": [False, NULL]}, "the schema false"),
    ],
)
def test_what_the_pipeline_ignores_or_fails_on_is_refused_by_name(schema, told):
    with pytest.raises(SchemaUnsupported, match=told):
        check_keywords(schema)


def test_what_is_written_next_to_a_keyword_that_is_read_alone_may_repeat_it():
    """And what the check lets pass is held."""
    held = [
        {"$ref": "#/$defs/x", "type": "integer", "title": "at least 3", **FROM_3},
        {"type": "object", "anyOf": [A]},
        {"type": ["integer", "string"], "enum": ["a", 7]},
        {"type": ["integer", "null"], "minimum": -3, "maximum": 1000.0},
        {"type": "array", "items": NULL, "minItems": 2, "maxItems": 2},
        {"type": "array", "items": False, "maxItems": 2},
    ]
    engine = make_openvino()

    async def draw(schema):
        sampling = [
            Sampling(60, temperature=1.2, seed=seed, json_schema=json.dumps(schema)) for seed in (1, 2, 3)
        ]
        return await asyncio.gather(*(answer(engine, ids_of("answer"), one) for one in sampling))

    ended = 0
    for schema in held:
        for ids, reason, _ in asyncio.run(draw(schema)):
            if reason == "stop":  # not endless white space
                ended += 1
                jsonschema.validate(json.loads(tiny().tokenizer.decode(ids)), schema)
    engine.close()
    assert ended >= 9


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
