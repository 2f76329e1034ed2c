"""Distilling a teacher: its logits where it has the same tokens, and its answers."""

import json
import logging

import pytest
import torch

from stages.common.errors import InputError
from stages.common.model.generation import encode_questions
from stages.common.model.loading import load_base, load_tokenizer, load_tuned
from stages.common.model.teacher import find_teacher
from stages.common.params.loading import ParamsError
from stages.common.records import read_rows
from stages.common.task.json_task import JsonTask
from stages.finetune.__main__ import main
from stages.finetune.objectives import teaching
from tests.stages.finetune.project import adapter, change_finetune, evidence, make_project, rows
from tests.tiny import save_model

CPU = torch.device("cpu")


@pytest.fixture
def distill(tmp_path, monkeypatch):
    monkeypatch.chdir(make_project(tmp_path, method="distill", teacher="teacher", teacher_weight=1.0))
    return tmp_path


def measure_divergence(project, model):
    """Return the mean divergence of a model from the teacher at the answers of the validation rows."""
    teacher, tokenizer = (
        load_base(project / "teacher", torch.float32, CPU),
        load_tokenizer(project / "teacher"),
    )
    total = 0.0
    for question in encode_questions(tokenizer, rows(8, 1000)):
        ids = torch.tensor([[*question.prompt, *question.reference]])
        theirs, ours = (
            torch.log_softmax(one(ids).logits[0, len(question.prompt) - 1 : -1], dim=-1).detach()
            for one in (teacher, model)
        )
        total += float((theirs.exp() * (theirs - ours)).sum(dim=-1).mean())
    return total / 8


def test_the_student_comes_nearer_to_the_teacher(distill):
    before = measure_divergence(distill, load_base(distill / "artifacts/fetch_base", torch.float32, CPU))
    main()
    tuned = load_tuned(distill / "artifacts/fetch_base", distill / "artifacts/finetune", torch.float32, CPU)
    assert measure_divergence(distill, tuned) < 0.9 * before
    assert evidence(distill)["teacher"] == "teacher"
    first = adapter(distill)
    main()
    assert adapter(distill) == first
    change_finetune(distill, teacher_weight=0.5)
    main()
    assert adapter(distill) != first


def test_all_weights_can_learn_from_a_teacher(distill):
    before = measure_divergence(distill, load_base(distill / "artifacts/fetch_base", torch.float32, CPU))
    change_finetune(distill, method="full", learning_rate=0.003)
    main()
    tuned = load_tuned(distill / "artifacts/fetch_base", distill / "artifacts/finetune", torch.float32, CPU)
    assert measure_divergence(distill, tuned) < 0.9 * before
    assert (evidence(distill)["method"], evidence(distill)["teacher"]) == ("full", "teacher")
    taught = adapter(distill)
    change_finetune(distill, teacher=None)
    main()
    assert adapter(distill) != taught and "teacher" not in evidence(distill)


def test_a_teacher_with_other_tokens_is_refused_with_the_way_to_learn_its_answers(distill):
    save_model(distill / "other", merges=(("a", "b"),))
    change_finetune(distill, teacher="other")
    with pytest.raises(InputError, match="has other tokens than the base model, 1 of them: 'ab'") as error:
        main()
    assert "finetune.distill: answers" in error.value.fix


def test_the_answers_of_a_teacher_take_the_place_of_the_rows(distill, monkeypatch):
    change_finetune(distill, distill="answers")
    with pytest.raises(InputError, match=r"none of the teacher's 40 answers can be learned: \{'cut': 40\}"):
        main()  # a random model never ends its answer
    monkeypatch.setattr(
        teaching, "_read_answers", lambda folder, rows, *settings: ['{"n":7}', None] * (len(rows) // 2)
    )
    main()
    metrics = evidence(distill)
    assert (metrics["train_rows"], metrics["teacher_answers_left_out"]) == (20, {"cut": 20})
    learned = adapter(distill)
    monkeypatch.setattr(
        teaching, "_read_answers", lambda folder, rows, *settings: ['{"n":8}', None] * (len(rows) // 2)
    )
    main()
    assert adapter(distill) != learned


def test_what_a_teacher_answered_is_kept_and_what_cannot_be_learned_is_left_out(distill, monkeypatch, caplog):
    some = rows(4)
    answers = ['{"n":7}', "no JSON", None, "  "]
    monkeypatch.setattr(teaching, "_read_answers", lambda *settings: answers)
    taught, left_out = teaching.replace_answers(distill / "teacher", some, JsonTask(None), 8, "float32")
    assert [(row.id, row.answer) for row in taught] == [(some[0].id, '{"n":7}')]
    assert left_out == {"invalid": 2, "cut": 1}
    with pytest.raises(InputError, match="none of the teacher's 1 answers can be learned"):
        monkeypatch.setattr(teaching, "_read_answers", lambda *settings: [None])
        teaching.replace_answers(distill / "teacher", some[:1], JsonTask(None), 8, "float32")


def test_a_run_that_is_started_again_does_not_ask_the_teacher_again(distill, caplog):
    first = teaching._read_answers(distill / "teacher", rows(4), 8, "float32")
    (path,) = (distill / "checkpoints/teacher").iterdir()
    assert json.loads(path.read_text()) == first
    with caplog.at_level(logging.INFO):
        assert teaching._read_answers(distill / "teacher", rows(4), 8, "float32") == first
    assert "the teacher has answered 4 rows before" in caplog.text
    teaching._read_answers(distill / "teacher", rows(5), 8, "float32")
    assert len(list((distill / "checkpoints/teacher").iterdir())) == 2


def test_an_answer_is_cut_at_the_same_place_whatever_process_asks_for_it(distill, monkeypatch):
    limits = []

    def answer(model, tokenizer, questions, at_once, limit, on_progress):
        limits.append(limit)
        return []

    monkeypatch.setattr(teaching, "answer_questions", answer)
    # Another process has a row whose answer has 80 tokens.
    monkeypatch.setattr(teaching, "gather", lambda value: [value, 80] if isinstance(value, int) else [value])
    teaching._read_answers(distill / "teacher", rows(4), 200, "float32")
    assert limits == [100]


def test_a_teacher_that_is_not_there_or_not_named_is_refused(distill):
    with pytest.raises(InputError, match="neither a folder nor a hub id"):
        find_teacher("no such//teacher")
    (distill / "empty").mkdir()
    with pytest.raises(InputError, match=r"has no config\.json with \*\.safetensors"):
        find_teacher("empty")
    change_finetune(distill, teacher=None)
    with pytest.raises(ParamsError, match="must be set with method: distill"):
        main()


def test_the_rows_that_were_trained_on_are_those_of_the_split(distill):
    main()
    ids = (distill / "artifacts/finetune/trained_row_ids.txt").read_text().split()
    assert set(ids) == {row.id for row in read_rows(distill / "artifacts/split/train.parquet")}
