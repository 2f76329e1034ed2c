import csv
import json
import re
from dataclasses import replace
from itertools import accumulate
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stages.common.errors import InputError
from stages.common.messages import Message
from stages.common.records import write_rows
from stages.common.sources.files.formats import FormatOptions
from stages.common.sources.files.rows import collect_file, name_group
from stages.common.sources.files.shapes import Columns

GOOD = {"prompt": "2+2?", "completion": "4"}
GOOD_CHAT = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}


def write(path, *lines):
    path.write_bytes(b"".join((line if isinstance(line, bytes) else line.encode()) + b"\n" for line in lines))
    return path


def collect(path, on_bad_row="reject", columns=None, system_prompt=None, origin="human", **options):
    return collect_file(
        Path(path),
        "cc-by-4.0",
        origin,
        FormatOptions(**options),
        columns or Columns(),
        system_prompt,
        on_bad_row,
    )


def chat(*contents, **more):
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[n % 2], "content": text} for n, text in enumerate(contents)], **more}


def jsonl(tmp_path, *rows):
    return write(
        tmp_path / "rows.jsonl", *(row if isinstance(row, str | bytes) else json.dumps(row) for row in rows)
    )


def test_prompt_and_completion_become_a_row_that_knows_where_it_came_from(tmp_path):
    path = jsonl(tmp_path, GOOD)
    (row,) = collect(path, origin="synthetic").rows
    assert [(m.role, m.content) for m in row.messages] == [("user", "2+2?"), ("assistant", "4")]
    assert (row.source, row.license, row.origin, row.group) == (str(path), "cc-by-4.0", "synthetic", row.id)


def test_chat_messages_become_a_row(tmp_path):
    turns = [
        ("system", "Be brief."),
        ("user", "hi"),
        ("assistant", "hello"),
        ("user", "bye"),
        ("assistant", "bye"),
    ]
    path = jsonl(tmp_path, {"messages": [{"role": role, "content": content} for role, content in turns]})
    (row,) = collect(path, system_prompt="Not this one.").rows
    assert [(m.role, m.content) for m in row.messages] == turns


def test_the_system_prompt_is_put_before_rows_that_have_none(tmp_path):
    (row,) = collect(jsonl(tmp_path, GOOD), system_prompt="Be brief.").rows
    assert (row.messages[0].role, row.messages[0].content) == ("system", "Be brief.")


def test_group_and_tags_come_from_the_columns_named(tmp_path):
    path = jsonl(
        tmp_path, {**GOOD, "topic": "sums", "lang": "en", "level": 3}, {**GOOD, "topic": 7, "lang": None}
    )
    columns = Columns(group="topic", tags=("lang", "level"))
    first, second = collect(path, columns=columns).rows
    assert (first.group, first.tags) == ("sums", {"lang": "en", "level": "3"})
    assert (second.group, second.tags) == ("7", {})


def test_a_json_answer_need_not_be_quoted(tmp_path):
    (row,) = collect(jsonl(tmp_path, {"prompt": "on", "completion": {"intent": "On", "area": "hall"}})).rows
    assert row.answer == '{"intent":"On","area":"hall"}'


def test_csv_rows_with_quoted_commas_and_lines_are_read(tmp_path):
    path = write(tmp_path / "rows.csv", "\ufeffprompt,completion", '"a, b","one\ntwo"', "c,d")
    assert [(r.question, r.answer) for r in collect(path).rows] == [("a, b", "one\ntwo"), ("c", "d")]


def test_a_column_without_a_name_is_not_read(tmp_path):
    """As pandas writes the index, and spreadsheets the empty columns at the end."""
    indexed = write(tmp_path / "pandas.csv", ",question,answer", *(f"{n},{n}+1?,{n + 1}" for n in range(20)))
    padded = write(tmp_path / "sheet.csv", "QUESTION,ANSWER,,", *(f"{n}+1?,{n + 1},," for n in range(20)))
    for path in (indexed, padded):
        found = collect(path)
        assert [row.prompt[-1].content for row in found.rows] == [f"{n}+1?" for n in range(20)]
        assert [row.answer for row in found.rows] == [str(n + 1) for n in range(20)]
        assert not found.rejected


def test_csv_may_hold_chat_messages_as_json(tmp_path):
    path = tmp_path / "rows.csv"
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([["messages"], [json.dumps(turns)]])
    assert collect(path).rows[0].answer == "hello"


def test_parquet_is_read_in_both_forms(tmp_path):
    pq.write_table(pa.table({"q": ["a", "b"], "a": ["1", None]}), tmp_path / "pairs.parquet")
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    pq.write_table(pa.table({"messages": [turns]}), tmp_path / "chat.parquet")
    pairs = collect(tmp_path / "pairs.parquet", columns=Columns(prompt="q", completion="a"))
    assert [r.answer for r in pairs.rows] == ["1"]
    assert [(r.line, r.reason) for r in pairs.rejected] == [(2, "no_answer")]
    assert collect(tmp_path / "chat.parquet").rows[0].answer == "hello"


def tool_row(name, arguments, **properties):
    """Return a conversation of OpenAI's form with a call of one of two tools; the other tool has an `x`."""
    tools = [
        {"type": "function", "function": {"name": one, "parameters": {"type": "object", "properties": has}}}
        for one, has in ((name, properties), ("other", {"x": {"type": "string", "enum": ["a"]}}))
    ]
    call = {"id": "c1", "type": "function", "function": {"name": name, "arguments": arguments}}
    turns = [
        {"role": "user", "content": "on"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "done"},
        {"role": "assistant", "content": "It is on."},
    ]
    return {"messages": turns, "tools": tools}


TOOL_ROWS = [
    tool_row("lamp", {"on": True}, on={"type": "boolean", "default": False}),
    tool_row(
        "heat", {"degrees": 21, "rooms": ["bath"]}, degrees={"type": "integer"}, rooms={"type": "array"}
    ),
]


def test_parquet_of_objects_has_the_keys_of_other_rows_and_its_conversations_are_the_same(tmp_path):
    table = pa.Table.from_pylist(TOOL_ROWS)
    asks = table["messages"][0].as_py()[1]["tool_calls"][0]["function"]
    assert asks["arguments"] == {"on": True, "degrees": None, "rooms": None}  # as every reader has it
    pq.write_table(table, tmp_path / "rows.parquet")
    assert collect(tmp_path / "rows.parquet").rows == sourced(tmp_path, collect(jsonl(tmp_path, *TOOL_ROWS)))


def test_parquet_with_arrows_type_of_json_as_datasets_writes_it(tmp_path):
    pq.write_table(pa.table({name: as_json(name) for name in TOOL_ROWS[0]}), tmp_path / "rows.parquet")
    assert pq.read_table(tmp_path / "rows.parquet")["tools"].type.value_type == pa.json_(pa.string())
    assert collect(tmp_path / "rows.parquet").rows == sourced(tmp_path, collect(jsonl(tmp_path, *TOOL_ROWS)))


def test_a_null_in_other_objects_of_parquet_is_kept(tmp_path):
    answers = [{"intent": "on", "slots": {"room": None}}, {"intent": "off", "slots": {"room": "bath"}}]
    rows = [{"prompt": "a", "completion": answer} for answer in answers]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    assert collect(tmp_path / "rows.parquet").rows[0].answer == '{"intent":"on","slots":{"room":null}}'


def as_json(column):
    """Return a column of lists of Arrow's JSON texts."""
    texts = [[json.dumps(item) for item in row[column]] for row in TOOL_ROWS]
    offsets = [0, *accumulate(map(len, texts))]
    storage = pa.array([text for row in texts for text in row], pa.string())
    return pa.ListArray.from_arrays(offsets, pa.ExtensionArray.from_storage(pa.json_(pa.string()), storage))


def sourced(tmp_path, collected):
    """Return rows as if they were from the Parquet file."""
    return [replace(row, source=str(tmp_path / "rows.parquet")) for row in collected.rows]


BAD = [
    ('{"prompt": "a", "completion"', "broken_json"),
    ('["prompt", "completion"]', "broken_json"),
    ("[" * 100_000, "broken_json"),
    ('{"prompt": ' + "1" * 5000 + "}", "broken_json"),
    (b'{"prompt": "caf\xe9", "completion": "b"}', "undecodable"),
    ('{"prompt": "a", "completion": ""}', "no_answer"),
    ('{"prompt": "a", "completion": null}', "no_answer"),
    ('{"prompt": "a", "completion": NaN}', "not_text"),
    ('{"prompt": "a \\ud800", "completion": "b"}', "not_text"),
    ('{"prompt": " ", "completion": "b"}', "no_question"),
    ('{"prompt": "a", "complétion": "b"}', "missing_field"),
]
BAD_CHATS = [
    ('{"messages": []}', "wrong_messages"),
    ('{"messages": "hello"}', "wrong_messages"),
    ('{"messages": {"role": "user"}}', "wrong_messages"),
    ('{"messages": [{"role": "user"}]}', "wrong_messages"),
    (
        '{"messages": [{"role": "robot", "content": "a"}, {"role": "assistant", "content": "b"}]}',
        "wrong_messages",
    ),
    (
        '{"messages": [{"role": "user", "content": ["a"]}, {"role": "assistant", "content": "b"}]}',
        "wrong_messages",
    ),
    ('{"messages": [{"role": "assistant", "content": "b"}]}', "wrong_messages"),
    ('{"messages": [{"role": "user", "content": "a"}]}', "no_answer"),
    ('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": " "}]}', "no_answer"),
]


@pytest.mark.parametrize(("line", "reason"), BAD, ids=range(len(BAD)))
def test_a_bad_row_is_rejected_with_its_line_and_reason_and_the_others_survive(tmp_path, line, reason):
    path = jsonl(tmp_path, GOOD, "", line, {**GOOD, "prompt": "3+3?"})
    found = collect(path)
    assert [row.question for row in found.rows] == ["2+2?", "3+3?"]
    assert [(r.file, r.line, r.reason) for r in found.rejected] == [(str(path), 3, reason)]


@pytest.mark.parametrize(("line", "reason"), BAD_CHATS, ids=range(len(BAD_CHATS)))
def test_a_bad_conversation_is_rejected_with_its_line_and_reason(tmp_path, line, reason):
    found = collect(jsonl(tmp_path, chat("2+2?", "4"), line))
    assert [row.question for row in found.rows] == ["2+2?"]
    assert [(r.line, r.reason) for r in found.rejected] == [(2, reason)]


def test_every_kind_of_bad_row_is_named_in_one_message_when_the_run_shall_stop(tmp_path):
    path = jsonl(tmp_path, GOOD, *(line for line, _ in BAD))
    with pytest.raises(InputError) as error:
        collect(path, on_bad_row="stop")
    text = str(error.value)
    assert f"{len(BAD)} bad rows" in text
    for number, (_, reason) in enumerate(BAD, start=2):
        # A problem that several rows have is one line with their numbers.
        assert re.search(rf":{number}: {reason}: |: {reason}: .* also .*\b{number}\b", text)
    assert "on_bad_row: reject" in error.value.fix


def test_a_message_about_thousands_of_bad_rows_has_each_problem_once(tmp_path):
    different = ["{" + " " * n for n in range(1, 61)]
    path = jsonl(tmp_path, GOOD, *["{"] * 3000, *different, *["{"] * 7)
    with pytest.raises(InputError, match="3,067 bad rows") as error:
        collect(path, on_bad_row="stop")
    _, first, second, *others = error.value.what.splitlines()
    assert first.startswith(f"{path}:2: broken_json: Expecting property name")
    assert first.endswith("at character 2 (3,007 rows: also 3, 4, 5, 6 and 3,002 more)")
    assert second.endswith("at character 3")
    assert len(others) == 49 and others[-1] == "and 11 more broken_json"


def test_broken_json_names_the_place_in_the_line(tmp_path):
    found = collect(jsonl(tmp_path, GOOD, '{"prompt" "a"}'))
    assert found.rejected[0].detail == "Expecting ':' delimiter at character 11"


def test_the_rejects_keep_what_stood_in_the_file(tmp_path):
    found = collect(jsonl(tmp_path, GOOD, b'{"prompt": "caf\xe9"}'))
    assert found.rejected[0].content == '{"prompt": "caf\\xe9"}'
    assert "0xe9 at 16" in found.rejected[0].detail


def test_csv_rows_with_too_many_cells_or_broken_bytes_are_set_aside(tmp_path):
    path = write(tmp_path / "rows.csv", "prompt,completion", "a,b,c", b"caf\xe9,x", "c,d")
    found = collect(path)
    assert [row.question for row in found.rows] == ["c"]
    assert [(r.line, r.reason) for r in found.rejected] == [(2, "broken_csv"), (3, "undecodable")]
    assert "3 cells under 2 columns" in found.rejected[0].detail


def test_a_quote_left_open_in_csv_is_named(tmp_path):
    path = write(tmp_path / "rows.csv", "prompt,completion", "a,b", '"c,d')
    found = collect(path)
    assert [row.question for row in found.rows] == ["a"]
    assert [r.reason for r in found.rejected] == ["broken_csv"]


@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
def test_a_missing_column_names_those_there_and_the_nearest(tmp_path, suffix):
    lines = {
        "jsonl": ['{"promt": "a", "completion": "b"}'],
        "csv": ["promt,completion", "a,b"],
    }[suffix]
    path = write(tmp_path / f"rows.{suffix}", *lines)
    with pytest.raises(InputError) as error:
        collect(path, columns=Columns(prompt="prompt"))
    assert "no column 'prompt'; did you mean promt?" in error.value.what
    assert "columns: promt, completion" in error.value.what
    assert "prompt_column" in error.value.fix


def test_a_missing_group_or_tag_column_is_an_error_too(tmp_path):
    with pytest.raises(InputError, match="no column 'topik'"):
        collect(jsonl(tmp_path, {**GOOD, "topic": "a"}), columns=Columns(group="topik"))


def test_a_missing_file_names_its_neighbours(tmp_path):
    jsonl(tmp_path, GOOD)
    with pytest.raises(
        InputError, match=r"row\.jsonl does not exist .*has rows\.jsonl.*did you mean rows\.jsonl"
    ):
        collect(tmp_path / "row.jsonl")


def test_a_file_in_a_missing_folder_is_an_error(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        collect(tmp_path / "nowhere" / "rows.jsonl")


@pytest.mark.parametrize(
    ("name", "content"), [("a.jsonl", b""), ("a.jsonl", b"\n\n"), ("a.csv", b""), ("a.csv", b"a,b\n")]
)
def test_an_empty_file_is_an_error(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match="is empty"):
        collect(tmp_path / name)


def test_an_unknown_kind_of_file_is_an_error(tmp_path):
    with pytest.raises(InputError, match=r"use \.jsonl, .*\.csv, .*\.parquet"):
        collect(write(tmp_path / "rows.txt", "a"))


def test_a_broken_parquet_file_is_an_error(tmp_path):
    with pytest.raises(InputError, match="cannot be read as Parquet"):
        collect(write(tmp_path / "rows.parquet", "no parquet at all"))


def test_a_file_of_bad_rows_only_is_an_error_that_shows_them(tmp_path):
    with pytest.raises(InputError, match=r"all 2 are bad\n.*:1: no_answer"):
        collect(jsonl(tmp_path, {**GOOD, "completion": ""}, "{"))


@pytest.mark.parametrize("part", ["question", "answer", "system"])
@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_a_row_with_a_nul_character_is_rejected_in_every_format(tmp_path, suffix, part):
    rows = [{"question": f"q {n}", "answer": f"a {n}", "system": "s"} for n in range(3)]
    rows[1][part] = "with\0nul"
    path = tmp_path / f"rows.{suffix}"
    if suffix == "csv":
        write(path, *(",".join(row) for row in [rows[0], *(row.values() for row in rows)]))
    elif suffix == "jsonl":
        write(path, *map(json.dumps, rows))
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    found = collect(path)
    assert [row.question for row in found.rows] == ["q 0", "q 2"]
    (reject,) = found.rejected
    assert reject.line == (3 if suffix == "csv" else 2)
    assert (reject.reason, "NUL character" in reject.detail) == ("not_text", True)


def test_a_csv_without_a_header_is_refused_until_its_columns_are_named(tmp_path):
    lines = [f"{'spam' if n % 3 else 'ham'}\tmessage number {n}" for n in range(30)]
    path = write(tmp_path / "sms.tsv", *lines)
    with pytest.raises(InputError, match=r"no header: its first line, 'ham, message number 0'.*") as error:
        collect(path)
    assert "column_names" in error.value.fix
    rows = collect(path, column_names=("label", "text")).rows
    assert (len(rows), rows[0].question, rows[0].answer) == (30, "message number 0", "ham")


def test_half_of_a_surrogate_pair_in_a_rejected_row_is_escaped(tmp_path):
    path = jsonl(tmp_path, GOOD, '{"prompt\\ud800": "a"}')
    (rejected,) = collect(path).rejected
    for text in (rejected.detail, rejected.content):
        text.encode("utf-8")
    path = write(tmp_path / "one.json", json.dumps({"rows": [GOOD, {"prompt": "a", "completion": "\ud800"}]}))
    (rejected,) = collect(path).rejected
    assert "\\ud800" in rejected.content
    rejected.content.encode("utf-8")


@pytest.mark.parametrize("text", ["\\ud83d", "a\\u0000b"])
@pytest.mark.parametrize("part", ["group", "tags"])
def test_what_cannot_be_stored_as_a_group_or_a_tag_is_a_rejected_row(tmp_path, text, part):
    columns = Columns(group="g") if part == "group" else Columns(tags=("g",))
    path = jsonl(tmp_path, GOOD, f'{{"prompt": "a", "completion": "b", "g": "{text}"}}')
    found = collect(path, columns=columns)
    assert (len(found.rows), [reject.reason for reject in found.rejected]) == (1, ["not_text"])


@pytest.mark.parametrize(
    "row",
    [
        '{"prompt": "q", "completion": "a1", "completion": "a9"}',
        '{"messages": [{"role": "user", "content": "q"}, '
        '{"role": "assistant", "content": "a", "content": "b"}]}',
    ],
)
def test_a_key_that_is_there_twice_is_a_rejected_row(tmp_path, row):
    good = GOOD if "prompt" in row else row.replace(', "content": "b"', "")
    (reject,) = collect(jsonl(tmp_path, good, row)).rejected
    assert (reject.line, reject.reason) == (2, "repeated_key")


def test_a_passage_as_group_is_named_by_its_hash_and_a_short_name_stays():
    passages = ["a passage of many words " * 100 + end for end in "ab"]
    assert name_group("customer 7") == "customer 7"
    assert len({name_group(passage) for passage in passages}) == 2
    assert all(len(name_group(passage)) == 39 for passage in passages)
    assert name_group(passages[0]) == name_group(passages[0])


@pytest.mark.parametrize("role", ["system", "developer"])
def test_a_system_message_within_a_conversation_is_a_bad_row_with_a_fix(tmp_path, role):
    talk = [("system", "s"), ("user", "hi"), (role, "late"), ("assistant", "hello")]
    good = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    path = jsonl(tmp_path, good, {"messages": [{"role": who, "content": text} for who, text in talk]})
    (rejected,) = collect(path).rejected
    assert rejected.line == 2 and "fix: write its text into the first" in rejected.detail


def test_rows_without_tools_keep_the_ids_and_the_file_that_they_had_before_tools_were_read(tmp_path):
    chats = [
        [
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": "hi", "name": "anna"},
            {"role": "assistant", "content": "hello"},
            {"role": "user", "content": [{"type": "text", "text": "grüße ☀"}]},
            {"role": "assistant", "content": "on its way", "tool_calls": None},
            {"role": "user", "content": "wrong"},
            {"role": "assistant", "content": "no", "weight": 0},
        ],
        [{"from": "human", "value": "a"}, {"from": "gpt", "value": '{"a": [1, 2.50]}'}],
    ]
    path = jsonl(tmp_path, *({"messages": chat, "tools": None} for chat in chats))
    rows = collect(path).rows
    # As the version gave them that rejected all calls.
    assert [row.id for row in rows] == ["ec19fecb7144d062", "2f44d0dcae49c536"]
    plain = [
        replace(row, messages=tuple(Message(m.role, m.content) for m in row.messages), tools=())
        for row in rows
    ]
    write_rows(tmp_path / "new.parquet", rows)
    write_rows(tmp_path / "old.parquet", plain)
    assert (tmp_path / "new.parquet").read_bytes() == (tmp_path / "old.parquet").read_bytes()


@pytest.mark.parametrize("as_text", [False, True])
def test_keys_of_turns_that_are_not_read_are_counted_like_columns(tmp_path, as_text):
    turns = [
        {"role": "user", "content": "hi", "name": "ann", "created_at": None},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}],
        },
        {"role": "tool", "content": "x", "name": "f"},
        {"role": "assistant", "content": "yes", "masked": True, "weight": 1, "refusal": None},
    ]
    plain = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "annotations": []}]
    path = jsonl(
        tmp_path,
        *({"messages": json.dumps(chat) if as_text else chat, "note": "n"} for chat in (turns, turns, plain)),
    )
    assert collect(path).metrics["unread_columns"] == {
        "messages[].masked": 2,
        "messages[].name": 2,
        "note": 3,
    }


def test_a_json_document_of_one_conversation_is_one_row_whatever_lists_it_has(tmp_path):
    tool = {"type": "function", "function": {"name": "lamp"}}
    call = {"name": "lamp", "arguments": {}}
    turns = [{"role": "user", "content": "on"}, {"role": "assistant", "content": None, "tool_calls": [call]}]
    for document in (
        {"messages": turns, "tools": [tool]},
        {"query": "on", "tools": [tool], "answers": [call]},
    ):
        (tmp_path / "row.json").write_text(json.dumps(document, indent=2))
        (row,) = collect(tmp_path / "row.json").rows
        assert (row.question, row.tools[0].name, row.messages[-1].tool_calls[0].name) == (
            "on",
            "lamp",
            "lamp",
        )


@pytest.mark.parametrize("suffix", ["jsonl", "json"])
def test_a_key_given_twice_in_the_arguments_of_a_call_is_an_error_of_its_row(tmp_path, suffix):
    call = '{"function": {"name": "lamp", "arguments": {"on": 1, "on": 2}}}'
    turn = f'{{"role": "assistant", "tool_calls": [{call}]}}'
    bad = f'{{"messages": [{{"role": "user", "content": "on"}}, {turn}]}}'
    lines = f"{bad}\n{json.dumps(GOOD_CHAT)}\n"
    path = tmp_path / f"rows.{suffix}"
    path.write_text(lines if suffix == "jsonl" else f"[{bad},\n{json.dumps(GOOD_CHAT)}]")
    collected = collect(path)
    assert len(collected.rows) == 1
    assert [(r.line, r.reason) for r in collected.rejected] == [(1, "repeated_key")]
    assert "'on'" in collected.rejected[0].detail
