import json
import sys

import pytest

from monitoring.traffic.answer_json import NO_JSON, format_category, is_same_answer, parse_json


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ('{"a":1,"b":[2]}', '{"b": [2], "a": 1}', True),
        ('{"a":true}', '{"a":1}', False),
        ("  yes\n", "yes", True),
        ("yes", '"yes"', False),
        (r'{"a":"\ud83d"}', r'{"a":"\ud83e"}', True),
        ("[" * 9000, "[" * 9000, True),
        ('{"a":1e999}', '{"a":1}', False),
        (
            '{"content":"Yes.","tool_calls":[{"name":"f","arguments":{"a":1,"b":2}},{"name":"g","arguments":{}}]}',
            '{"tool_calls": [{"name": "g", "arguments": {}}, {"name": "f", "arguments": {"b": 2, "a": 1}}]}',
            True,
        ),
        (
            '{"tool_calls":[{"name":"f","arguments":{}}]}',
            '{"tool_calls":[{"name":"g","arguments":{}}]}',
            False,
        ),
        ('{"tool_calls":[{"name":"f","arguments":{}}]}', "f()", False),
        ('{"malformed_call":"f("}', '{"malformed_call":"f("}', False),
    ],
)
def test_answers_are_compared_as_json_where_both_are(one, other, same):
    assert is_same_answer(one, other) is same


def test_a_value_of_any_depth_can_be_named():
    limit = sys.getrecursionlimit()
    for depth in (1, 100, *range(limit - 200, limit)):
        value = parse_json("[" * depth + "]" * depth)
        assert value is NO_JSON or format_category(value)


@pytest.mark.parametrize(
    "text", [r'"\ud83d"', r'{"\udfff": ["\ud800", {"a": "\ud83d x"}]}', r'["\ud83d\ude00"]']
)
def test_what_was_read_can_be_written(text):
    json.dumps(parse_json(text), ensure_ascii=False).encode("utf-8")
