import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stages.common.errors import InputError
from stages.common.records import Message, format_canonical_json, make_row, read_rows, write_rows


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
