import csv

import pytest
import torch
from peft import PeftModel

from stages.common.chat.turns import unroll
from stages.common.errors import InputError, ParamsError
from stages.common.messages import Message
from stages.common.model.adapter import read_trained_ids
from stages.common.model.generation import encode_questions
from stages.common.model.loading import load_base, load_tokenizer
from stages.common.records import make_row, read_rows, write_rows
from stages.common.task.kinds import make_task, read_task
from stages.finetune.__main__ import main
from stages.finetune.progress.asking import MOST_AT_ONCE, Validation, explain_full_memory_of_answers
from stages.finetune.progress.early_stopping import EarlyStopping
from stages.finetune.progress.validation import ValidationPoint, draw_sample, merge_shares, plan_points
from stages.finetune.progress.watch import Watch
from tests.stages.finetune.project import adapter, change_finetune, evidence, make_labels, rows
from tests.tiny import make_model, make_tokenizer, save_model


def ask_kept_adapter(project):
    """Ask the validation rows with the adapter on the disk, without anything of the training."""
    base = project / "artifacts" / "fetch_base"
    model = load_base(base, torch.float32, torch.device("cpu"))
    tuned = PeftModel.from_pretrained(model, project / "artifacts" / "finetune").eval()
    validation = read_rows(project / "artifacts" / "split" / "validation.parquet")
    sample = draw_sample(read_task(), load_tokenizer(base), validation, "all", 32, 96, 7)
    return sample.ask(tuned, 0, 4)


def test_the_points_are_those_of_the_model_and_change_nothing_that_is_learned(project):
    change_finetune(project, dropout=0.1, validate_every=None)
    main()
    learned, loss = adapter(project), evidence(project)["validation_loss"]
    assert evidence(project)["validation_points"] == []
    assert (project / "reports/finetune/validation.csv").read_text() == "step,loss\n"
    change_finetune(project, dropout=0.1, validate_every=0.3)
    main()
    assert adapter(project) == learned
    points = evidence(project)["validation_points"]
    assert [point["step"] for point in points] == [3, 7, 10]
    assert points[-1]["loss"] == pytest.approx(loss, rel=1e-4)
    assert points[-1]["loss"] < points[0]["loss"]
    again = ask_kept_adapter(project)
    assert points[-1]["loss"] == pytest.approx(again.loss, rel=1e-4)
    assert {name: points[-1][name] for name in ("exact_match", "valid_output", "slot_f1")} == again.metrics
    with (project / "reports" / "finetune" / "validation.csv").open() as file:
        assert [float(line["loss"]) for line in csv.DictReader(file)] == [
            pytest.approx(point["loss"], abs=1e-6) for point in points
        ]
    picture = (project / "reports" / "finetune" / "loss.svg").read_text()
    assert "validation, a sample" in picture and "valid_output" in picture


def test_a_training_that_gets_no_better_stops_and_keeps_its_best_adapter(project, caplog):
    caplog.set_level("INFO")
    # No answer is right yet: the first point stays the best.
    change_finetune(project, validate_every=0.1, early_stopping={"metric": "exact_match", "patience": 2})
    main()
    found = evidence(project)
    first, second, third = found["validation_points"]
    assert [point["exact_match"] for point in (first, second, third)] == [0.0, 0.0, 0.0]
    assert (found["steps"], found["kept_step"]) == (3, 1)
    assert third["loss"] < second["loss"] < first["loss"]
    assert ask_kept_adapter(project).loss == pytest.approx(first["loss"], rel=1e-5)
    assert "stopping: exact_match was best after update 1 (0.0000), and not better at 2 points" in caplog.text
    # Rows of later batches were not learned: the next training takes them as new.
    assert len(read_trained_ids(project / "artifacts" / "finetune")) == 4
    assert 3 * 4 * 40 < found["train_tokens"] < 3 * 4 * 100


def test_a_training_on_labels_stops_at_the_best_f1_of_the_classes(project, caplog):
    caplog.set_level("INFO")
    make_labels(project)
    stopping = {"metric": "macro_f1", "patience": 3}
    change_finetune(project, method="head", epochs=9, validate_every=0.02, early_stopping=stopping)
    main()
    found = evidence(project)
    points = found["validation_points"]
    best = max(points, key=lambda point: point["macro_f1"])
    assert best["macro_f1"] > 0 and best not in points[-3:]
    assert found["kept_step"] == best["step"] == points[-4]["step"]
    assert found["steps"] == points[-1]["step"] < 90
    assert f"stopping: macro_f1 was best after update {best['step']} " in caplog.text


def test_early_stopping_without_its_metric_or_rows_is_refused_before_training(project):
    change_finetune(project, validate_every=0.5, early_stopping={"metric": "macro_f1", "patience": 1})
    with pytest.raises(InputError, match="macro_f1, and answers of kind json have none") as error:
        main()
    assert "one of loss, exact_match, valid_output, slot_f1" in error.value.fix
    # Every row can be learned, and none has room for an answer that is longer than its reference.
    found = encode_questions(make_tokenizer(), rows(8, start=1000))
    narrow = max(len(question.prompt) + len(question.reference) for question in found)
    save_model(project / "artifacts" / "fetch_base", max_position_embeddings=narrow)
    least = min(len(question.prompt) for question in found)
    long = [row for row, q in zip(rows(8, start=1000), found, strict=True) if len(q.prompt) > least + 4]
    write_rows(project / "artifacts" / "split" / "validation.parquet", long)
    with pytest.raises(InputError, match=f"no validation row fits .* into the {narrow} positions"):
        main()
    write_rows(project / "artifacts" / "split" / "validation.parquet", [])
    with pytest.raises(InputError, match="no validation rows"):
        main()
    change_finetune(project, validate_every=None)
    with pytest.raises(ParamsError, match=r"early_stopping: .* needs validate_every"):
        main()


@pytest.mark.parametrize(
    ("steps", "every", "points"),
    [(100, 0.25, {25, 50, 75, 100}), (10, 0.3, {3, 7, 10}), (2, 0.1, {1, 2}), (7, 1.0, {7})],
)
def test_points_are_spread_evenly_and_the_end_is_one(steps, every, points):
    assert plan_points(steps, every) == points


def test_an_equal_point_is_not_better_and_less_is_better_only_of_some_metrics():
    points = [ValidationPoint(n, 1.0, {"exact_match": value}) for n, value in enumerate((0.1, 0.5, 0.5, 0.4))]
    stopping = EarlyStopping("exact_match", 2, lower_is_better=False)
    assert stopping.find_best(points).step == 1
    assert not stopping.must_stop(points[:3])
    assert stopping.must_stop(points)
    assert EarlyStopping("exact_match", 9, lower_is_better=True).find_best(points).step == 0


def test_the_sample_is_the_same_in_any_order_and_has_every_learned_turn():
    task, tokenizer = make_task({"kind": "text"}), make_tokenizer()
    many = rows(50)
    drawn = draw_sample(task, tokenizer, many, "last", 8, 96, 7)
    again = draw_sample(task, tokenizer, many[::-1], "last", 8, 96, 7)
    assert len(drawn.rows) == 8
    assert {row.id for row in drawn.rows} == {row.id for row in again.rows}
    assert drawn.limit < 96
    talk = make_row([Message(role, role) for role in ("user", "assistant") * 3], "toy", "mit")
    assert list(draw_sample(task, tokenizer, [talk], "all", 8, 96, 7).rows) == list(unroll([talk], "all"))
    assert draw_sample(task, tokenizer, [], "all", 8, 96, 7) is None
    tools = make_task({"kind": "tools"})
    sample = draw_sample(tools, tokenizer, many, "last", 8, 96, 7)
    assert sample.is_lower_better("malformed_call") and not sample.is_lower_better("call_match")


def test_only_questions_are_drawn_whose_longest_answer_has_positions(caplog):
    task, tokenizer = make_task({"kind": "text"}), make_tokenizer()
    many = rows(40)
    whole = draw_sample(task, tokenizer, many, "last", 40, 96, 7)
    positions = max(len(q.prompt) + len(q.reference) for q in whole.questions)
    model = make_model(model_type="gpt2", n_inner=32, max_position_embeddings=positions)
    with pytest.raises(IndexError):
        whole.ask(model, 1, 32)
    sample = draw_sample(task, tokenizer, many, "last", 40, 96, 7, positions)
    assert 0 < len(sample.rows) < 40
    assert f"{40 - len(sample.rows)} validation rows are not asked" in caplog.text
    assert max(len(q.prompt) for q in sample.questions) + sample.limit <= positions
    assert sample.ask(model, 1, 32).loss > 0
    # The others take the places of those that do not fit.
    assert len(draw_sample(task, tokenizer, many, "last", 8, 96, 7, positions).rows) == 8
    assert draw_sample(task, tokenizer, many, "last", 8, 96, 7, 20) is None


def test_early_stopping_takes_no_metric_whose_best_value_is_between():
    task, tokenizer = make_task({"kind": "text"}), make_tokenizer()
    sample = draw_sample(task, tokenizer, rows(8), "last", 8, 96, 7)
    with pytest.raises(InputError, match="length_ratio, and neither more nor less of it is better") as error:
        sample.check_metric("length_ratio")
    assert error.value.fix == "set it to one of loss, chrf, exact_match, rouge_l, bleu"
    for name in ("loss", "chrf", "bleu"):
        sample.check_metric(name)
    tools = draw_sample(make_task({"kind": "tools"}), tokenizer, rows(8), "last", 8, 96, 7)
    tools.check_metric("malformed_call")


@pytest.mark.parametrize("processes", [1, 2, 3, 9])
def test_shares_are_put_back_in_order(processes):
    items = list("abcdefg")
    assert merge_shares([items[rank::processes] for rank in range(processes)]) == items


def test_eight_rows_are_asked_at_once_for_each_of_a_batch_and_a_full_memory_names_what_helps(tmp_path):
    sample = draw_sample(make_task({"kind": "text"}), make_tokenizer(), rows(8), "last", 8, 96, 7)
    sizes = [Validation(Watch(sample, 0.5), 10, "sdpa", tmp_path, rows).at_once for rows in (1, 3, 512)]
    assert sizes == [8, 24, MOST_AT_ONCE]
    for at_once, setting in ((4, "finetune.validation_rows"), (1, "finetune.max_length")):
        with (
            pytest.raises(InputError, match=r"full while validation rows are asked: .*memory") as error,
            explain_full_memory_of_answers(at_once),
        ):
            torch.empty(1 << 55)
        assert "finetune.validate_every: null" in error.value.fix and setting in error.value.fix
    with pytest.raises(ZeroDivisionError), explain_full_memory_of_answers(4):
        1 / 0  # noqa: B018
