import csv
import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
import yaml

from stages.common.adapter import Start, put_start, read_learned
from stages.common.chat import Encoded, encode_example
from stages.common.errors import InputError
from stages.common.models import load_tokenizer
from stages.common.records import Message, make_row, read_rows, write_rows
from stages.finetune import __main__ as finetune
from tests.tiny import save_model

REPO = Path(__file__).resolve().parents[3]
SETTINGS = {
    "rank": 4,
    "alpha": 8,
    "learning_rate": 0.01,
    "batch_size": 4,
    "gradient_accumulation": 1,
    "epochs": 1,
    "max_length": 200,
    "checkpoint_every_steps": 3,
    "dtype": "float32",
}


def rows(count, start=0):
    return [
        make_row(
            [
                Message("system", "Answer."),
                Message("user", "abc"[n % 3] * (1 + n % 7) + str(n)),
                Message("assistant", f'{{"n":{n % 5}}}'),
            ],
            "toy",
            "cc0-1.0",
        )
        for n in range(start, start + count)
    ]


def make_project(folder, count=40, **changes):
    """Lay out what finetune reads: the base model, the split and params.yaml."""
    save_model(folder / "artifacts" / "fetch_base")
    (folder / "artifacts" / "split").mkdir()
    write_rows(folder / "artifacts" / "split" / "train.parquet", rows(count))
    write_rows(folder / "artifacts" / "split" / "validation.parquet", rows(8, start=1000))
    params = yaml.safe_load((REPO / "params.yaml").read_text())
    params["finetune"].update({**SETTINGS, **changes})
    (folder / "params.yaml").write_text(yaml.safe_dump(params))
    return folder


def put_own_adapter_as_start(project, version="0123456789ab"):
    """What the retraining flow does with the champion's adapter."""
    metrics = project / "reports" / "fetch_base" / "metrics.json"
    metrics.parent.mkdir(parents=True, exist_ok=True)
    metrics.write_text('{"sha256": "of the base"}')
    put_start(project / "artifacts" / "finetune", version, "of the base", project / "artifacts" / "start")


def change_finetune(project, **changes):
    params = yaml.safe_load((project / "params.yaml").read_text())
    params["finetune"].update(changes)
    (project / "params.yaml").write_text(yaml.safe_dump(params))


def adapter(project):
    return (project / "artifacts" / "finetune" / "adapter_model.safetensors").read_bytes()


def evidence(project):
    metrics = json.loads((project / "reports" / "finetune" / "metrics.json").read_text())
    metrics.pop("throughput")
    return metrics


def start_stage(project):
    environment = {**os.environ, "PYTHONPATH": str(REPO), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "stages.finetune"],
        cwd=project,
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture(autouse=True)
def one_thread():
    """A model this small is slower on several threads, much slower where other work has the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def project(tmp_path, monkeypatch):
    monkeypatch.chdir(make_project(tmp_path))
    return tmp_path


def test_training_lowers_the_loss_and_leaves_adapter_evidence_curve_and_picture(project):
    finetune.main()
    metrics = evidence(project)
    assert (metrics["train_rows"], metrics["rows_not_replayed"]) == (40, 0)
    assert metrics["steps"] == 10
    assert metrics["share_prefix"] is True
    assert metrics["fast_modules"] == {"lora_linear": 14, "rms_norm": 5}
    with (project / "reports" / "finetune" / "loss.csv").open() as file:
        curve = list(csv.DictReader(file))
    assert [int(point["step"]) for point in curve] == list(range(1, 11))
    assert float(curve[-1]["loss"]) < float(curve[0]["loss"])
    assert (project / "reports" / "finetune" / "loss.svg").read_text().startswith("<?xml")
    names = {path.name for path in (project / "artifacts" / "finetune").iterdir()}
    assert names == {"adapter_model.safetensors", "adapter_config.json", "learned.txt"}
    assert not list((project / "checkpoints" / "finetune").iterdir())


def test_two_runs_write_the_same_bytes(project):
    finetune.main()
    kept = [p for p in project.glob("*/finetune/*") if p.suffix in {".safetensors", ".json", ".csv", ".svg"}]
    first = {path: path.read_bytes() for path in kept if path.name != "metrics.json"}
    metrics = evidence(project)
    finetune.main()
    assert evidence(project) == metrics
    assert {path: path.read_bytes() for path in first} == first
    assert len(first) == 4


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"gradient_accumulation": 2, "dropout": 0.1, "epochs": 2}])
def test_a_run_killed_in_the_middle_ends_with_the_adapter_of_an_unbroken_run(tmp_path, settings):
    unbroken = make_project(tmp_path / "unbroken", 160, **settings)
    assert start_stage(unbroken).wait() == 0
    killed = make_project(tmp_path / "killed", 160, **settings)
    stage = start_stage(killed)
    deadline = time.monotonic() + 60
    while not list(killed.glob("checkpoints/finetune/*/checkpoint-1[0-9]/complete.json")):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    stage.send_signal(signal.SIGKILL)
    stage.wait()
    assert not (killed / "artifacts" / "finetune").exists()
    again = start_stage(killed)
    _, log = again.communicate()
    assert again.returncode == 0, log
    assert int(re.search(r"resuming from step (\d+) of", log)[1]) >= 9
    assert adapter(killed) == adapter(unbroken)
    assert evidence(killed) == evidence(unbroken)
    for name in ("loss.csv", "loss.svg"):
        one, other = (p / "reports" / "finetune" / name for p in (killed, unbroken))
        assert one.read_bytes() == other.read_bytes()


@pytest.mark.slow
def test_a_run_that_went_on_from_an_adapter_and_is_killed_ends_as_an_unbroken_one(tmp_path, monkeypatch):
    unbroken = make_project(tmp_path / "unbroken", 160, dropout=0.1)
    monkeypatch.chdir(unbroken)
    finetune.main()
    put_own_adapter_as_start(unbroken)
    killed = make_project(tmp_path / "killed", 160, dropout=0.1)
    for folder in ("artifacts/start", "reports/fetch_base"):
        shutil.copytree(unbroken / folder, killed / folder)
    finetune.main()
    stage = start_stage(killed)
    deadline = time.monotonic() + 60
    while not list(killed.glob("checkpoints/finetune/*/checkpoint-1[0-9]/complete.json")):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    stage.send_signal(signal.SIGKILL)
    stage.wait()
    monkeypatch.chdir(killed)
    finetune.main()
    assert evidence(killed)["started_from"] == "0123456789ab"
    assert evidence(killed) == evidence(unbroken)
    assert adapter(killed) == adapter(unbroken)


def test_training_goes_on_from_the_adapter_in_start_and_says_so(project):
    finetune.main()
    assert evidence(project)["started_from"] == "base"
    first = evidence(project)["train_loss"]
    put_own_adapter_as_start(project)
    finetune.main()
    again = evidence(project)
    assert again["started_from"] == "0123456789ab"
    assert again["train_loss"] < first - 0.05
    learned = adapter(project)
    finetune.main()
    assert adapter(project) == learned
    change_finetune(project, start_from=None)
    finetune.main()
    assert (evidence(project)["started_from"], evidence(project)["train_loss"]) == ("base", first)


def test_of_what_the_start_has_learned_only_a_share_is_gone_over_again(project):
    finetune.main()
    put_own_adapter_as_start(project)
    known = read_learned(project / "artifacts" / "finetune")
    assert len(known) == evidence(project)["train_rows"] == 40
    new = rows(10, start=2000)
    old = list(read_rows(project / "artifacts" / "split" / "train.parquet"))
    write_rows(project / "artifacts" / "split" / "train.parquet", [*old, *new])
    change_finetune(project, replay_share=0.25)
    finetune.main()
    found = evidence(project)
    assert 10 < found["train_rows"] < 30
    assert found["train_rows"] + found["rows_not_replayed"] == 50
    # What was not gone over again is no less learned.
    assert read_learned(project / "artifacts" / "finetune") == known | {row.id for row in new}


def test_each_start_has_another_share_of_the_old_rows_and_all_the_new(caplog):
    old, new = rows(400), rows(5, start=2000)

    def chosen(share, version):
        start = Start(Path("start"), version, "base")
        return {row.id for row in finetune.rows_to_learn([*old, *new], start, known, share, seed=7)}

    known = {row.id for row in old}
    fresh = {row.id for row in new}
    one, other = chosen(0.25, "v1"), chosen(0.25, "v2")
    assert one == chosen(0.25, "v1") != other
    assert fresh < one and fresh < other and 60 < len(one) < 145
    assert chosen(0.0, "v1") == fresh and len(chosen(1.0, "v1")) == 405
    assert len(finetune.rows_to_learn(old, None, set(), 0.0, seed=7)) == 400
    assert not caplog.messages
    start = Start(Path("start"), "v1", "base")
    assert len(finetune.rows_to_learn(old, start, set(), 0.25, seed=7)) == 400
    assert "the adapter of v1 does not say which rows it has learned" in caplog.text
    with pytest.raises(InputError, match="all 400 training rows are known") as error:
        finetune.rows_to_learn(old, start, known, 0.0, seed=7)
    assert "finetune.replay_share" in error.value.fix


def test_every_tensor_of_the_start_is_taken_over_bit_by_bit(project):
    from peft import get_peft_model_state_dict
    from safetensors.torch import load_file

    finetune.main()
    put_own_adapter_as_start(project)
    start = finetune.read_start()
    params = finetune.load_params().finetune
    recipe = finetune.Recipe(**params.model_dump(include=set(finetune.Recipe.__dataclass_fields__)))
    model = finetune.build_model(project / "artifacts" / "fetch_base", recipe)
    finetune.go_on_from(model, start)
    own, there = get_peft_model_state_dict(model), load_file(start.folder / "adapter_model.safetensors")
    assert own.keys() == there.keys()
    assert all(torch.equal(own[name], there[name]) for name in own)
    assert any(tensor.abs().sum() > 0 for name, tensor in own.items() if "lora_B" in name)


def test_an_adapter_that_does_not_fit_is_refused_with_what_both_are_before_any_training(project):
    finetune.main()
    put_own_adapter_as_start(project)
    start = project / "artifacts" / "start"
    params = yaml.safe_load((project / "params.yaml").read_text())
    params["finetune"] |= {"rank": 8, "target_modules": ["q_proj", "v_proj"]}
    (project / "params.yaml").write_text(yaml.safe_dump(params))
    with pytest.raises(InputError, match=r"rank: 8 here, 4 there\n  target_modules: .*q_proj") as error:
        finetune.main()
    assert "finetune.rank" in error.value.fix
    params["finetune"] |= {"rank": 4, "target_modules": "all-linear"}
    (project / "params.yaml").write_text(yaml.safe_dump(params))
    weights = (start / "adapter_model.safetensors").read_bytes()
    (start / "adapter_model.safetensors").write_bytes(weights[:200])
    with pytest.raises(InputError, match="cannot be read"):
        finetune.main()
    (start / "adapter_model.safetensors").write_bytes(weights)
    (project / "reports" / "fetch_base" / "metrics.json").write_text('{"sha256": "of another base"}')
    with pytest.raises(InputError, match="was trained on a base model"):
        finetune.main()
    (start / "start.json").unlink()
    with pytest.raises(InputError, match="half an adapter"):
        finetune.main()


def test_an_adapter_without_some_tensors_is_refused_though_its_config_fits(project):
    from safetensors.torch import load_file, save_file

    finetune.main()
    put_own_adapter_as_start(project)
    path = project / "artifacts" / "start" / "adapter_model.safetensors"
    weights = load_file(path)
    lost = sorted(weights)[0]
    save_file({name: tensor for name, tensor in weights.items() if name != lost}, path)
    with pytest.raises(InputError, match=rf"other tensors .*1 of them: {re.escape(lost)} is None there"):
        finetune.main()


def test_a_checkpoint_cut_short_is_never_taken_for_whole(tmp_path):
    for step in (3, 6, 9, 12):
        checkpoint = tmp_path / f"checkpoint-{step}"
        checkpoint.mkdir()
        for name in ("adapter_model.safetensors", "optimizer.pt"):
            (checkpoint / name).write_bytes(b"x" * 100)
        if step != 9:
            finetune.mark_whole(checkpoint)
    (tmp_path / "checkpoint-12" / "optimizer.pt").write_bytes(b"x" * 50)
    assert finetune.whole_checkpoint(tmp_path) == tmp_path / "checkpoint-6"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-3", "checkpoint-6"]


def test_checkpoints_of_other_parameters_are_not_resumed_and_do_not_pile_up(project):
    base = project / "artifacts" / "fetch_base"
    examples = [Encoded([0, 1, 2], 1)]
    settings = dict.fromkeys(finetune.Recipe.__dataclass_fields__, 1)
    recipe = finetune.Recipe(**settings)
    start = project / "adapter"
    start.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (start / name).write_text("{}")
    other = finetune.Recipe(**{**settings, "rank": 2})
    names = {
        finetune.fingerprint(recipe, examples, base),
        finetune.fingerprint(other, examples, base),
        finetune.fingerprint(recipe, [Encoded([0, 1, 3], 1)], base),
        finetune.fingerprint(recipe, examples, base, put_start(start, "v", "b", project / "start")),
    }
    assert len(names) == 4
    runs = project / "checkpoints" / "finetune"
    for age, name in enumerate(("new", "middle", "old")):
        (runs / name).mkdir(parents=True)
        os.utime(runs / name, (1000 - age, 1000 - age))
    finetune.forget_other_runs(runs / "mine", kept=1)
    assert [path.name for path in runs.iterdir()] == ["new"]


def test_gradient_accumulation_weighs_every_answer_token_alike(tmp_path, monkeypatch):
    results = {}
    for name, settings in {"whole": (8, 1), "halves": (4, 2)}.items():
        project = make_project(
            tmp_path / name, 8, batch_size=settings[0], gradient_accumulation=settings[1], epochs=3
        )
        monkeypatch.chdir(project)
        monkeypatch.setattr(finetune, "BATCHES_SORTED_TOGETHER", 20)
        finetune.main()
        results[name] = evidence(project)["train_loss"]
    assert results["halves"] == pytest.approx(results["whole"], rel=1e-4)


def test_every_epoch_takes_each_row_once_in_an_order_of_its_own():
    lengths = [10 + n % 13 for n in range(103)]
    plan = finetune.plan_batches(lengths, batch_size=8, epochs=2, seed=7)
    assert plan == finetune.plan_batches(lengths, 8, 2, 7)
    assert plan != finetune.plan_batches(lengths, 8, 2, 8)
    half = len(plan) // 2
    for epoch in (plan[:half], plan[half:]):
        assert Counter(row for batch in epoch for row in batch) == Counter(range(103))
    assert plan[:half] != plan[half:]
    spread = [max(lengths[r] for r in b) - min(lengths[r] for r in b) for b in plan]
    assert sum(spread) / len(spread) <= 2


def test_long_rows_are_dropped_or_named(tmp_path):
    tokenizer = load_tokenizer(save_model(tmp_path))
    toy = rows(3)
    length = max(len(encode_example(tokenizer, row.messages).input_ids) for row in toy)
    longer = make_row([Message("user", "x" * 200), Message("assistant", "y")], "toy", "cc0-1.0")
    examples, long = finetune.encode_rows(tokenizer, [*toy, longer], length, "drop")
    assert (len(examples), long) == (3, [longer])
    with pytest.raises(InputError, match=f"1 of 4 rows .*\n.*{longer.id}.*\n.*finetune.max_length"):
        finetune.encode_rows(tokenizer, [*toy, longer], length, "stop")
    with pytest.raises(InputError, match="all 3 rows"):
        finetune.encode_rows(tokenizer, toy, 5, "drop")


def test_no_rows_no_module_and_a_loss_that_is_no_number_are_clear_errors(project, monkeypatch):
    write_rows(project / "artifacts" / "split" / "train.parquet", [])
    with pytest.raises(InputError, match="no rows"):
        finetune.main()
    make_project(project / "modules", target_modules=["no_such_proj"])
    monkeypatch.chdir(project / "modules")
    with pytest.raises(InputError, match="target_modules"):
        finetune.main()
    make_project(project / "diverged", learning_rate=1e30, warmup_fraction=0.0)
    monkeypatch.chdir(project / "diverged")
    with pytest.raises(InputError, match=r"diverged[\s\S]*learning_rate"):
        finetune.main()


def test_a_disk_too_small_for_the_checkpoints_is_said_before_the_work(tmp_path):
    with pytest.raises(InputError, match="MiB left"):
        finetune.check_free_space(tmp_path, trained_parameters=10**15)


def test_a_disk_that_fills_up_while_saving_is_a_clear_error(project, monkeypatch):
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "optimizer.pt")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(InputError, match=r"is full[\s\S]*last whole checkpoint"):
        finetune.main()


def test_without_validation_rows_there_is_no_validation_loss(project):
    write_rows(project / "artifacts" / "split" / "validation.parquet", [])
    finetune.main()
    assert evidence(project)["validation_loss"] is None


def test_a_model_that_attends_otherwise_is_trained_with_padded_rows(project):
    path = project / "artifacts" / "fetch_base" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "attention_dropout": 0.1}))
    finetune.main()
    assert evidence(project)["share_prefix"] is False
