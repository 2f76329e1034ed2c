"""`init` on data of every shape: what it writes loads, and in doubt it writes nothing."""

import csv
import gzip
import json
from pathlib import Path

import pytest
import yaml

from flows.init.__main__ import main
from flows.init.estimate import estimate_tokens
from stages import collect
from stages.check_bias import __main__ as check_bias
from stages.common.artifacts import read_json
from stages.common.params.loading import load_params
from stages.common.sources.detection import survey
from stages.common.sources.files.formats import FormatOptions
from stages.common.sources.files.rows import collect_file
from stages.common.sources.files.shapes import Columns
from stages.curate import __main__ as curate
from stages.split import __main__ as split
from stages.validate import __main__ as validate

SHIPPED = Path(__file__).parents[3] / "params.yaml"
QUESTIONS = ("Where is my parcel {}?", "I want my money back for order {}", "My card {} was stolen")
LABELS = ("track", "refund", "card stolen")
PAIRS = [(QUESTIONS[n % 3].format(n), LABELS[n % 3]) for n in range(60)]


@pytest.fixture(autouse=True)
def project(tmp_path, monkeypatch):
    """A project with the shipped parameters and an empty data folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "params.yaml").write_bytes(SHIPPED.read_bytes())
    return tmp_path


def run(data, *options, license="cc-by-4.0"):
    return main([str(data), "--license", license, *options])


def written():
    load_params("params.yaml")
    return yaml.safe_load(Path("params.yaml").read_text(encoding="utf-8"))


def entry():
    return written()["collect"]["sources"][0]


def write_csv(path, rows, header=("text", "label"), delimiter=",", encoding="utf-8"):
    with open(path, "w", newline="", encoding=encoding) as file:
        csv.writer(file, delimiter=delimiter).writerows([header, *rows])
    return path


def write_jsonl(path, rows):
    Path(path).write_text(
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8"
    )
    return path


def chat(question, answer, **last):
    return {
        "messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer, **last}]
    }


def test_passages_with_their_questions_fit_the_limits_and_no_row_is_too_long(capsys):
    passage = "the old bridge near the river was built of silver stone in winter " * 50
    rows = [
        {"question": f"Context: {n} {passage}\n\nQuestion: what is {n}?", "answer": f"a bridge, {n}"}
        for n in range(40)
    ]
    assert run(write_jsonl("data/rag.jsonl", rows)) == 0
    params = written()
    longest = max(len(one["question"]) for one in rows)
    assert longest > yaml.safe_load(SHIPPED.read_text())["curate"]["max_question_chars"]
    assert longest <= params["curate"]["max_question_chars"] <= params["validate"]["max_prompt_chars"]
    assert longest / 4 < params["finetune"]["max_length"] <= params["services"]["engine"]["context_tokens"]
    assert params["services"]["guard"]["max_prompt_tokens"] >= params["finetune"]["max_length"]
    assert "too long" not in capsys.readouterr().out
    before = Path("params.yaml").read_bytes()
    assert run("data/rag.jsonl") == 0 and Path("params.yaml").read_bytes() == before


def test_a_long_conversation_that_is_learned_is_served():
    turns = [{"role": role, "content": f"word {n}"} for n in range(40) for role in ("user", "assistant")]
    rows = [{"messages": turns}, *(chat(f"q {n}", "a") for n in range(9))]
    assert run(write_jsonl("data/talks.jsonl", rows)) == 0
    assert written()["services"]["guard"]["max_messages"] == len(turns) - 1


def test_texts_in_other_scripts_have_more_tokens_than_english_of_their_length():
    hindi, chinese, english = "दिल्ली में मौसम कैसा है" * 10, "北京的天气怎么样" * 10, "How is the weather" * 10
    assert estimate_tokens(hindi) > len(hindi) and estimate_tokens(chinese) > len(chinese)
    assert estimate_tokens(english) == round(len(english) / 4)


def test_an_empty_system_prompt_is_none(capsys):
    write_csv("data/support.csv", PAIRS)
    for options, prompt in (((), "Answer with one label."), (("--system-prompt", ""), None)):
        assert run("data/support.csv", *options) == 0
        assert written()["task"]["system_prompt"] == prompt


def test_a_label_file_becomes_a_task_with_labels(capsys):
    assert run(write_csv("data/support.csv", PAIRS)) == 0
    params = written()
    assert params["task"]["kind"] == "label"
    assert params["task"]["stratify_by"] == "label"
    assert params["task"]["label_key"] is None
    assert params["collect"]["sources"] == [
        {
            "kind": "file",
            "path": "data/support.csv",
            "license": "cc-by-4.0",
            "shape": "pair",
            "prompt_column": "text",
            "completion_column": "label",
        },
        {"kind": "feedback", "path": "data/feedback/rows.jsonl"},
    ]
    card = params["model_card"]
    assert card["name"].startswith("support-")
    assert "3 labels: track, refund, card stolen" in card["intended_use"]
    assert "home" not in json.dumps(card)
    # Few rows are seen more than once, in small steps.
    assert {key: params["finetune"][key] for key in ("epochs", "batch_size", "learning_rate")} == {
        "epochs": 10,
        "batch_size": 4,
        "learning_rate": 0.003,
    }
    printed = capsys.readouterr().out
    assert "60 rows (csv, utf-8, delimiter ',')" in printed
    assert "classes      3: 'track' 33%" in printed
    assert "make run" in printed


def test_many_rows_are_learned_in_large_steps():
    many = [(f"{question} number {i}", label) for i in range(100) for question, label in PAIRS]
    assert run(write_csv("data/support.csv", many)) == 0
    finetune = written()["finetune"]
    assert (finetune["epochs"], finetune["batch_size"], finetune["learning_rate"]) == (1, 16, 0.001)


def test_a_file_in_a_code_page_is_read_with_the_same_encoding_by_collect(capsys):
    rows = [(f"{question} – größer?", label) for question, label in PAIRS]
    run(write_csv("data/a.csv", rows, header=("Frage", "Art"), delimiter=";", encoding="cp1252"))
    assert "cp1252 (guessed: check the example below)" in capsys.readouterr().out
    assert entry()["encoding"] == "cp1252"
    options = FormatOptions(encoding=entry()["encoding"])
    found = collect_file(Path("data/a.csv"), "mit", "human", options, Columns(), None, "stop")
    assert found.rows[0].question == rows[0][0]


def test_json_answers_are_a_task_with_the_key_of_the_class():
    rows = [chat(q, json.dumps({"intent": label, "n": n})) for n, (q, label) in enumerate(PAIRS)]
    run(write_jsonl("data/calls.jsonl", rows))
    task = written()["task"]
    assert (task["kind"], task["label_key"], task["stratify_by"]) == ("json", "intent", "label")
    assert task["system_prompt"] == "Answer with one JSON object."
    assert entry()["messages_column"] == "messages"


def test_alpaca_is_a_text_task_with_its_input():
    rows = [
        {"instruction": "Count.", "input": f"item {n}", "output": f"There are {n} of them."}
        for n in range(60)
    ]
    Path("data/alpaca.json").write_text(json.dumps(rows))
    run("data/alpaca.json")
    task = written()["task"]
    assert (task["kind"], task["stratify_by"], task["system_prompt"]) == ("text", None, None)
    assert (entry()["shape"], entry()["context_column"]) == ("alpaca", "input")


def test_rows_with_their_own_system_message_get_no_other():
    rows = [chat(q, label) for q, label in PAIRS]
    for row in rows:
        row["messages"].insert(0, {"role": "system", "content": "Sort the request."})
    run(write_jsonl("data/a.jsonl", rows))
    assert written()["task"]["system_prompt"] is None


def test_rejected_rows_are_shown_with_their_line_and_reason(capsys):
    rows = [*(chat(q, label) for q, label in PAIRS), chat("bad", "answer", weight=0)]
    run(write_jsonl("data/a.jsonl", rows))
    printed = capsys.readouterr().out
    assert "rejected     1 row: 1 weight_zero" in printed
    assert "line 61: weight_zero" in printed


def test_what_is_suspicious_is_shown(capsys):
    rows = [
        *PAIRS,
        PAIRS[0],
        (PAIRS[1][0], "track"),
        ("mail me at a@perennial-mail.net", "track"),
        ("Ã¼ber", "Track"),
    ]
    run(write_csv("data/a.csv", rows))
    printed = capsys.readouterr().out
    assert "duplicates   1 row" in printed
    assert "conflicts    2 rows" in printed
    assert "email in 1 row: curate drops them" in printed
    assert "wrong encoding: 1 row" in printed
    assert "classes that differ only in case or space" in printed


def test_many_rows_are_sampled_and_a_class_of_the_last_rows_is_there(capsys, monkeypatch):
    monkeypatch.setattr(survey, "MAX_SAMPLED_ROWS", 100)
    many = [(f"{question} number {i}", label) for i in range(20) for question, label in PAIRS]
    rare = [(f"a rare question {n} " + "x" * 3000 * (n % 2), "rare") for n in range(200)]
    assert run(write_csv("data/support.csv", [*many, *rare])) == 0
    printed = capsys.readouterr().out
    assert "1,400 rows" in printed and "classes      4: " in printed
    assert "are from 100 of 1,400 rows drawn at random" in printed and "tokens       about " in printed
    assert "4 labels: track, refund, card stolen, rare" in written()["model_card"]["intended_use"]
    assert written()["curate"]["max_question_chars"] > 3000


def test_running_it_again_changes_nothing(capsys):
    path = write_csv("data/support.csv", PAIRS)
    run(path)
    once = Path("params.yaml").read_bytes()
    capsys.readouterr()
    run(path)
    assert Path("params.yaml").read_bytes() == once
    assert "nothing to change" in capsys.readouterr().out


def test_a_dry_run_writes_nothing(capsys, tmp_path):
    path = write_csv(tmp_path / "elsewhere.csv", PAIRS)
    assert run(path, "--dry-run") == 0
    assert Path("params.yaml").read_bytes() == SHIPPED.read_bytes()
    assert list(Path("data").iterdir()) == []
    assert "nothing written" in capsys.readouterr().out


def test_a_file_elsewhere_is_copied_under_data(tmp_path):
    path = write_csv(tmp_path / "elsewhere.csv", PAIRS)
    run(path)
    assert entry()["path"] == "data/elsewhere.csv"
    assert Path("data/elsewhere.csv").read_bytes() == path.read_bytes()
    run(path)


def test_another_file_of_that_name_under_data_is_kept(tmp_path, capsys):
    Path("data/a.csv").write_text("precious")
    assert run(write_csv(tmp_path / "a.csv", PAIRS)) == 1
    assert "data/a.csv exists and is another file" in capsys.readouterr().err
    assert Path("data/a.csv").read_text() == "precious"
    assert Path("params.yaml").read_bytes() == SHIPPED.read_bytes()


def test_a_folder_gives_one_source_a_file_and_leaves_feedback_out(tmp_path):
    folder = tmp_path / "rows"
    (folder / "de").mkdir(parents=True)
    write_csv(folder / "a.csv", PAIRS)
    (folder / "de" / "b.jsonl.gz").write_bytes(
        gzip.compress("".join(json.dumps({"text": q, "label": a}) + "\n" for q, a in PAIRS).encode())
    )
    (folder / "README.md").write_text("about")
    run(folder)
    assert [source["path"] for source in written()["collect"]["sources"]] == [
        "data/rows/a.csv",
        "data/rows/de/b.jsonl.gz",
        "data/feedback/rows.jsonl",
    ]
    assert written()["model_card"]["name"].startswith("rows-") or written()["model_card"]["name"]


def test_the_folder_data_itself_is_read_without_its_feedback():
    write_csv("data/a.csv", PAIRS)
    Path("data/feedback").mkdir()
    write_jsonl("data/feedback/rows.jsonl", [chat("a", "b")])
    run("data")
    assert [source["path"] for source in written()["collect"]["sources"]] == [
        "data/a.csv",
        "data/feedback/rows.jsonl",
    ]


def test_tags_and_groups_are_written_and_balance_is_measured():
    rows = [(q, label, ["gold", "silver"][n % 2], n // 3) for n, (q, label) in enumerate(PAIRS)]
    write_csv("data/a.csv", rows, header=("text", "label", "plan", "customer"))
    run("data/a.csv", "--tag-columns", "plan", "--group-column", "customer")
    params = written()
    assert entry()["tag_columns"] == ["plan"]
    assert entry()["group_column"] == "customer"
    assert "plan" in params["task"]["slices"]
    assert params["check_bias"]["groups"]["plan"] == {"min_representation_ratio": None, "max_cramers_v": None}
    assert "platform" not in params["check_bias"]["groups"]


def passages(rows_a_passage, number=120):
    return [
        {
            "question": f"What is {n}?",
            "context": f"The passage {n // rows_a_passage}.",
            "answer": f"it is {n}",
        }
        for n in range(number)
    ]


def test_questions_about_one_passage_are_one_group(capsys):
    run(write_jsonl("data/a.jsonl", passages(4)))
    assert entry()["group_column"] == "context"
    assert "rows with the same context stay on one side" in capsys.readouterr().out
    before = Path("params.yaml").read_bytes()
    assert run("data/a.jsonl") == 0 and Path("params.yaml").read_bytes() == before
    run("data/a.jsonl", "--group-column", "question")
    assert entry()["group_column"] == "question"


@pytest.mark.parametrize("name", ["session_id", "ThreadId", "conversation-id"])
def test_rows_of_one_session_are_one_group(capsys, name):
    rows = [{**row, name: f"s{n // 3}" if n % 5 else None} for n, row in enumerate(passages(4))]
    run(write_jsonl("data/a.jsonl", rows))
    assert entry()["group_column"] == name
    assert f"rows with the same {name} stay on one side" in capsys.readouterr().out


@pytest.mark.parametrize("rows_a_session", [1, 12, 120])
def test_sessions_of_one_row_and_a_few_for_all_rows_are_no_groups(rows_a_session):
    rows = [{**row, "session_id": n // rows_a_session} for n, row in enumerate(passages(1))]
    run(write_jsonl("data/a.jsonl", rows))
    assert "group_column" not in entry()


@pytest.mark.parametrize("rows_a_passage", [1, 12, 120])
def test_passages_of_their_own_and_a_few_for_all_rows_are_no_groups(rows_a_passage):
    run(write_jsonl("data/a.jsonl", passages(rows_a_passage)))
    assert "group_column" not in entry()


def test_a_licence_that_is_passed_on_is_that_of_the_model(capsys):
    run(write_csv("data/a.csv", PAIRS), license="CC-BY-SA-4.0")
    params = written()
    assert params["model_card"]["license"] == "cc-by-sa-4.0"
    assert "cc-by-sa-4.0" in params["validate"]["allowed_licenses"]


def test_a_permissive_licence_leaves_the_model_that_of_its_base():
    run(write_csv("data/a.csv", PAIRS), license="MIT")
    assert written()["model_card"]["license"] == written()["fetch_base"]["license"]


def refused(capsys):
    assert Path("params.yaml").read_bytes() == SHIPPED.read_bytes()
    return capsys.readouterr().err


def test_an_unknown_licence_is_refused(capsys):
    assert run(write_csv("data/a.csv", PAIRS), license="cc-by-4") == 1
    assert "did you mean cc-by-4.0?" in refused(capsys)


def test_an_empty_licence_or_path_is_refused(capsys):
    assert run(write_csv("data/a.csv", PAIRS), license="") == 1
    assert "not an SPDX expression" in refused(capsys)
    assert run("") == 1
    assert "give a file or a folder of rows" in refused(capsys)


def test_a_missing_file_and_an_empty_one_are_refused(capsys):
    write_csv("data/support.csv", PAIRS)
    assert run("data/suport.csv") == 1
    assert "did you mean support.csv?" in refused(capsys)
    Path("data/empty.csv").touch()
    assert run("data/empty.csv") == 1
    assert "is empty" in refused(capsys)


def test_a_file_of_bad_rows_is_refused(capsys):
    assert run(write_jsonl("data/a.jsonl", [chat("q", "", weight=0)] * 9)) == 1
    assert "all 9 are bad" in refused(capsys)


def test_columns_in_doubt_are_named_with_the_options_that_decide(capsys):
    write_csv("data/a.csv", [(f"text {n}", f"other {n}") for n in range(60)], header=("left", "right"))
    assert run("data/a.csv") == 1
    printed = refused(capsys)
    assert "left: 'text 0'" in printed
    assert "fix: set --prompt-column and --completion-column\n" in printed
    assert run("data/a.csv", "--prompt-column", "left") == 0
    assert entry()["completion_column"] == "right"


def test_a_file_without_a_header_needs_the_names_of_its_columns(capsys):
    write_csv("data/a.csv", [(label, question) for question, label in PAIRS[1:]], header=PAIRS[0][::-1])
    assert run("data/a.csv") == 1
    assert "or set --column-names" in refused(capsys)
    assert run("data/a.csv", "--column-names", "label, text") == 0
    assert entry()["column_names"] == ["label", "text"]


def test_a_kind_in_doubt_is_named_with_the_option_that_decides(capsys):
    write_csv("data/a.csv", [(f"text {n}", f"class {n // 2}") for n in range(60)])
    assert run("data/a.csv") == 1
    assert "choose with --kind: label" in refused(capsys)
    assert run("data/a.csv", "--kind", "label") == 0
    assert written()["task"]["kind"] == "label"


def test_files_of_different_kinds_are_refused(capsys):
    write_csv("data/a.csv", PAIRS)
    write_jsonl(
        "data/b.jsonl", [chat(f"question {n}", f"A long answer of its own, number {n}.") for n in range(60)]
    )
    assert run("data") == 1
    assert "data/a.csv is label, data/b.jsonl is text" in refused(capsys)


def test_params_that_are_wrong_before_are_not_touched(capsys):
    text = SHIPPED.read_text(encoding="utf-8").replace("on_bad_row: reject", "on_bad_rows: reject")
    Path("params.yaml").write_text(text, encoding="utf-8")
    assert run(write_csv("data/a.csv", PAIRS)) == 2
    assert Path("params.yaml").read_text(encoding="utf-8") == text


SENTENCES = {
    "support": "{} cannot log in since {}",
    "billing": "please send {} the invoice of {}",
    "shipping": "where is the parcel that {} ordered in {}",
}
NAMES = ("Emma", "Lars", "Sophie", "Oliver")  # one of the ten origins that person_origin compares
MONTHS = ("January", "March", "May", "July", "October")
TICKETS = [
    (sentence.format(name, month), team)
    for team, sentence in SENTENCES.items()
    for name in NAMES
    for month in MONTHS
]


def write_labels():
    return write_csv("data/tickets.csv", TICKETS)


def write_calls():
    calls = [(text, json.dumps({"team": team, "urgent": "March" in text})) for text, team in TICKETS]
    return write_jsonl("data/calls.jsonl", [chat(text, call) for text, call in calls])


def write_texts():
    replies = [(text, f"Thank you. Our {team} team answers you: {text}.") for text, team in TICKETS]
    return write_jsonl("data/replies.jsonl", [chat(text, reply) for text, reply in replies])


@pytest.mark.parametrize("write", [write_labels, write_calls, write_texts])
def test_sixty_rows_pass_every_gate_before_training_without_an_edit(write):
    assert run(write()) == 0
    for stage in (collect, curate, validate, check_bias, split):
        stage.main()
    bias = read_json(Path("reports/check_bias/metrics.json"))
    assert sum(value["rows"] for value in bias["groups"]["person_gender"]) >= bias["min_rows"]
