from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stages.common.errors import InputError
from stages.common.messages import Message, Tool, ToolCall
from stages.common.records import (
    format_canonical_json,
    make_row,
    read_rows,
    separate_refused,
    write_rows,
)


def row(question="light on", answer='{"intent":"On"}', **more):
    return make_row([Message("user", question), Message("assistant", answer)], "toy", "mit", **more)


def test_rows_come_back_as_they_were_written(tmp_path):
    rows = [row(tags={"b": "2", "a": "1"}, group="g"), row("größer ☀", "heller", origin="feedback")]
    write_rows(tmp_path / "rows.parquet", rows)
    assert read_rows(tmp_path / "rows.parquet") == rows


def test_equal_rows_are_equal_bytes(tmp_path):
    for name, tags in (("a", {"x": "1", "y": "2"}), ("b", {"y": "2", "x": "1"})):
        write_rows(tmp_path / name, [row(tags=tags)] * 3)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_the_id_follows_from_the_messages_alone():
    assert row().id == row(tags={"a": "b"}, group="g").id
    assert row().id != row(question="light off").id
    assert row().group == row().id


def test_prompt_question_and_answer_are_the_parts_of_the_conversation():
    messages = [Message("system", "s"), Message("user", "a"), Message("assistant", "b"), Message("user", "c")]
    made = make_row([*messages, Message("assistant", "d")], "toy", "mit")
    assert made.prompt == tuple(messages)
    assert (made.question, made.answer) == ("c", "d")


@pytest.mark.parametrize(
    ("messages", "problem"),
    [
        ([], "no messages"),
        ([Message("user", "a")], "no answer"),
        ([Message("user", "a"), Message("assistant", " \n")], "no answer"),
        ([Message("assistant", "a")], "no user message"),
        ([Message("bot", "a"), Message("assistant", "b")], "unknown role 'bot'"),
        ([Message("user", "a"), Message("system", "s"), Message("assistant", "b")], "after the first place"),
    ],
)
def test_a_conversation_that_cannot_be_learned_from_says_why(messages, problem):
    with pytest.raises(ValueError, match=problem):
        make_row(messages, "toy", "mit")


def test_a_missing_file_names_the_stage_that_makes_it():
    from pathlib import Path

    with pytest.raises(InputError, match="dvc repro collect"):
        read_rows(Path("artifacts/collect/absent.parquet"))


def test_other_columns_and_other_formats_are_refused(tmp_path):
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "other.parquet")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 not really")
    for name in ("other", "broken"):
        with pytest.raises(InputError):
            read_rows(tmp_path / f"{name}.parquet")


def test_canonical_json_is_one_text_per_value():
    assert format_canonical_json({"b": 1, "a": "ü"}) == '{"a":"ü","b":1}'


LAMP = Tool('{"type":"function","function":{"name":"lamp","parameters":{"type":"object"}}}')


def talk(**more):
    messages = [
        Message("user", "lamp on"),
        Message("assistant", "", (ToolCall("lamp", '{"on":true}', "c1"),), reasoning="they want light"),
        Message("tool", "done", tool_call_id="c1"),
        Message("assistant", "It is on.", is_learned=True),
    ]
    return make_row(messages, "toy", "mit", tools=[LAMP], **more)


def test_conversations_with_tools_come_back_as_they_were_written(tmp_path):
    rows = [row(), talk(), row("c", "d")]
    write_rows(tmp_path / "rows.parquet", iter(rows))
    assert read_rows(tmp_path / "rows.parquet") == rows


def test_rows_before_the_first_with_tools_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr("stages.common.records.ROWS_A_BATCH", 2)
    rows = [row(f"question {n}") for n in range(5)] + [talk(), row()]
    write_rows(tmp_path / "rows.parquet", iter(rows))
    assert read_rows(tmp_path / "rows.parquet") == rows
    assert [path.name for path in tmp_path.iterdir()] == ["rows.parquet"]


def test_rows_without_tools_keep_the_id_and_the_columns_that_they_had(tmp_path):
    assert row().id == "d4cdbd15a185c13e"
    write_rows(tmp_path / "rows.parquet", [row()])
    turn = pq.read_schema(tmp_path / "rows.parquet").field("messages").type.value_type
    assert [field.name for field in turn] == ["role", "content"]


def test_calls_tools_and_weights_make_another_conversation():
    plain = [Message("user", "a"), Message("assistant", "b"), Message("user", "c"), Message("assistant", "d")]
    ids = {make_row(plain, "toy", "mit").id, make_row(plain, "toy", "mit", tools=[LAMP]).id}
    ids.add(make_row([plain[0], replace(plain[1], is_learned=False), *plain[2:]], "toy", "mit").id)
    assert len(ids) == 3


def test_a_rejected_answer_and_a_rating_come_back_and_files_without_have_the_columns_they_had(tmp_path):
    plain = [row(), row("another")]
    pair = row("a pair", rejected=Message("assistant", "worse"))
    rated = [row("good", is_desirable=True), row("bad", is_desirable=False)]
    write_rows(tmp_path / "plain", plain)
    assert not {"rejected", "is_desirable"} & set(pq.read_schema(tmp_path / "plain").names)
    for name, rows in {"pairs": [*plain, pair, *rated], "wide": [talk(), *plain, pair, *rated]}.items():
        write_rows(tmp_path / name, rows)
        assert read_rows(tmp_path / name) == rows
    # In the first rows nothing shows that later ones need more columns.
    many = [*[row(str(n)) for n in range(2100)], pair, *[row(str(n)) for n in range(2100)], talk()]
    write_rows(tmp_path / "many", many)
    assert read_rows(tmp_path / "many") == many


def test_what_a_row_is_compared_with_is_part_of_its_id_and_a_rating_is_not():
    worse = Message("assistant", "worse")
    assert row().id == row(is_desirable=True).id
    assert len({row().id, row(rejected=worse).id, row(rejected=Message("assistant", "other")).id}) == 3
    with pytest.raises(ValueError, match="the rejected answer: no answer"):
        row(rejected=Message("user", "worse"))


def test_rows_whose_answer_was_refused_are_kept_apart():
    rows = [row("a"), row("b", is_desirable=False), row("c", is_desirable=True)]
    assert separate_refused(rows) == ([rows[0], rows[2]], [rows[1]])
    assert separate_refused(rows[:1]) == (rows[:1], [])
