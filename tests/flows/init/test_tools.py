"""`init` on conversations with tools: format and kind are named, and the stages take the rows."""

import json
from pathlib import Path

import pytest
import yaml

from stages import collect
from stages.check_bias import __main__ as check_bias
from stages.common.artifacts import read_json, read_lines
from stages.common.records import read_rows
from stages.curate import __main__ as curate
from stages.split import __main__ as split
from stages.validate import __main__ as validate
from tests.flows.init.test_command import chat, entry, project, run, write_jsonl, written

__all__ = ["project"]  # a fixture of every test here

CITIES = ("Rome", "Oslo", "Lima", "Quito", "Accra", "Turku", "Lyon", "Bern", "Cork", "Graz", "Hanoi", "Kyoto")
TIMES = ("today", "tomorrow", "on Monday", "at noon", "this week")
ASKED = [(f"{'How warm' if n % 2 else 'How wet'} will {city} be {time}?", n % 2, city)
         for n, (city, time) in enumerate((city, time) for city in CITIES for time in TIMES)]  # fmt: skip


def schema(name):
    properties = {"city": {"type": "string"}}
    parameters = {"type": "object", "properties": properties, "required": ["city"]}
    return {"name": name, "description": f"Look up {name}.", "parameters": parameters}


TOOLS = [schema("warmth"), schema("rain")]
NAMES = ("rain", "warmth")


def openai(question, number, city):
    call = {"name": NAMES[number], "arguments": json.dumps({"city": city})}
    turns = [
        {"role": "user", "content": question},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "c1", "type": "function", "function": call}],
        },
        {"role": "tool", "tool_call_id": "c1", "content": "17"},
        {"role": "assistant", "content": f"It is 17 in {city}."},
    ]
    tools = [{"type": "function", "function": tool} for tool in TOOLS]
    return {"messages": turns, "tools": tools, "parallel_tool_calls": False}


def sharegpt(question, number, city):
    call = json.dumps({"name": NAMES[number], "arguments": {"city": city}})
    turns = ("human", question), ("function_call", call), ("observation", "17"), ("gpt", "It is 17.")
    return {
        "conversations": [{"from": role, "value": text} for role, text in turns],
        "tools": json.dumps(TOOLS),
    }


def hermes(question, number, city):
    call = json.dumps({"name": NAMES[number], "arguments": {"city": city}})
    system = f"Answer briefly. Call the functions in <tools>{json.dumps(TOOLS)}</tools>"
    turns = (
        ("system", system),
        ("human", question),
        ("gpt", f"<tool_call>\n{call}\n</tool_call>"),
        ("tool", "<tool_response>\n17\n</tool_response>"),
        ("gpt", "It is 17."),
    )
    return {"conversations": [{"from": role, "value": text} for role, text in turns]}


def xlam(question, number, city):
    parameters = {"city": {"type": "str", "description": "Where."}}
    tools = [{"name": name, "description": name, "parameters": parameters} for name in NAMES]
    answers = [{"name": NAMES[number], "arguments": {"city": city}}]
    return {"query": question, "tools": json.dumps(tools), "answers": json.dumps(answers)}


@pytest.mark.parametrize(
    ("make", "shape", "form"),
    [
        (openai, "chat", "tool_calls (60 rows)"),
        (sharegpt, "sharegpt", "turns of the role function_call (60 rows)"),
        (hermes, "sharegpt", "Hermes <tool_call> in texts (60 rows)"),
        (xlam, "calls", "calls in a column (xLAM) (60 rows)"),
    ],
)
def test_each_format_is_named_and_passes_all_stages_up_to_the_split(capsys, make, shape, form):
    assert run(write_jsonl("data/agent.jsonl", [make(*asked) for asked in ASKED])) == 0
    report = capsys.readouterr().out
    assert form in report
    assert "tools        2, at most 2 in a row" in report
    assert f"in {1 if make is xlam else 0.5:.0%} of" in report
    assert "classes      2: " in report
    params = written()
    task = params["task"]
    assert (task["kind"], task["stratify_by"], task["system_prompt"]) == ("tools", "label", None)
    assert entry()["shape"] == shape
    params["check_bias"]["groups"] = {"source": {"min_representation_ratio": None, "max_cramers_v": None}}
    with open("params.yaml", "w") as file:
        yaml.safe_dump(params, file, sort_keys=False)
    for stage in (collect, curate, validate, check_bias, split):
        stage.main()
    assert list(read_lines(Path("artifacts/curate/rejects.jsonl"))) == []
    rows = [row for side in ("train", "validation", "test") for row in read_rows_of(side)]
    assert len(rows) > 40
    assert all(row.tools and any(m.tool_calls for m in row.messages) for row in rows)
    assert read_json(Path("artifacts/curate/task.json"))["kind"] == "tools"


def read_rows_of(side):
    return read_rows(Path("artifacts/split") / f"{side}.parquet")


def test_the_key_parallel_tool_calls_is_named_as_not_read(capsys):
    assert run(write_jsonl("data/agent.jsonl", [openai(*asked) for asked in ASKED])) == 0
    assert "not read     parallel_tool_calls" in capsys.readouterr().out


def test_texts_in_several_turns_are_a_chat(capsys):
    talks = [
        {"messages": [*chat(f"hi {n}", f"hello {n}")["messages"], *chat(f"and {n}?", f"so {n}.")["messages"]]}
        for n in range(20)
    ]
    assert run(write_jsonl("data/talks.jsonl", talks)) == 0
    assert written()["task"]["kind"] == "chat"
    assert "turns        2.0 questions in a conversation (mean), 2 (most)" in capsys.readouterr().out


def test_labels_after_several_turns_stay_labels():
    talks = [
        {
            "messages": [
                *chat(f"hi {n}", f"hello {n}")["messages"],
                *chat(f"and {n}?", "ab"[n % 2])["messages"],
            ]
        }
        for n in range(20)
    ]
    assert run(write_jsonl("data/talks.jsonl", talks), "--kind", "label") == 0
    assert written()["task"]["kind"] == "label"


def test_files_with_and_without_calls_are_tools_together():
    write_jsonl("data/agent.jsonl", [openai(*asked) for asked in ASKED])
    write_jsonl("data/texts.jsonl", [chat(f"hi {n}", f"hello {n}") for n in range(20)])
    assert run("data") == 0
    assert written()["task"]["kind"] == "tools"


def test_the_kind_tools_without_a_call_is_an_error(capsys):
    path = write_jsonl("data/texts.jsonl", [chat(f"hi {n}", f"hello {n}") for n in range(20)])
    assert run(path, "--kind", "tools") == 1
    assert "no row has a call" in capsys.readouterr().err


def test_one_tool_is_enough(capsys):
    calls = [openai(question, 1, city) for question, _, city in ASKED]
    assert run(write_jsonl("data/agent.jsonl", [{**one, "tools": one["tools"][:1]} for one in calls])) == 0
    assert "tools        1, at most 1 in a row" in capsys.readouterr().out
    params = written()
    assert (params["validate"]["min_labels"], params["validate"]["max_label_share"]) == (1, 1.0)
    assert params["model_card"]["intended_use"].startswith("Call 1 tool, ")
    for stage in (collect, curate, validate):
        stage.main()


def test_tools_longer_than_the_limit_of_a_prompt_raise_it_and_validate_takes_the_rows():
    rows = [openai(*asked) for asked in ASKED]
    for one in rows:
        one["tools"][0] = {"type": "function", "function": {**schema("warmth"), "description": "w " * 6000}}
    assert run(write_jsonl("data/agent.jsonl", rows)) == 0
    assert written()["validate"]["max_prompt_chars"] > 12_000
    for stage in (collect, curate, validate):
        stage.main()
