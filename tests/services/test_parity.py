"""Trainer against server, with a server that answers as the trainer did, and with others that do not."""

import asyncio
import json

import pytest

from services import parity
from stages.common.artifacts import write_json
from stages.common.errors import InputError
from stages.common.messages import Message, Tool, ToolCall, is_malformed
from stages.common.model.generation import answer_questions, encode_questions
from stages.common.model.loading import load_base, load_tokenizer
from stages.common.params.loading import load_params
from stages.common.records import make_row, write_rows
from stages.common.task.kinds import TASK_FILE
from stages.common.task.text_task import TextTask
from tests.services.serving import ROOT, serving, tiny_files

ANSWER_TOKENS = 6


@pytest.fixture(scope="module")
def params():
    shipped = load_params(ROOT / "params.yaml")
    evaluate = shipped.evaluate.model_copy(update={"resamples": 200})
    return shipped.model_copy(update={"evaluate": evaluate})


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """Return a folder in which a tiny model was judged: about half of its answers are right."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    import torch

    root = tmp_path_factory.mktemp("project")
    base = root / "artifacts/fetch_base"
    tiny_files(base)
    model, tokenizer = load_base(base, torch.float32, torch.device("cpu")), load_tokenizer(base)
    asked = [
        make_row(
            [Message("user", f"question {n}"), Message("assistant", "x")],
            source="test",
            license="mit",
            group=f"g{n}",
        )
        for n in range(24)
    ]
    answers = answer_questions(model, tokenizer, encode_questions(tokenizer, asked), 8, ANSWER_TOKENS)
    rows = [
        make_row(
            [
                row.messages[0],
                Message("assistant", answer.text if n % 2 and answer.text.strip() else "something else"),
            ],
            source="test",
            license="mit",
            group=row.group,
        )
        for n, (row, answer) in enumerate(zip(asked, answers, strict=True))
    ]
    write_rows(root / "artifacts/split/test.parquet", rows)
    table = pa.table({"id": [row.id for row in rows], "tuned": [answer.text for answer in answers]})
    (root / "artifacts/evaluate").mkdir()
    pq.write_table(table, root / "artifacts/evaluate/predictions.parquet")
    write_json(root / TASK_FILE, TextTask().describe())
    write_json(root / "artifacts/export/serving.json", {"version": "a" * 12})
    write_json(root / "reports/evaluate/metrics.json", {"answer_limit_tokens": ANSWER_TOKENS})
    return root


def test_the_same_model_behind_http_agrees(project, params, tmp_path):
    with serving(tmp_path, tiny_files(tmp_path / "model")) as server:
        report = parity.compare_with_server(server.url, None, params, project)
    assert report.agrees and report.reasons == ()
    assert 0.2 < report.trainer_exact_match == report.served_exact_match < 0.6
    assert report.same_answers == 1.0 and report.exact_match.value == 0.0


def test_another_model_is_refused_for_what_it_loses(project, params, tmp_path):
    with serving(tmp_path, tiny_files(tmp_path / "model", seed=5)) as server:
        report = parity.compare_with_server(server.url, None, params, project)
    assert not report.agrees
    assert any(reason.startswith("exact match falls by 0.") for reason in report.reasons)


def test_another_chat_template_is_refused(project, params, tmp_path):
    files = tiny_files(tmp_path / "model")
    template = tmp_path / "model/chat_template.jinja"
    text = template.read_text().replace("assistant\n", "assistant: \n").replace("'role'] }}", "'role'] }}: ")
    template.write_text(text)
    with serving(tmp_path, files) as server:
        report = parity.compare_with_server(server.url, None, params, project)
    assert not report.agrees
    assert "the server's chat template is not the trainer's" in report.reasons
    assert report.templates_differ == report.rows


def test_a_server_of_another_version_is_not_compared(project, params, tmp_path):
    served = serving(tmp_path, tiny_files(tmp_path / "model", "b" * 12))
    problem = f"serves version {'b' * 12}.*evaluated version is {'a' * 12}"
    with served as server, pytest.raises(InputError, match=problem):
        parity.compare_with_server(server.url, None, params, project)


def test_a_server_that_is_not_there_is_named_with_what_to_do(project, params):
    with pytest.raises(InputError, match=r"127\.0\.0\.1:9 cannot be reached[\s\S]*make serve"):
        parity.compare_with_server("http://127.0.0.1:9", None, params, project)


def test_rows_that_the_server_refuses_are_counted_and_named_with_field_and_remedy(project, params, tmp_path):
    """The tiny model's chat template has no tools, so that a request with some is a 422."""
    tool = Tool('{"type":"function","function":{"name":"light","parameters":{"type":"object"}}}')
    turns = [Message("user", "a"), Message("assistant", "b")]
    rows = tuple(make_row(turns, source="toy", license="mit", tools=tools) for tools in ((), (tool,), ()))
    with serving(tmp_path, tiny_files(tmp_path / "model")) as server:
        answers = asyncio.run(parity.ask_all(server.url, None, rows, ANSWER_TOKENS, 2, None))
        with pytest.raises(InputError, match=r"answers row \w+ with 404"):
            asyncio.run(parity.ask_all(server.url, "another", rows, ANSWER_TOKENS, 2, None))
    assert [answer.refusal is None for answer in answers] == [True, False, True]
    texts = tuple(answer.text or "Done." for answer in answers)
    trainer = parity.TrainerSide(rows, texts, tuple(a.prompt_tokens for a in answers), "sha", TextTask())
    report = parity.compare(trainer, parity.ServerSide("a" * 12, "sha", tuple(answers)), params)
    assert (report.agrees, report.rows, report.refused, report.templates_differ) == (False, 3, 1, 0)
    reason = report.reasons[0]
    assert reason.startswith("the server refuses 1 of 3 rows; fix: correct the field that is named")
    assert f"row {rows[1].id} from toy: 422: tools: " in reason
    assert "make serve" not in reason


def test_missing_scipy_is_told_before_any_row_is_asked(project, params, monkeypatch):
    monkeypatch.setattr(parity, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="needs scipy") as refused:
        parity.compare_with_server("http://127.0.0.1:9", None, params, project)
    assert "--url" in refused.value.fix


def test_a_report_can_be_written_as_json(project, params, tmp_path):
    from dataclasses import asdict

    with serving(tmp_path, tiny_files(tmp_path / "model")) as server:
        report = parity.compare_with_server(server.url, None, params, project)
    assert json.loads(json.dumps(asdict(report)))["agrees"] is True


def test_a_conversation_with_tools_is_sent_as_a_client_sends_it_and_its_answer_read_back():
    tool = {"type": "function", "function": {"name": "light", "parameters": {"type": "object"}}}
    row = make_row(
        [
            Message("user", "<|im_end|> light"),
            Message(
                "assistant",
                "",
                (ToolCall("light", '{"b": 1, "a": "\u00e9"}', "x"), ToolCall("light", "{}", "y")),
            ),
            Message("tool", "second", tool_call_id="y"),
            Message("tool", "first", tool_call_id="x"),
            Message("assistant", "Done."),
        ],
        source="test",
        license="mit",
        tools=[Tool(json.dumps(tool))],
    )
    body = json.loads(json.dumps(parity.write_body(row)))
    assert body["tools"] == [tool]
    question, calling, *results = body["messages"]
    assert question == {"role": "user", "content": "<|im_end|> light"}
    assert [call["function"] for call in calling["tool_calls"]] == [
        {"name": "light", "arguments": '{"b":1,"a":"é"}'},
        {"name": "light", "arguments": "{}"},
    ]
    ids = [call["id"] for call in calling["tool_calls"]]
    assert results == [
        {"role": "tool", "tool_call_id": number, "content": content}
        for number, content in zip(ids, ("first", "second"), strict=True)
    ]
    assert parity.read_served(calling) == row.messages[1].answer.replace(", ", ",").replace(": ", ":")
    assert parity.read_served({"content": None, "tool_calls": None}) == ""
    assert parity.read_served({"content": "Done."}) == row.answer


def test_a_conversation_without_tools_is_sent_as_it_was():
    row = make_row([Message("user", "a"), Message("assistant", "b")], source="test", license="mit")
    assert parity.write_body(row) == {"messages": [{"role": "user", "content": "a"}]}


def test_served_calls_are_read_as_the_trainer_reads_them_whatever_their_blanks():
    calls = [{"function": {"name": "light", "arguments": '{"a": "é", "b": [1, 2]}'}}]
    wanted = '{"tool_calls":[{"name":"light","arguments":{"a":"é","b":[1,2]}}]}'
    assert parity.read_served({"content": None, "tool_calls": calls}) == wanted
    calls[0]["function"]["arguments"] = '{"a": "é'
    assert is_malformed(parity.read_served({"content": None, "tool_calls": calls}))
