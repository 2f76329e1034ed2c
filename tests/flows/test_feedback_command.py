"""`perennial feedback`: what it shows is what a retraining would learn."""

import json
from pathlib import Path

import pytest
import yaml

from flows.feedback import main
from monitoring.feedback.rows import HELD_OUT, ROWS, read_labelled
from stages.common.task.json_task import JsonTask
from tests.monitoring import store
from tests.services.serving import ROOT

ON = '{"intent":"On"}'


@pytest.fixture
def url(tmp_path, monkeypatch):
    """A checkout with a model, and the URL of its event store, which is not there yet."""
    monkeypatch.chdir(tmp_path)
    url = f"sqlite:///{tmp_path}/events.db"
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    params["services"]["events"]["url"] = url
    params["services"]["guard"] |= {"toxicity": "off"}
    Path("params.yaml").write_text(yaml.safe_dump(params))
    Path("artifacts/export").mkdir(parents=True)
    about = {"task": JsonTask("intent").describe(), "answer_schema": None, "system_prompt": None}
    Path("artifacts/export/serving.json").write_text(json.dumps(about))
    return url


def test_it_shows_the_report_and_writes_only_if_asked(url, capsys):
    store.stored(url, store.exchange(1), store.feedback(1, correction=ON))
    assert main([]) == 0
    assert "1 pieces of feedback on 1 answers" in capsys.readouterr().out
    assert not ROWS.exists()
    assert main(["--write"]) == 0
    assert len(read_labelled(ROWS)) + len(read_labelled(HELD_OUT)) == 1


def test_the_guard_looks_at_corrections_as_it_does_for_a_retraining(url, capsys):
    insult = '{"intent":"On","area":"I will kill you, you stupid idiot"}'
    store.stored(url, store.exchange(1), store.feedback(1, correction=insult))
    assert main([]) == 0
    assert "| suspicious | 1 |" in capsys.readouterr().out


def test_without_a_store_it_says_what_to_do(url, capsys):
    assert main([]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: there is no event store") and "fix: " in error
