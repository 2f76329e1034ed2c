"""Bounds of a schema; and that a grammar holds every number within them."""

import json
from itertools import combinations

import numpy as np
import pytest

from services.engines.calls.bounds import (
    COUNTS,
    MAX_COUNT,
    MAX_DEPTH,
    MAX_MULTIPLE,
    MAX_OPTIONAL,
    MAX_PARTS,
    MAX_SCHEMA_CHARS,
    NAMED,
    VALUES,
    check_bounds,
    check_bounds_together,
    count_remainders,
)
from services.engines.calls.ranges import BOUNDS, MAX_BOUND
from services.engines.grammar import Grammars
from services.engines.protocol import SchemaUnsupported
from services.guard.checks import check_schema
from tests.tiny import make_tokenizer

EDGES = (
    0,
    -0.0,
    1,
    -1,
    0.5,
    1e-320,
    5e-324,
    -1e-320,
    1e-9,
    1e-10,
    1e15,
    2**53,
    -(2**53),
    2**53 + 1,
    2**63,
    2**70,
)
EDGES += (-(2**63), -(2**70), 1e308, -1e308, 1e22, 123456.789, 0.3, 10**400)


def nested(levels):
    schema = {}
    for _ in range(levels):
        schema = {"items": schema}
    return schema


def optional(count, **more):
    return {"type": "object", "properties": {f"k{n}": {"type": "string"} for n in range(count)}, **more}


def define(**schema):
    return {"$defs": {"x": schema}}


# Choices of choices, all of which together would be 3**12.
CHOICES = {"allOf": [{"anyOf": [{"minimum": n}, {"minimum": -n}, {}]} for n in range(12)]}


@pytest.mark.parametrize(
    ("schema", "named"),
    [
        (optional(MAX_OPTIONAL + 1), "499 properties that are not required"),
        ({"items": {"anyOf": [optional(600, required=["k0"])]}}, "599 properties"),
        (optional(501, required=5), "501 properties"),
        ({"enum": ["x" * MAX_SCHEMA_CHARS]}, "characters"),
        (nested(MAX_DEPTH), "levels deep"),
        ({"enum": [0] * MAX_PARTS}, "parts"),
        ({"enum": [float("nan")]}, "nan"),
        ({"properties": {"a": {"default": float("inf")}}}, "inf"),
        *(({"items": {key: 2**53 + 1}}, key) for key in BOUNDS),
        *(({where: {name: {"minimum": 1e308}}}, "minimum") for where in NAMED for name in VALUES),
        ({"properties": {"enum": {"properties": {"const": {"maxLength": -1}}}}}, "maxLength"),
        *(({"$ref": to, "default": {"minimum": 1e308}}, "ref") for to in ("#/default", "#/%64efault")),
        ({"exclusiveMinimum": 0, "maximum": 1e-9}, "exclusiveMinimum is 0"),
        ({"type": "number", "exclusiveMinimum": 1, "exclusiveMaximum": 1.5}, "exclusiveMinimum is 1"),
        ({"minimum": -0.1, "exclusiveMaximum": 0}, "exclusiveMaximum is 0"),
        ({"maximum": 5, "allOf": [{"exclusiveMinimum": 0, "maximum": 0.5}]}, "exclusiveMinimum is 0"),
        ({"allOf": [{"exclusiveMinimum": 0}, {"allOf": [{"maximum": 0.5}]}]}, "exclusiveMinimum is 0"),
        # Split between a schema and what it refers to or chooses from: a grammar merges them.
        ({"$ref": "#/$defs/x", "maximum": 0.5, **define(exclusiveMinimum=0)}, "exclusiveMinimum is 0"),
        ({"allOf": [{"$ref": "#/$defs/x"}, {"maximum": 0.5}], **define(exclusiveMinimum=0)}, "is 0.5"),
        ({"exclusiveMinimum": 0, "items": {"$ref": "#", "maximum": 0.5}}, "exclusiveMinimum is 0"),
        ({"exclusiveMinimum": 0, "anyOf": [{"minimum": 3}, {"maximum": 0.5}]}, "maximum is 0.5"),
        ({"maximum": 0.5, "oneOf": [{"allOf": [{"exclusiveMinimum": 0}]}]}, "exclusiveMinimum is 0"),
        ({"exclusiveMinimum": 0, **CHOICES}, "more references and choices"),
        ({"const": 2**70}, "const"),
        ({"enum": [1, 12345678901234567890123]}, "enum"),
        ({"properties": {"const": {"const": {"a": [-(2**53) - 1]}}}}, "const"),
        *(({"anyOf": [{key: -1e308}]}, key) for key in BOUNDS),
        *(({"not": {key: 1e-320}}, key) for key in BOUNDS),
        *(({key: -1}, key) for key in COUNTS),
        *(({key: MAX_COUNT + 1}, key) for key in COUNTS),
        *(({key: 2**70}, key) for key in COUNTS),
        *(({"multipleOf": n}, "multipleOf") for n in (0, -0.0, -3, 9999991, 999983, 2**70, 10**400)),
        *(({"multipleOf": n}, "multipleOf") for n in (1e-320, 1e308, 0.30000000000000004, 5000.1)),
    ],
)  # fmt: skip
def test_a_schema_beyond_a_bound_is_refused_by_name(schema, named):
    with pytest.raises(SchemaUnsupported, match=named):
        check_bounds(json.dumps(schema))


@pytest.mark.parametrize(
    "schema",
    [
        True,
        {},
        nested(MAX_DEPTH - 1),
        optional(MAX_OPTIONAL),
        optional(800, required=[f"k{n}" for n in range(800)]),
        {"enum": [optional(600)]},
        {"properties": {"minimum": {"type": "string"}, "maxLength": True, "multipleOf": {"const": 2**53}}},
        {"$ref": "#/$defs/default", "$defs": {"default": {"type": "string"}}},
        CHOICES,  # nothing has to be merged
        # One choice has the one bound, another the other, and integers are written as they should be.
        {"anyOf": [{"exclusiveMinimum": 0, "maximum": 9}, {"minimum": -0.5, "maximum": 0.5}]},
        {"type": "integer", "exclusiveMinimum": 0, "anyOf": [{"maximum": 0.5}, {"minimum": 3}]},
        {"exclusiveMinimum": 0, "$ref": "#/$defs/x", "$defs": {"x": {"$ref": "#/$defs/x", "maximum": 1.5}}},
        {"exclusiveMinimum": 0, "maximum": 5, "$ref": "#/nowhere"},
        {"properties": {"const": {"enum": ["default"]}, "enum": {"const": -(2**53)}}},
        {"enum": ["1180591620717411303424", 1e300]},
        {"enum": [7, {"minimum": 1e308}], "default": 2**70},
        {"default": {"multipleOf": -1}, "examples": [{"maxItems": -1}]},
        {"minimum": 0, "maximum": -0.0, "multipleOf": MAX_MULTIPLE, "minLength": 0, "maxLength": MAX_COUNT},
    ],
)  # fmt: skip
def test_values_and_names_are_no_keywords(schema):
    check_bounds(json.dumps(schema))


@pytest.mark.parametrize(
    ("multiple", "count"), [(7, 7), (700, 700), (700.0, 700), (0.025, 25), (0.1, 1), (2.5, 25), (1e-9, 1)]
)
def test_the_remainders_of_a_multiple_are_counted(multiple, count):
    assert count_remainders(multiple) == count


def draw(grammar, random, end, limit=40):
    """Return the text of a random walk through a grammar; None if it did not end."""
    text = bytearray()
    alphabet = ALPHABET
    for _ in range(limit):
        allowed = np.flatnonzero(grammar.allowed())
        if end in allowed and (len(allowed) == 1 or random.random() < 0.3):
            return text.decode()
        token = int(random.choice(allowed[allowed != end]))
        text += alphabet[token]
        grammar.take(token)
    return None


TOKENIZER = make_tokenizer()
ALPHABET = {n: TOKENIZER.decode([n]).encode() for n in range(2, 258)}


@pytest.mark.parametrize("count", [MAX_OPTIONAL, MAX_OPTIONAL + 2])
def test_as_many_optional_properties_are_allowed_as_a_grammar_holds(count):
    """Two more end it in the middle of the answer."""
    grammar = Grammars(TOKENIZER, 258, 1).compile(json.dumps(optional(count)))

    def write(text):
        for token in TOKENIZER(text, add_special_tokens=False)["input_ids"]:
            assert grammar.allowed()[token]
            grammar.take(token)

    if count == MAX_OPTIONAL:
        write('{"k0": "a", "k1": "b"}')
    else:
        with pytest.raises(SchemaUnsupported, match="outgrew"):
            write('{"k0": "a", "k1": "b"}')


@pytest.mark.parametrize("kind", ["integer", "number"])
@pytest.mark.parametrize("key", [*BOUNDS, "multipleOf"])
@pytest.mark.parametrize("edge", EDGES, ids=lambda edge: f"{edge:.3g}" if edge < 10**300 else "huge")
def test_a_number_at_its_edge_is_held_by_the_grammar_or_refused(kind, key, edge):
    schema = json.dumps({"type": kind, key: edge})
    grammars = Grammars(TOKENIZER, 258, 1)
    try:
        check_bounds(schema)
        grammars.compile(schema)
    except SchemaUnsupported:
        return
    assert edge == 0 or 1e-9 <= abs(edge) <= MAX_BOUND
    random = np.random.default_rng(0)
    answers = [draw(grammars.compile(schema), random, 1) for _ in range(12)]
    assert all(check_schema(answer, schema).allow for answer in answers if answer), answers


ENDS = (-1000.5, -1, -0.25, -1e-9, 0, 1e-9, 0.25, 1, 1.5, 2, 123456.789)


@pytest.mark.parametrize("low", ["minimum", "exclusiveMinimum"])
@pytest.mark.parametrize("high", ["maximum", "exclusiveMaximum"])
def test_both_ends_of_a_range_are_held_by_the_grammar_or_refused(low, high):
    grammars, random = Grammars(TOKENIZER, 258, 1), np.random.default_rng(0)
    held = 0
    for first, last in combinations(ENDS, 2):
        schema = json.dumps({"type": "number", low: first, high: last})
        try:
            check_bounds(schema)
        except SchemaUnsupported:
            continue
        held += 1
        answers = [draw(grammars.compile(schema), random, 1) for _ in range(6)]
        assert all(check_schema(answer, schema).allow for answer in answers if answer), (schema, answers)
    assert held >= 45


def test_references_of_a_tool_stay_within_the_tool():
    """The schemas of all tools are checked together, and each has definitions of its own."""

    def make(limit):
        whole = {"$ref": "#/$defs/x", "exclusiveMinimum": 0}
        return {"properties": {"a": whole}, "$defs": {"x": {"maximum": limit}}}

    check_bounds_together([make(5), make(6)])
    with pytest.raises(SchemaUnsupported, match=r"maximum is 0\.5"):
        check_bounds_together([make(5), make(0.5)])
