"""The benchmark of methods: a tiny model from its own errors to the table with intervals and p-values."""

import json
import re

import pytest

from benchmarks import methods
from stages import ask_base
from stages.common.errors import InputError
from stages.common.messages import Message
from stages.common.records import make_row
from stages.evaluate import __main__ as evaluate
from stages.export import __main__ as export
from stages.finetune import __main__ as finetune
from tests.stages.families import write_project
from tests.stages.test_families import numbered

STAGES = {"ask_base": ask_base, "finetune": finetune, "export": export, "evaluate": evaluate}


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A checkout in which a tiny model was trained; stages run in this process."""
    folder = tmp_path / "home"
    folder.mkdir()
    monkeypatch.chdir(folder)
    settings = {"learning_rate": 0.01, "epochs": 10, "rank": 8, "validate_every": None, "batch_size": 4}
    write_project("llama", numbered("llama"), **{f"finetune__{name}": it for name, it in settings.items()})
    finetune.main()

    def run(workspace, stage):
        with monkeypatch.context() as patch:
            patch.chdir(workspace)
            STAGES[stage].main()

    monkeypatch.setattr(methods, "run", run)
    return folder


@pytest.mark.slow
def test_each_figure_has_an_interval_and_its_difference_from_the_start_a_p_value(home, tmp_path, capsys):
    out = tmp_path / "out.json"
    words = ["--home", str(home), "--methods", "dpo", "--rates", "0.01", "--own-errors", "28"]
    assert methods.main([*words, "--out", str(out)]) == 0
    start, tuned = json.loads(out.read_text())["models"]
    assert set(start["figures"]) == {"old test", "valid", "likelier", "margin"}
    for name, figure in tuned["figures"].items():
        before, change = start["figures"][name], figure["difference"]
        assert figure["low"] <= figure["value"] <= figure["high"]
        assert change["value"] == pytest.approx(figure["value"] - before["value"], abs=1e-5)
        assert 0 < change["p_value"] <= 1 and "difference" not in before
    assert tuned["figures"]["margin"]["difference"]["value"] > 0  # what it learned holds for other errors
    lines = capsys.readouterr().out.splitlines()
    assert "old test (8) | valid (8) | likelier (" in lines[2]
    figures = r"[\d.]+ % \([\d.]+ to [\d.]+\); [+-][\d.]+ \([+-][\d.]+ to [+-][\d.]+\), p [01]\.\d{3}"
    assert re.match(rf"\| dpo \| 0.01 \| \d+ \| \d+ \| {figures} \| {figures} \| ", lines[-1])


def test_errors_that_are_held_out_are_of_other_groups_than_those_learned():
    def make(n):
        messages = [Message("user", f"question {n}"), Message("assistant", "yes")]
        return make_row(messages, "toy", "mit", f"template {n % 5}", rejected=Message("assistant", "no"))

    learned, held_out = methods.share_out([make(n) for n in range(20)])
    assert len(learned) + len(held_out) == 20
    assert not {row.group for row in learned} & {row.group for row in held_out}
    with pytest.raises(InputError, match="all of one group"):
        methods.share_out([make(0), make(5)])
