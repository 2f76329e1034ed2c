import csv
import json
import re
import shutil
from contextlib import chdir
from functools import partial
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml

from stages import ask_base
from stages.common.artifacts import write_json
from stages.common.chat.tools_template import adapt_template
from stages.common.chat.turns import unroll
from stages.common.errors import InputError
from stages.common.messages import Message, Tool, ToolCall
from stages.common.model.loading import load_tokenizer
from stages.common.records import make_row, write_rows
from stages.common.task.json_task import JsonTask
from stages.common.task.kinds import TASK_FILE
from stages.common.task.label_task import LabelTask
from stages.common.task.text_task import ChatTask, TextTask
from stages.common.task.tools_task import ToolsTask
from stages.evaluate import __main__ as evaluate
from tests.tiny import save_model

MERGES = (("a", "b"), ("t", "h"))  # GGUF needs a vocabulary with merges
TASK = JsonTask("intent")
WORLD = "tests.stages.evaluate.test_simulation:Lamps"
ROOT = Path(__file__).parents[3]


def rows_of(answers, groups=12):
    return [
        make_row(
            [Message("user", f"question {i}"), Message("assistant", answer)],
            "toy",
            "mit",
            group=f"g{i % groups}",
            tags={"language": "en" if i % 3 else "de"},
        )
        for i, answer in enumerate(answers)
    ]


def json_rows(n=24):
    return rows_of([json.dumps({"intent": f"Turn{i % 2}", "area": i % 3}) for i in range(n)])


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A tiny base model and an untrained adapter with random weights on it."""
    import torch
    from peft import LoraConfig, get_peft_model

    from tests.tiny import make_model

    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("models")
    save_model(folder / "fetch_base", merges=MERGES, max_position_embeddings=2048)
    config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(make_model(vocab_size=258 + len(MERGES)), config).save_pretrained(folder / "finetune")
    return folder


def prepare(folder, models, rows, task=TASK, engine="transformers", **changes):
    """Make a project folder up to `evaluate`."""
    for name in ("fetch_base", "finetune"):
        shutil.copytree(models / name, folder / "artifacts" / name, dirs_exist_ok=True)
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    params["ask_base"] |= {"engine": engine, "min_test_rows": 10, "max_new_tokens": 12}
    params["evaluate"] |= {"resamples": 100} | changes
    params["task"]["slices"] = ["language"]
    (folder / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
    write_rows(folder / "artifacts/split/test.parquet", rows)
    write_json(folder / TASK_FILE, task.describe())
    return folder


def run(folder):
    ask_base.main()
    evaluate.main()
    return json.loads((folder / "reports/evaluate/metrics.json").read_text())


@pytest.fixture
def project(models, tmp_path, monkeypatch):
    """A function that prepares a project folder in which the test then runs."""
    monkeypatch.chdir(tmp_path)
    return partial(prepare, tmp_path, models)


@pytest.fixture(scope="module")
def judged(models, tmp_path_factory):
    """A project folder in which the toy models have been judged."""
    folder = prepare(tmp_path_factory.mktemp("judged"), models, json_rows())
    with chdir(folder):
        run(folder)
    return folder


@pytest.fixture
def report(judged):
    return json.loads((judged / "reports/evaluate/metrics.json").read_text())


def test_json_answers_get_every_metric_with_interval_and_difference(report):
    names = {
        "exact_match",
        "valid_output",
        "intent_accuracy",
        "slot_f1",
        "finished",
        "perplexity",
        "answer_tokens",
    }
    for model in ("base", "tuned"):
        assert set(report[model]) == names
        for figures in report[model].values():
            assert set(figures) == {"value", "low", "high", "n"}
            assert figures["low"] <= figures["value"] <= figures["high"]
            assert figures["n"] == 24
    assert set(report["difference"]["exact_match"]) == {"value", "low", "high", "p_value", "n"}
    assert set(report["slices"]["language"]) == {"de", "en"}
    assert set(report["throughput"]["tuned"]) >= {
        "rows_per_s",
        "tokens_per_s",
        "latency_p50_s",
        "latency_p95_s",
    }


def test_the_difference_is_that_of_the_two_figures(report):
    for name, figures in report["difference"].items():
        expected = report["tuned"][name]["value"] - report["base"][name]["value"]
        assert figures["value"] == pytest.approx(expected, abs=2e-6)


def test_words_as_answers_get_the_metrics_of_words(project):
    rows = rows_of([f"the lamp {i} is on" for i in range(24)])
    report = run(project(rows, TextTask()))
    assert {"exact_match", "rouge_l", "chrf", "bleu", "length_ratio", "perplexity"} <= set(report["tuned"])
    assert report["primary"] == "chrf"
    assert not Path("reports/evaluate/plots/confusion.svg").exists()


def conversations(n=12):
    """Conversations of two questions: a call, then the answer after its result."""
    schema = {"type": "function", "function": {"name": "light", "parameters": {"type": "object"}}}
    for number in range(n):
        messages = [
            Message("user", f"light {number}"),
            Message("assistant", "", (ToolCall("light", f'{{"area":{number % 3}}}'),)),
            Message("tool", "on"),
            Message("assistant", "It is on."),
            Message("user", "thanks"),
            Message("assistant", "You are welcome."),
        ]
        yield make_row(messages, "toy", "mit", group=f"g{number}", tools=[Tool(json.dumps(schema))])


def test_calls_are_judged_turn_by_turn(project):
    folder = (
        project(list(unroll(conversations(), "all")), ToolsTask(), simulator=WORLD) / "artifacts/fetch_base"
    )
    tokenizer = load_tokenizer(folder)
    tokenizer.chat_template = adapt_template(tokenizer, {}, True, "auto")
    tokenizer.save_pretrained(folder)
    report = run(folder.parents[1])
    assert (report["rows"], report["primary"], report["class_name"]) == (36, "call_match", "tool")
    assert set(report["tuned"]) >= set(ToolsTask().meanings)
    assert {value: found["n"] for value, found in report["slices"]["turn"].items()} == {"1": 24, "2": 12}
    assert {value: found["n"] for value, found in report["slices"]["after_result"].items()} == {
        "no": 24,
        "yes": 12,
    }
    assert "by after_result" in Path("reports/evaluate/plots/slices.svg").read_text()
    assert {value: found["n"] for value, found in report["slices"]["tool"].items()} == {
        "(text)": 24,
        "light": 12,
    }
    assert set(report["errors"]["by_type"]) <= set(ToolsTask().error_types)
    page = Path("reports/evaluate/errors.md").read_text()
    assert "`light(area=2)`" in page and "turn 1: `light 2` → `on`" in page
    assert "needless call (lower is better)" in Path("reports/evaluate/plots/comparison.svg").read_text()
    simulation = report["simulation"]
    assert (simulation["conversations"], simulation["judged"], simulation["out_of_time"]) == (12, 12, 0)
    assert simulation["simulator_errors"] == {}
    assert simulation["by_turns"].keys() == {"2"}
    assert set(simulation["tuned"]) == {"end_state_match", "results_found", "calls_ran", "finished"}


def test_free_conversations_are_judged_by_their_texts(project):
    rows = [
        make_row(
            [
                Message(role, f"{text} {n}")
                for role, text in zip(("user", "assistant") * 5, "abcdefghij", strict=True)
            ],
            "toy",
            "mit",
            group=f"g{n}",
        )
        for n in range(3)
    ]
    report = run(project(list(unroll(rows, "all")), ChatTask()))
    assert report["primary"] == "chrf"
    assert set(report["slices"]["turn"]) == {"1", "2", "3", "4", "5 and later"}


def test_json_without_a_label_needs_none(project):
    rows = rows_of([json.dumps({"area": i, "on": True}) for i in range(24)])
    report = run(project(rows, JsonTask(None)))
    assert "slot_f1" in report["tuned"]
    assert not [name for name in report["tuned"] if name.endswith("_accuracy")]
    assert report["confusions"] == []


def test_labels_get_a_table_a_confusion_matrix_and_a_calibration(project):
    labels = ("under_$5_to_$10", "a, b", "no")
    rows = rows_of([labels[i % 3] for i in range(24)])
    report = run(project(rows, LabelTask(tuple(sorted(labels)))))
    assert report["primary"] == "accuracy"
    assert {"accuracy", "macro_f1", "weighted_f1", "valid_output"} <= set(report["tuned"])
    assert {one["name"]: one["rows"] for one in report["classes"]} == dict.fromkeys(labels, 8)
    assert set(report["slices"]["label"]) == set(labels)
    assert report["errors"]["by_type"] == {"invalid": 24}  # so small a model writes none of them
    assert report["calibration"] is None
    assert Path("reports/evaluate/plots/confusion.svg").exists()


def test_another_label_key_names_its_own_metric(project):
    rows = rows_of([json.dumps({"action": "go", "to": i}) for i in range(24)])
    assert "action_accuracy" in run(project(rows, JsonTask("action")))["tuned"]


def written(folder):
    """Every file of the stage as bytes, but for the report, which comes without its throughput."""
    folders = (folder / "reports/evaluate", folder / "artifacts/evaluate")
    files = {p.name: p.read_bytes() for f in folders for p in sorted(f.rglob("*")) if p.is_file()}
    report = json.loads(files.pop("metrics.json"))
    del report["throughput"]
    return files, report


def test_judging_twice_gives_the_same_bytes_but_for_the_throughput(judged, project):
    again = project(json_rows())
    run(again)
    assert written(again) == written(judged)
    assert set(written(again)[0]) == {
        "comparison.svg",
        "slices.svg",
        "confusion.svg",
        "errors.csv",
        "errors.md",
        "predictions.parquet",
    }


def test_a_new_adapter_is_compared_with_the_answers_that_the_base_gave(judged, project):
    folder = project(json_rows())
    for name in ("artifacts/ask_base", "reports/ask_base"):
        shutil.copytree(judged / name, folder / name)
    evaluate.main()
    assert written(folder) == written(judged)


def test_answers_to_rows_that_are_no_longer_in_the_test_are_refused(project):
    folder = project(json_rows())
    run(folder)
    write_rows(folder / "artifacts/split/test.parquet", json_rows(20))
    with pytest.raises(InputError, match="4 rows that are not in the test split") as error:
        evaluate.main()
    assert "dvc repro ask_base" in error.value.fix


def test_the_engine_that_serves_gives_the_answers_of_transformers(models, judged, project):
    import torch

    from stages.common.gguf.model import write_gguf
    from stages.common.gguf.vocabulary import read_vocabulary
    from stages.common.model.loading import load_tokenizer, load_tuned

    folder = project(json_rows(), engine="auto")
    tuned = load_tuned(models / "fetch_base", models / "finetune", torch.float32, torch.device("cpu"))
    tokenizer = load_tokenizer(models / "fetch_base")
    (folder / "artifacts/export").mkdir()
    write_gguf(
        folder / "artifacts/export/model.gguf",
        tuned,
        read_vocabulary(tokenizer, 258 + len(MERGES)),
        "f16",
        "toy",
    )
    report = run(folder)
    assert report["engine"] == {"base": "paged", "tuned": "paged"}
    other = json.loads((judged / "reports/evaluate/metrics.json").read_text())
    assert other["engine"] == {"base": "transformers", "tuned": "transformers"}
    for model in ("base", "tuned"):
        for name, figures in report[model].items():
            assert figures["value"] == pytest.approx(other[model][name]["value"], rel=0.05), name


def test_every_answer_is_kept(judged):
    table = pq.read_table(judged / "artifacts/evaluate/predictions.parquet")
    assert table.num_rows == 24
    assert {"question", "reference", "base", "tuned", "tuned_exact_match"} <= set(table.column_names)


def test_pictures_open_offline(judged):
    for path in (judged / "reports/evaluate/plots").glob("*.svg"):
        svg = path.read_text()
        assert not re.search(r"(?:href|src)=\"(?!#|data:)|url\((?!#)|@import|<script", svg), path


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        ("on", "the answer is not one JSON value"),
        ('{"area":1}', "has no key 'intent'"),
    ],
)
def test_references_that_cannot_be_judged_are_shown(project, answer, problem):
    project([*json_rows(23), *rows_of([answer])])
    with pytest.raises(InputError, match=problem) as error:
        run(Path())
    assert repr(answer) in error.value.what
    assert "curate" in error.value.fix


def test_a_diverged_adapter_is_named_as_such(project):
    from safetensors.torch import load_file, save_file

    folder = project(json_rows())
    path = folder / "artifacts/finetune/adapter_model.safetensors"
    save_file({name: weights * float("nan") for name, weights in load_file(path).items()}, path)
    with pytest.raises(InputError, match=r"tuned model's perplexity .* nan"):
        run(folder)


def test_the_worst_error_comes_first(judged, report):
    page = (judged / "reports/evaluate/errors.md").read_text()
    assert f"{report['errors']['rows']} of 24 answers are not an exact match" in page
    with (judged / "reports/evaluate/errors.csv").open(newline="") as lines:
        table = list(csv.DictReader(lines))
    assert len(table) == report["errors"]["rows"]
    assert table[0]["error_type"] == "invalid"
