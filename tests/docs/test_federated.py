"""The example of a federated training: who gets which rows, what is averaged, and what it ends with."""

import json
import os
import subprocess
from collections import Counter
from pathlib import Path

import pytest

from docs.examples.federated.__main__ import check_method, main
from docs.examples.federated.adapters import Adapter, read_adapter, write_adapter
from docs.examples.federated.clients import deal_out, deal_rows
from docs.examples.federated.training import draw_rows
from stages.common.artifacts import write_json
from stages.common.errors import InputError
from stages.common.messages import Message
from stages.common.params.loading import load_params
from stages.common.records import make_row, read_rows, write_rows
from tests.stages.finetune.project import change_finetune, make_project

ROOT = Path(__file__).resolve().parents[2]
PYTHON = ROOT / ".venv-federated" / "bin" / "python"
USERS = ("ada", "ben", "chi", "dev", "eva", "fay")


def rows_of(users, count, start=0):
    """Return `count` rows of each user, who all ask in their own way."""
    return [
        make_row(
            [Message("user", f"{user} {n}"), Message("assistant", f'{{"n":{n % 3}}}')],
            "toy",
            "cc0-1.0",
            tags={"user": user},
        )
        for user in users
        for n in range(start, start + count)
    ]


@pytest.fixture
def project(tmp_path, monkeypatch):
    monkeypatch.chdir(make_project(tmp_path, batch_size=2))
    write_rows(tmp_path / "artifacts/split/train.parquet", rows_of(USERS, 6))
    write_rows(tmp_path / "artifacts/split/validation.parquet", rows_of(USERS, 2, 100))
    write_json(tmp_path / "reports/fetch_base/metrics.json", {"sha256": "0" * 64})
    return tmp_path


def test_equal_values_stay_together_and_clients_have_about_equally_many_rows():
    values = ["a"] * 5 + ["b"] * 3 + ["c"] * 2 + ["d", "e"]
    places = deal_out(values, 2)
    assert places == {"a": 0, "b": 1, "c": 1, "d": 0, "e": 1}
    assert Counter(places[value] for value in values) == {0: 6, 1: 6}
    later = deal_out(["e", "f"], 2, places)
    assert later == {**places, "f": 0}


def test_no_row_is_with_two_clients_and_none_is_lost():
    train, validation = rows_of(USERS, 4), rows_of((*USERS, "gus"), 1, 50)
    dealt = deal_rows(train, validation, "user", 4)
    assert sorted(row.id for side, _ in dealt for row in side) == sorted(row.id for row in train)
    assert sorted(row.id for _, side in dealt for row in side) == sorted(row.id for row in validation)
    users = [{row.tags["user"] for sides in client for row in sides} for client in dealt]
    assert sum(map(len, users)) == len(set.union(*users)) == 7


def test_rows_that_cannot_be_dealt_out_are_refused():
    rows = rows_of(USERS, 2)
    with pytest.raises(InputError, match="have 6 different values of user, and there are 7 clients"):
        deal_rows(rows, [], "user", 7)
    with pytest.raises(InputError, match="12 of 12 rows have no tag 'team'") as error:
        deal_rows(rows, [], "team", 4)
    assert "group, source, license, origin, user" in error.value.fix


def test_rounds_pass_over_all_rows_before_one_comes_again():
    rounds = [draw_rows(10, 4, number, seed=7) for number in range(1, 6)]
    drawn = [row for one in rounds for row in one]
    assert sorted(drawn[:10]) == sorted(drawn[10:]) == list(range(10))
    assert drawn[:10] != drawn[10:]


def test_an_adapter_travels_as_the_bytes_that_peft_reads(tmp_path):
    import numpy as np

    adapter = Adapter('{"peft_type": "LORA"}\n', {"a": np.arange(3, dtype=np.float32)})
    write_adapter(adapter, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    again = read_adapter(tmp_path)
    assert again.settings == adapter.settings and again.weights["a"].tolist() == [0, 1, 2]


@pytest.mark.parametrize("changes", [{"method": "dpo"}, {"method": "full", "teacher": "teacher"}])
def test_what_clients_cannot_learn_is_refused(project, changes):
    change_finetune(project, **changes)
    with pytest.raises(
        InputError, match=f"finetune.method is {changes['method']}.*: clients learn the answers"
    ):
        check_method(load_params())


def test_without_flower_the_message_says_how_it_is_installed(project):
    with pytest.raises(InputError, match="Flower is not installed here") as error:
        main([])
    assert "make federated" in error.value.fix


def run(folder, *options):
    """Run the example in Flower's environment; return its log."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [PYTHON, "-m", "docs.examples.federated", "--by", "user", *options]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment)
    return done.returncode, done.stderr


@pytest.mark.slow
@pytest.mark.skipif(not PYTHON.exists(), reason="Flower has an own environment: make test-slow")
def test_four_clients_train_the_weighted_mean_of_their_adapters(project):
    """Two rounds; the last one again, as after a kill, gives the same bytes."""
    import numpy as np
    import torch

    from stages.common.model.generation import answer_questions, encode_questions
    from stages.common.model.loading import load_base, load_tokenizer, load_tuned

    options = ("--clients", "4", "--rounds", "2", "--updates", "3")
    code, log = run(project, *options)
    assert code == 0, log
    assert "round 2 of 2: training loss" in log
    (work,) = (project / "checkpoints/federated").iterdir()
    rounds = [json.loads((work / f"round-000{n}/round.json").read_text()) for n in (1, 2)]

    # The clients have what they trained in the last round, and no row of another.
    clients = [work / f"client-{number}" for number in (1, 2, 3, 4)]
    users = [{row.tags["user"] for row in read_rows(client / "rows.parquet")} for client in clients]
    assert sum(map(len, users)) == len(set.union(*users)) == len(USERS)
    for client, own in zip(clients, users, strict=True):
        for path in client.rglob("*.parquet"):
            assert {row.tags["user"] for row in read_rows(path)} <= own
    tokens = np.array([client["answer_tokens"] for client in rounds[1]["clients"]], dtype=np.float64)
    trained = [read_adapter(client / "artifacts/finetune") for client in clients]
    average = read_adapter(project / "artifacts/finetune")
    assert {one.settings for one in trained} == {average.settings}
    for name, tensor in average.weights.items():
        parts = np.stack([one.weights[name] for one in trained]).astype(np.float64)
        assert np.abs(parts - parts[0]).max() > 0, "the clients learned alike"
        np.testing.assert_allclose(tensor, np.tensordot(tokens / tokens.sum(), parts, 1), atol=1e-6)

    # What it ends with is what later stages read.
    metrics = json.loads((project / "reports/finetune/metrics.json").read_text())
    assert metrics["federated"] == {"clients": 4, "rounds": 2} and metrics["train_rows"] == 36
    assert metrics["steps"] == 6 and metrics["started_from"] == "base"
    assert metrics["validation_loss"] < rounds[0]["validation_loss"]
    assert (project / "reports/finetune/loss.svg").exists()
    cpu = torch.device("cpu")
    base, adapter = project / "artifacts/fetch_base", project / "artifacts/finetune"
    models = load_base(base, torch.float32, cpu), load_tuned(base, adapter, torch.float32, cpu)
    tokenizer = load_tokenizer(base)
    questions = encode_questions(tokenizer, rows_of(USERS, 1, 100))
    losses = [
        sum(answer.reference_loss for answer in answer_questions(model, tokenizer, questions, 8, 4))
        for model in models
    ]
    assert losses[1] < losses[0]

    # A server that is killed goes on after its last complete round.
    before = (adapter / "adapter_model.safetensors").read_bytes()
    (work / "round-0002/round.json").unlink()
    code, log = run(project, *options)
    assert code == 0 and "going on after round 1 of 2" in log, log
    assert (adapter / "adapter_model.safetensors").read_bytes() == before
