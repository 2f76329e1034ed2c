import math
import xml.etree.ElementTree as ElementTree

import pytest

from flows.sweep.report import SweepReport, build_rows, read_best, write_report
from flows.sweep.study import SweepStudy, find_best
from stages.common.errors import InputError
from stages.common.params.loading import load_params
from stages.common.params.loop import TriedValues
from tests.flows.toy import ROOT

RATE = "finetune.learning_rate"


def settings(**changes):
    space = {RATE: TriedValues(low=1e-4, high=1e-1, log=True), "finetune.rank": TriedValues(choices=(8, 16))}
    shipped = load_params(ROOT / "params.yaml").flows.sweep
    return shipped.model_copy(update={"space": space, "startup_trials": 2, **changes})


def make(path, lower=True, current=None, new=False, **changes):
    found = settings(**changes)
    return SweepStudy(path / "studies.db", "a", found, lower_is_better=lower, current=current, new=new)


def learn(study, trial):
    """Finish a trial as a training would that is best at 0.003."""
    loss = abs(math.log10(study.read_values(trial)[RATE] / 0.003))
    study.finish(trial, "complete", loss, 1.0, f"sweep-{trial.number}")


def draw(path, count, kills=()):
    study = make(path)
    for number in range(count):
        if number in kills:
            study.ask().report(1.0, 1)  # killed at its first point: it stays as running
            study = make(path)
        learn(study, study.ask())
    return [result.values for result in study.list_results()]


def test_a_killed_sweep_draws_what_it_would_have_drawn_and_nothing_twice(tmp_path):
    whole = draw(tmp_path / "whole", 5)
    killed = draw(tmp_path / "killed", 5, kills=(0, 3))
    assert killed == whole
    assert len({tuple(values.values()) for values in whole}) == 5
    assert [one.number for one in make(tmp_path / "killed").list_results()] == [1, 2, 3, 4, 5]


def test_the_present_values_come_first_and_a_small_space_ends(tmp_path):
    space = {"finetune.rank": TriedValues(choices=(8, 16, 32))}
    study = make(tmp_path, space=space, current={"finetune.rank": "16"})
    found = []
    while (trial := study.ask()) is not None:
        found.append(study.read_values(trial)["finetune.rank"])
        study.finish(trial, "complete", 1.0, 1.0)
    assert found[0] == 16 and sorted(found) == [8, 16, 32]
    assert make(tmp_path, space=space, new=True).list_results() == []


@pytest.mark.parametrize("lower", [True, False])
def test_a_trial_that_is_worse_than_the_median_is_pruned_and_is_never_the_best(tmp_path, lower):
    study, sign = make(tmp_path, lower), 1 if lower else -1
    for value in (1.0, 2.0):
        trial = study.ask()
        trial.report(sign * value, 1)
        assert not trial.should_prune()
        study.finish(trial, "complete", sign * value, 1.0)
    bad, good = study.ask(), None
    bad.report(sign * 3.0, 1)
    assert bad.should_prune()
    study.finish(bad, "pruned", None, 1.0)
    failed = study.ask()
    study.finish(failed, "failed", None, 1.0, message="the memory is full\n  fix: lower it")
    good = study.ask()
    good.report(sign * 0.5, 1)
    assert not good.should_prune()
    study.finish(good, "complete", sign * 0.5, 1.0, "sweep-a-05")
    results = study.list_results()
    assert [one.state for one in results] == ["complete", "complete", "pruned", "failed", "complete"]
    assert [one.value for one in results] == [sign * 1.0, sign * 2.0, sign * 3.0, None, sign * 0.5]
    assert find_best(results, lower).experiment == "sweep-a-05"
    assert find_best(results[2:4], lower) is None


def test_the_report_has_every_trial_and_its_picture_those_with_a_value(tmp_path):
    study = make(tmp_path)
    for state in ("complete", "complete", "pruned", "failed"):
        trial = study.ask()
        if state == "complete":
            learn(study, trial)
            continue
        if state == "pruned":
            trial.report(2.0, 1)
        study.finish(trial, state, None, 2.0, message="full $memory$\n  fix: less" * (state == "failed"))
    report = SweepReport("a", "loss", True, tuple(study.list_results()))
    write_report(tmp_path, report)
    lines = (tmp_path / "reports/sweep/trials.csv").read_text().splitlines()
    assert lines[0] == f"trial,state,{RATE},finetune.rank,loss,points,seconds,experiment,message"
    assert report.count() == "4 trials: 2 complete, 1 pruned, 1 failed"
    rows = build_rows(report)
    assert rows[0]["trial"] == str(report.best.number) and rows[-1][""] == "failed: full $memory$"
    number, values = read_best(tmp_path)
    assert (number, values) == (report.best.number, report.best.values)
    picture = (tmp_path / "reports/sweep/trials.svg").read_text()
    ElementTree.fromstring(picture)
    for text in ("learning_rate", "loss (lower is better)", f"best: trial {number}", "stopped early"):
        assert text in picture
    write_report(tmp_path, report)
    assert (tmp_path / "reports/sweep/trials.svg").read_text() == picture


def test_a_report_without_a_complete_trial_has_a_picture_and_no_best(tmp_path):
    with pytest.raises(InputError, match="there was no sweep"):
        read_best(tmp_path)
    write_report(tmp_path, SweepReport("a", "loss", True, ()))
    with pytest.raises(InputError, match="no trial of the last sweep is complete"):
        read_best(tmp_path)
