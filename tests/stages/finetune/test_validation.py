import csv

import pytest
import torch
from peft import PeftModel

from stages.common.chat.turns import unroll
from stages.common.errors import InputError, ParamsError
from stages.common.messages import Message
from stages.common.model.adapter import read_trained_ids
from stages.common.model.loading import load_base, load_tokenizer
from stages.common.records import make_row, read_rows, write_rows
from stages.common.task.kinds import make_task, read_task
from stages.finetune.__main__ import main
from stages.finetune.progress.early_stopping import EarlyStopping
from stages.finetune.progress.validation import ValidationPoint, draw_sample, plan_points
from tests.stages.finetune.project import adapter, change_finetune, evidence, rows
from tests.tiny import make_tokenizer


def ask_kept_adapter(project):
    """Ask the validation rows with the adapter on the disk, without anything of the training."""
    base = project / "artifacts" / "fetch_base"
    model = load_base(base, torch.float32, torch.device("cpu"))
    tuned = PeftModel.from_pretrained(model, project / "artifacts" / "finetune").eval()
    validation = read_rows(project / "artifacts" / "split" / "validation.parquet")
    sample = draw_sample(read_task(), load_tokenizer(base), validation, "all", 32, 96, 7)
    return sample.ask(tuned, 0)


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


def test_early_stopping_without_its_metric_or_rows_is_refused_before_training(project):
    change_finetune(project, validate_every=0.5, early_stopping={"metric": "macro_f1", "patience": 1})
    with pytest.raises(InputError, match="macro_f1, and answers of kind json have none") as error:
        main()
    assert "one of loss, exact_match, valid_output, slot_f1" in error.value.fix
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
