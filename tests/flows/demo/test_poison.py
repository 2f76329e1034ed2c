from collections import Counter
from pathlib import Path

import pytest

from flows.common.checkout import make_checkout
from flows.demo.poison import shuffle_answers, train_poisoned
from stages.common.artifacts import read_json, write_json
from stages.common.errors import InputError
from stages.common.messages import Message
from stages.common.records import make_row, read_rows, write_rows
from stages.common.task.json_task import JsonTask
from stages.common.task.kinds import TASK_FILE

ROOT = Path(__file__).resolve().parents[3]


def written(folder):
    """When each file was last written, git's own files excluded."""
    return {
        path: path.stat().st_mtime_ns
        for path in folder.rglob("*")
        if path.is_file() and ".git" not in path.relative_to(folder).parts
    }


def rows(count, answers):
    return [
        make_row(
            [
                Message("system", "Answer."),
                Message("user", f"question {n}"),
                Message("assistant", answers(n)),
            ],
            "toy",
            "cc0-1.0",
            group=f"g{n % 3}",
            tags={"intent": "a"},
        )
        for n in range(count)
    ]


def test_shuffled_answers_are_the_same_answers_to_other_questions():
    taught = rows(60, lambda n: f'{{"n":{n % 7}}}')
    wrong = shuffle_answers(taught, seed=7)
    right = {row.question: row.answer for row in taught}
    assert sorted(row.question for row in wrong) == sorted(right)
    assert all(right[row.question] != row.answer for row in wrong)
    assert Counter(row.answer for row in wrong) == Counter(right.values())
    assert {(row.source, row.license, row.messages[0].content) for row in wrong} == {
        ("toy", "cc0-1.0", "Answer.")
    }
    assert wrong == shuffle_answers(taught, seed=7) != shuffle_answers(taught, seed=8)


def test_rows_that_nearly_all_have_one_answer_cannot_be_shuffled():
    with pytest.raises(InputError, match="the same answer"):
        shuffle_answers(rows(10, lambda n: "yes" if n else "no"), seed=7)


@pytest.mark.slow
def test_a_poisoned_model_is_trained_on_wrong_answers_and_exported_once(tmp_path, monkeypatch):
    from tests.tiny import save_model

    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # faster for a model this small

    checkout = make_checkout(
        ROOT,
        tmp_path / "demo",
        {
            "finetune.rank": 4,
            "finetune.max_length": 200,
            "finetune.dtype": "float32",
            "export.gguf": False,
            "export.draft_rows": 5,
        },
    )
    save_model(checkout / "artifacts" / "fetch_base")
    split = checkout / "artifacts" / "split"
    split.mkdir()
    for name in ("train", "validation", "test"):
        write_rows(split / f"{name}.parquet", rows(40, lambda n: f'{{"intent":"i{n % 5}"}}'))
    write_json(
        checkout / "reports" / "fetch_base" / "metrics.json",
        {"name": "tiny", "revision": "1", "sha256": "0" * 64},
    )
    write_json(checkout / TASK_FILE, JsonTask("intent").describe())
    poisoned = train_poisoned(checkout, rows=24)
    assert poisoned == checkout.with_name("demo-poisoned")
    right = {row.question: row.answer for row in read_rows(split / "train.parquet")}
    taught = read_rows(poisoned / "artifacts" / "split" / "train.parquet")
    assert len(taught) == 24
    assert all(right[row.question] != row.answer for row in taught)
    about = read_json(poisoned / "artifacts" / "export" / "serving.json")
    assert about["version"]
    assert (poisoned / "artifacts" / "finetune" / "adapter_model.safetensors").is_file()
    assert not (checkout / "artifacts" / "export").exists()
    before = written(poisoned)
    assert train_poisoned(checkout, rows=24) == poisoned
    changed = {path for path, when in written(poisoned).items() if before.get(path) != when}
    # The checkout is set up again; nothing is trained or exported a second time.
    assert {path.name for path in changed} <= {"train.parquet", "params.yaml", "config.local"}
