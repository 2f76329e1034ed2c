import csv
import errno
import json
import os
import shutil

import pytest
import torch

from stages.common.artifacts import write_json
from stages.common.errors import InputError
from stages.common.logs import HIDDEN_PACKAGES
from stages.common.messages import Message
from stages.common.model.adapter import read_trained_ids
from stages.common.model.teacher import find_teacher
from stages.common.params.loading import load_params
from stages.common.records import make_row, read_rows, write_rows
from stages.finetune import batches
from stages.finetune.__main__ import main
from stages.finetune.objectives import teaching
from tests.stages.finetune.killing import kill_in_the_middle, resume
from tests.stages.finetune.project import (
    SHOWING_IMPORTS,
    adapter,
    change_finetune,
    evidence,
    finish_with_imports,
    make_project,
    put_own_adapter,
    rows,
    start_stage,
)
from tests.tiny import save_model


def test_training_lowers_the_loss_and_leaves_adapter_evidence_curve_and_picture(project):
    main()
    metrics = evidence(project)
    assert (metrics["train_rows"], metrics["rows_not_replayed"]) == (40, 0)
    assert metrics["steps"] == 10
    assert metrics["share_prefix"] is True
    assert metrics["fast_modules"] == {"lora_linear": 14, "rms_norm": 5, "output_layer": 1}
    with (project / "reports" / "finetune" / "loss.csv").open() as file:
        curve = list(csv.DictReader(file))
    assert [int(point["step"]) for point in curve] == list(range(1, 11))
    assert float(curve[-1]["loss"]) < float(curve[0]["loss"])
    assert (project / "reports" / "finetune" / "loss.svg").read_text().startswith("<?xml")
    names = {path.name for path in (project / "artifacts" / "finetune").iterdir()}
    assert names == {"adapter_model.safetensors", "adapter_config.json", "trained_row_ids.txt"}
    assert not list((project / "checkpoints" / "finetune").iterdir())


def test_two_runs_write_the_same_bytes(project):
    main()
    kept = [p for p in project.glob("*/finetune/*") if p.suffix in {".safetensors", ".json", ".csv", ".svg"}]
    first = {path: path.read_bytes() for path in kept if path.name != "metrics.json"}
    metrics = evidence(project)
    main()
    assert evidence(project) == metrics
    assert {path: path.read_bytes() for path in first} == first
    assert len(first) == 5


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"gradient_accumulation": 2, "dropout": 0.1, "epochs": 2},
        # No answer is right, so the first point stays the best: it is kept over the kill, and decides.
        {"validate_every": 0.05, "early_stopping": {"metric": "exact_match", "patience": 12}},
        {"method": "dpo", "gradient_accumulation": 2, "epochs": 2},
        {"method": "orpo"},
        {"method": "kto"},
        {"method": "distill", "teacher": "teacher"},
        {"method": "distill", "teacher": "teacher", "distill": "answers"},
    ],
)
def test_a_run_killed_in_the_middle_ends_with_the_adapter_of_an_unbroken_run(
    tmp_path, settings, monkeypatch, caplog
):
    unbroken, killed = (make_project(tmp_path / name, 160, **settings) for name in ("unbroken", "killed"))
    if settings.get("distill") == "answers":
        for project in (unbroken, killed):
            monkeypatch.chdir(project)
            keep_taught_answers(project)
    monkeypatch.chdir(unbroken)
    main()
    kill_in_the_middle(killed)
    resume(killed, monkeypatch, caplog)
    assert adapter(killed) == adapter(unbroken)
    assert evidence(killed) == evidence(unbroken)
    for name in ("loss.csv", "loss.svg", "validation.csv"):
        one, other = (p / "reports" / "finetune" / name for p in (killed, unbroken))
        assert one.read_bytes() == other.read_bytes()


def keep_taught_answers(project):
    """Keep answers as if the teacher, a random model that ends none, had given them to an earlier process."""
    train = read_rows(project / "artifacts/split/train.parquet")
    tokens = load_params().ask_base.max_new_tokens
    teaching._read_answers(find_teacher("teacher"), train, tokens, "float32")
    (path,) = (project / "checkpoints/teacher").iterdir()
    write_json(path, ['{"n":7}' if n % 10 else None for n in range(len(train))])


@pytest.mark.slow
def test_a_process_takes_the_memory_that_is_estimated_and_imports_no_hidden_package(project):
    shutil.rmtree(project / "artifacts" / "fetch_base")
    # Of a width with which a batch takes some 450 MiB, as much as the process with torch holds before.
    wide = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 3}
    save_model(project / "artifacts" / "fetch_base", **wide)
    long = [
        make_row(
            [Message("user", "abcdefg"[n % 7] * (150 + n)), Message("assistant", f'{{"n":{n % 5}}}')],
            "toy",
            "cc0-1.0",
        )
        for n in range(40)
    ]
    write_rows(project / "artifacts" / "split" / "train.parquet", long)
    change_finetune(project, batch_size=20)
    held = b"x" * (1500 << 20)  # What the process that starts the stage holds is not the stage's.
    imported = finish_with_imports(start_stage(project, SHOWING_IMPORTS, OMP_NUM_THREADS="1"))
    assert {"peft", "transformers"} <= imported and not imported & set(HIDDEN_PACKAGES)
    del held
    took = json.loads((project / "reports" / "finetune" / "metrics.json").read_text())["throughput"]
    assert took["estimated_peak_mib"] == pytest.approx(took["peak_rss_mib"], rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [{"dropout": 0.1}, {"method": "grpo", "group_size": 4, "kl_weight": 0.1, "gradient_accumulation": 2}],
)
def test_a_run_that_went_on_from_an_adapter_and_is_killed_ends_as_an_unbroken_one(
    tmp_path, monkeypatch, caplog, settings
):
    unbroken = make_project(tmp_path / "unbroken", 160, epochs=2)
    monkeypatch.chdir(unbroken)
    main()
    put_own_adapter(unbroken)
    started = adapter(unbroken)
    change_finetune(unbroken, **settings)
    killed = make_project(tmp_path / "killed", 160, epochs=2, **settings)
    for one in (unbroken, killed):  # any text is an answer, so that some of the samples are worth something
        write_json(one / "artifacts/curate/task.json", {"kind": "text"})
    for folder in ("artifacts/initial_adapter", "reports/fetch_base"):
        shutil.copytree(unbroken / folder, killed / folder)
    main()
    kill_in_the_middle(killed)
    resume(killed, monkeypatch, caplog)
    assert evidence(killed)["started_from"] == "0123456789ab"
    assert evidence(killed) == evidence(unbroken)
    assert adapter(killed) == adapter(unbroken) != started
    if "figures" in evidence(killed):  # there was something to learn from
        assert evidence(killed)["figures"]["compared"]["last"] > 0


def test_training_goes_on_from_the_adapter_in_the_folder(project):
    main()
    assert evidence(project)["started_from"] == "base"
    first = evidence(project)["train_loss"]
    put_own_adapter(project)
    main()
    again = evidence(project)
    assert again["started_from"] == "0123456789ab"
    assert again["train_loss"] < first - 0.05
    learned = adapter(project)
    main()
    assert adapter(project) == learned
    change_finetune(project, warm_start_from=None)
    main()
    assert (evidence(project)["started_from"], evidence(project)["train_loss"]) == ("base", first)


def test_of_what_the_start_has_learned_only_a_share_is_gone_over_again(project):
    main()
    put_own_adapter(project)
    known = read_trained_ids(project / "artifacts" / "finetune")
    assert len(known) == evidence(project)["train_rows"] == 40
    new = rows(10, start=2000)
    old = list(read_rows(project / "artifacts" / "split" / "train.parquet"))
    write_rows(project / "artifacts" / "split" / "train.parquet", [*old, *new])
    change_finetune(project, replay_share=0.25, warm_start_rate_factor=0.5)
    first_rate = evidence(project)["learning_rate"]
    main()
    found = evidence(project)
    with (project / "reports" / "finetune" / "loss.csv").open() as file:
        assert max(float(line["learning_rate"]) for line in csv.DictReader(file)) == found["learning_rate"]
    assert found["learning_rate"] == first_rate / 2
    assert 10 < found["train_rows"] < 30
    assert found["train_rows"] + found["rows_not_replayed"] == 50
    # What was not gone over again is no less learned.
    assert read_trained_ids(project / "artifacts" / "finetune") == known | {row.id for row in new}


def test_gradient_accumulation_weighs_every_answer_token_alike(tmp_path, monkeypatch):
    results = {}
    for name, settings in {"whole": (8, 1), "halves": (4, 2)}.items():
        project = make_project(
            tmp_path / name, 8, batch_size=settings[0], gradient_accumulation=settings[1], epochs=3
        )
        monkeypatch.chdir(project)
        monkeypatch.setattr(batches, "BATCHES_SORTED_TOGETHER", 20)
        main()
        results[name] = evidence(project)["train_loss"]
    assert results["halves"] == pytest.approx(results["whole"], rel=1e-4)


def test_no_rows_no_module_and_a_loss_that_is_no_number_are_clear_errors(project, monkeypatch):
    write_rows(project / "artifacts" / "split" / "train.parquet", [])
    with pytest.raises(InputError, match="no rows"):
        main()
    make_project(project / "modules", target_modules=["q_proj", "no_such_proj"])
    monkeypatch.chdir(project / "modules")
    with pytest.raises(InputError, match=r"no module no_such_proj[\s\S]*target_modules"):
        main()
    make_project(project / "diverged", learning_rate=1e30, warmup_fraction=0.0)
    monkeypatch.chdir(project / "diverged")
    with pytest.raises(InputError, match=r"diverged[\s\S]*learning_rate"):
        main()


def test_a_disk_that_fills_up_while_saving_is_a_clear_error(project, monkeypatch):
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "optimizer.pt")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(InputError, match=r"is full[\s\S]*last complete checkpoint"):
        main()


def test_a_training_of_one_update_learns_whatever_the_warm_up_is(project):
    change_finetune(project, warmup_fraction=1.0, batch_size=64)
    main()
    (first,) = (project / "reports" / "finetune" / "loss.csv").read_text().splitlines()[1:]
    assert float(first.split(",")[2]) == 0.01


def test_without_validation_rows_there_is_no_validation_loss(project):
    write_rows(project / "artifacts" / "split" / "validation.parquet", [])
    main()
    assert evidence(project)["validation_loss"] is None


def test_a_model_that_attends_otherwise_is_trained_with_padded_rows(project):
    path = project / "artifacts" / "fetch_base" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "attention_dropout": 0.1}))
    main()
    assert evidence(project)["share_prefix"] is False
