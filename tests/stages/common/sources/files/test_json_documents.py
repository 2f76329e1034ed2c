"""Documents are read a value at a time: rows and errors are those of the whole text."""

import json
import tracemalloc

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stages.common.errors import InputError
from stages.common.sources.files import json_documents
from stages.common.sources.files.json_documents import read_json

TEXTS = st.text(st.characters(exclude_categories=("Cs",)), max_size=12)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=8,
)


@pytest.fixture(params=[1, 7, 1 << 20])
def read_chars(request, monkeypatch):
    """How many characters are read at a time."""
    monkeypatch.setattr(json_documents, "READ_CHARS", request.param)


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@given(
    st.lists(VALUES, max_size=6), st.sampled_from([None, 1]), st.booleans(), st.sampled_from(["", "\ufeff"])
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)
def test_the_elements_of_an_array_are_those_of_the_whole_text(
    tmp_path, read_chars, values, indent, ascii_only, mark
):
    text = json.dumps(values, indent=indent, ensure_ascii=ascii_only)
    entries = list(read_json(write(tmp_path / "a.json", mark + text), "utf-8"))
    assert [json.loads(entry.content) for entry in entries] == values
    assert [entry.fields for entry in entries if isinstance(entry.fields, dict)] == [
        value for value in values if isinstance(value, dict)
    ]
    lines = text.split("\n")
    for entry in entries if indent else []:
        assert lines[entry.line - 1].strip().startswith(entry.content.split("\n")[0])


@given(st.dictionaries(TEXTS, VALUES, max_size=4), st.integers(0, 4), st.sampled_from([None, 1]))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)
def test_the_rows_of_an_object_are_found_wherever_they_are(tmp_path, read_chars, others, place, indent):
    def has_no_rows(value):
        return not isinstance(value, list) or not all(isinstance(row, dict) for row in value)

    rows = [{"q": "a", "a": "b"}, {"q": "c", "a": "d"}]
    others = {key: value for key, value in others.items() if has_no_rows(value)}
    members = [*others.items()]
    members.insert(place, ("the rows", rows))
    path = write(tmp_path / "a.json", json.dumps(dict(members), indent=indent))
    assert [entry.fields for entry in read_json(path, "utf-8")] == rows
    alone = write(tmp_path / "b.json", json.dumps(others, indent=indent))
    assert [entry.fields for entry in read_json(alone, "utf-8")] == [others]


def test_of_a_key_that_is_there_twice_the_last_counts_as_in_python(tmp_path, read_chars):
    path = write(tmp_path / "a.json", '{"rows": [{"q": 1}], "n": 2, "rows": [{"q": 3}, {"q": 4}]}')
    assert [entry.fields for entry in read_json(path, "utf-8")] == [{"q": 3}, {"q": 4}]


@pytest.mark.parametrize(
    ("content", "where"),
    [
        ('[\n{"a": 1},\n{"a" 2}\n]', "3: broken JSON: Expecting ':' delimiter at character 6"),
        ('[{"a": 1} {"a": 2}]', "1: broken JSON: Expecting ',' or ']' at character 11"),
        ('[{"a": 1},\n {"a": "two\nlines"}]', "2: broken JSON: Invalid control character at at character 12"),
        ('[{"a": 1},\n\n {"a": "open}]', "3: broken JSON: Unterminated string starting at at character 8"),
        ('[{"a": 1}]\n[{"a": 2}]', "2: broken JSON: Extra data after the array at character 1"),
        ('[{"a": 1}', "1: broken JSON: Expecting ',' or ']' at character 10"),
        ('[{"a": tru', "1: broken JSON: Expecting value at character 8"),
        ('{"rows": [{"a": 1}], "b" 1}', "1: broken JSON: Expecting ':' delimiter at character 26"),
        ('{"rows": [{"a": 1}], b: 1}', "1: broken JSON: Expecting property name enclosed in double"),
        (b'[{"a": 1},\n\n{"b": "gr\xf6\xdfe"}]', "3: byte 0xf6 at character 10 is not utf-8"),
        ('[\n{"a": ' + "9" * 5000 + "}]", "2: broken JSON: Exceeds the limit"),
        ("[\n" + "[" * 100_000, "2: broken JSON: "),
    ],
)  # fmt: skip
def test_what_is_broken_is_named_with_line_and_character(tmp_path, read_chars, content, where):
    with pytest.raises(InputError) as error:
        list(read_json(write(tmp_path / "a.json", content), "utf-8"))
    assert f"a.json:{where}" in error.value.what


def test_a_quote_that_is_not_closed_is_not_read_to_the_end_of_a_large_file(tmp_path, monkeypatch):
    monkeypatch.setattr(json_documents, "READ_CHARS", 1000)
    monkeypatch.setattr(json_documents, "MAX_VALUE_CHARS", 100_000)
    path = write(tmp_path / "a.json", '[{"a": "open}, ' + "x" * 5_000_000 + "]")
    tracemalloc.start()
    with pytest.raises(InputError, match="Unterminated string starting at"):
        list(read_json(path, "utf-8"))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_500_000


@pytest.mark.parametrize("form", ["array", "object"])
def test_memory_does_not_grow_with_the_rows(tmp_path, form):
    rows = [{"q": f"{n} " + chr(97 + n % 26) * 20_000, "a": "b"} for n in range(1000)]
    text = json.dumps(rows if form == "array" else {"version": 2, "rows": rows})
    path = write(tmp_path / "a.json", text)
    tracemalloc.start()
    assert all(entry.fields == row for row, entry in zip(rows, read_json(path, "utf-8"), strict=True))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 0.4 * len(text)
