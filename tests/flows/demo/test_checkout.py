import os
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest
import yaml

from flows.demo.checkout import make_home, poison, run_python, shuffled_answers, with_overrides
from stages.common.artifacts import read_json, write_json
from stages.common.errors import InputError, ParamsError
from stages.common.params.loading import load_params
from stages.common.records import Message, make_row, read_rows, write_rows

ROOT = Path(__file__).resolve().parents[3]


def git(folder, *arguments):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    identity = ("-c", "user.name=t", "-c", "user.email=t@localhost", "-c", "core.hooksPath=/dev/null")
    done = subprocess.run(
        ["git", *identity, *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout


@pytest.fixture
def checkout(tmp_path):
    root = tmp_path / "checkout"
    (root / "stages").mkdir(parents=True)
    (root / "stages" / "collect.py").write_text("rows = 1\n")
    (root / "stages" / "old.py").write_text("# goes away\n")
    (root / "run").write_text("#!/bin/sh\n")
    (root / "run").chmod(0o755)
    (root / "dvc.yaml").write_text("stages: {}\n")
    (root / ".gitignore").write_text("/artifacts/\n/.perennial/\n")
    (root / ".dvc").mkdir()
    (root / ".dvc" / "config").write_text("[core]\n    analytics = false\n")
    (root / ".dvc" / ".gitignore").write_text("/config.local\n/tmp\n/cache\n")
    shutil.copy(ROOT / "params.yaml", root / "params.yaml")
    git(root, "init", "-q", ".")
    git(root, "add", "--all")
    git(root, "commit", "-qm", "first")
    (root / "artifacts").mkdir()
    (root / "artifacts" / "model").write_text("of the checkout")
    (root / "notes.txt").write_text("not tracked")
    return root


def written(folder):
    """When each file was last written, git's own aside."""
    return {
        path: path.stat().st_mtime_ns
        for path in folder.rglob("*")
        if path.is_file() and ".git" not in path.relative_to(folder).parts
    }


def test_a_home_has_the_tracked_files_its_own_parameters_and_one_commit(checkout):
    home = make_home(
        checkout,
        checkout / ".perennial" / "demo",
        {"services.port": 4321, "collect.sources.0.reserved_share": 0.15},
    )
    assert (home / "stages" / "collect.py").read_text() == "rows = 1\n"
    assert os.access(home / "run", os.X_OK)
    assert not (home / "artifacts").exists()
    assert not (home / "notes.txt").exists()
    params = load_params(home / "params.yaml")
    assert params.services.port == 4321
    assert params.collect.sources[0].reserved_share == 0.15
    assert git(home, "rev-list", "--count", "HEAD") == "1\n"
    assert git(home, "status", "--porcelain") == ""
    assert load_params(checkout / "params.yaml").services.port == 3000
    assert git(checkout, "status", "--porcelain") == "?? notes.txt\n"


def test_a_home_uses_the_cache_of_the_checkout_wherever_that_is(checkout):
    home = make_home(checkout, checkout / ".perennial" / "demo")
    assert str(checkout / ".dvc" / "cache") in (home / ".dvc" / "config.local").read_text()
    (checkout / ".dvc" / "config.local").write_text("[cache]\n    dir = ../../elsewhere\n")
    make_home(checkout, home)
    assert str(checkout.parent / "elsewhere") in (home / ".dvc" / "config.local").read_text()
    of_home = make_home(home, home.with_name("second"))
    assert str(checkout.parent / "elsewhere") in (of_home / ".dvc" / "config.local").read_text()


def test_a_second_call_writes_nothing_where_nothing_has_changed(checkout):
    overrides = {"services.port": 4321}
    home = make_home(checkout, checkout / ".perennial" / "demo", overrides)
    before = written(home)
    assert make_home(checkout, home, overrides) == home
    assert written(home) == before
    assert git(home, "rev-list", "--count", "HEAD") == "1\n"


def test_changed_code_is_copied_again_and_what_the_home_has_made_stays(checkout):
    home = make_home(checkout, checkout / ".perennial" / "demo")
    (home / "artifacts").mkdir()
    (home / "artifacts" / "model").write_text("of the home")
    (home / "dvc.lock").write_text("of: the home\n")
    (checkout / "stages" / "collect.py").write_text("rows = 2\n")  # not even committed
    (checkout / "stages" / "old.py").unlink()
    (checkout / "dvc.lock").write_text("of: the checkout\n")
    make_home(checkout, home, {"services.port": 4322})
    assert (home / "stages" / "collect.py").read_text() == "rows = 2\n"
    assert not (home / "stages" / "old.py").exists()
    assert (home / "artifacts" / "model").read_text() == "of the home"
    assert (home / "dvc.lock").read_text() == "of: the home\n"
    assert load_params(home / "params.yaml").services.port == 4322
    assert git(home, "status", "--porcelain") == ""


def test_the_first_copy_takes_over_what_the_checkout_has_computed(checkout):
    (checkout / "dvc.lock").write_text("of: the checkout\n")
    home = make_home(checkout, checkout / ".perennial" / "demo")
    assert (home / "dvc.lock").read_text() == "of: the checkout\n"


def test_a_home_half_made_is_finished(checkout):
    folder = checkout / ".perennial" / "demo"
    with pytest.raises(InputError, match=r"no key services\.prot"):
        make_home(checkout, folder, {"services.prot": 1})
    with pytest.raises(ParamsError, match="port"):
        make_home(checkout, folder, {"services.port": "a door"})
    home = make_home(checkout, folder)
    assert load_params(home / "params.yaml").services.port == 3000
    assert git(home, "rev-list", "--count", "HEAD") == "1\n"


def test_a_folder_with_something_else_in_it_is_left_alone(checkout, tmp_path):
    other = tmp_path / "letters"
    other.mkdir()
    (other / "letter.txt").write_text("dear")
    with pytest.raises(InputError, match="no home"):
        make_home(checkout, other)
    assert [path.name for path in other.iterdir()] == ["letter.txt"]
    with pytest.raises(InputError, match="the checkout itself"):
        make_home(checkout, checkout)
    with pytest.raises(InputError, match="git ls-files fails"):
        make_home(tmp_path / "letters", tmp_path / "home")


def test_other_values_leave_the_comments_and_all_other_keys_as_they_are():
    text = (ROOT / "params.yaml").read_text()
    changed = with_overrides(
        text,
        {
            "services.port": 4000,
            "monitoring.window.rows": 120,
            "collect.sources.0.reserved_share": 0.15,
            "flows.watch.cron": None,
            "curate.personal_data": ["email"],
            "monitoring.features.embeddings": "none",
        },
    )
    before, after = yaml.safe_load(text), yaml.safe_load(changed)
    assert after["services"]["port"] == 4000
    assert after["monitoring"]["window"]["rows"] == 120
    assert after["collect"]["sources"][0]["reserved_share"] == 0.15
    assert after["flows"]["watch"]["cron"] is None
    assert after["curate"]["personal_data"] == ["email"]
    assert after["monitoring"]["features"]["embeddings"] == "none"
    lines = zip(text.splitlines(), changed.splitlines(), strict=True)
    different = [(old, new) for old, new in lines if old != new]
    assert len(different) == 6
    assert all(old.partition("#")[2] == new.partition("#")[2] for old, new in different)
    assert before["evaluate"] == after["evaluate"]


@pytest.mark.parametrize("key", ["services.prot", "collect.sources.9.seed", "services.port.x", "collect"])
def test_a_key_that_is_not_there_or_not_one_value_is_named(key):
    with pytest.raises(InputError, match=key):
        with_overrides((ROOT / "params.yaml").read_text(), {key: 1})


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
    wrong = shuffled_answers(taught, seed=7)
    right = {row.question: row.answer for row in taught}
    assert sorted(row.question for row in wrong) == sorted(right)
    assert all(right[row.question] != row.answer for row in wrong)
    assert Counter(row.answer for row in wrong) == Counter(right.values())
    assert {(row.source, row.license, row.messages[0].content) for row in wrong} == {
        ("toy", "cc0-1.0", "Answer.")
    }
    assert wrong == shuffled_answers(taught, seed=7) != shuffled_answers(taught, seed=8)


def test_rows_that_nearly_all_have_one_answer_cannot_be_shuffled():
    with pytest.raises(InputError, match="one and the same answer"):
        shuffled_answers(rows(10, lambda n: "yes" if n else "no"), seed=7)


def test_a_command_that_fails_in_a_home_says_its_last_words(tmp_path):
    (tmp_path / "here.py").write_text("import os\nprint('in', os.getcwd())\n")
    run_python(tmp_path, "-m", "here", log=tmp_path / "log")
    assert (tmp_path / "log").read_text() == f"in {tmp_path}\n"
    with pytest.raises(InputError, match=r"exit code 3 in .*\nno good"):
        run_python(tmp_path, "-c", "print('no good'); raise SystemExit(3)")


@pytest.mark.slow
def test_a_poisoned_model_is_trained_on_wrong_answers_and_exported_once(tmp_path, monkeypatch):
    from tests.tiny import save_model

    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # faster for a model this small

    home = make_home(
        ROOT,
        tmp_path / "home",
        {
            "finetune.rank": 4,
            "finetune.max_length": 200,
            "finetune.dtype": "float32",
            "export.gguf": False,
            "export.examples": 5,
        },
    )
    save_model(home / "artifacts" / "fetch_base")
    split = home / "artifacts" / "split"
    split.mkdir()
    for name in ("train", "validation", "test"):
        write_rows(split / f"{name}.parquet", rows(40, lambda n: f'{{"intent":"i{n % 5}"}}'))
    write_json(
        home / "reports" / "fetch_base" / "metrics.json",
        {"name": "tiny", "revision": "1", "sha256": "0" * 64},
    )
    poisoned = poison(home, rows=24)
    assert poisoned == home.with_name("home-poisoned")
    right = {row.question: row.answer for row in read_rows(split / "train.parquet")}
    taught = read_rows(poisoned / "artifacts" / "split" / "train.parquet")
    assert len(taught) == 24
    assert all(right[row.question] != row.answer for row in taught)
    about = read_json(poisoned / "artifacts" / "export" / "serving.json")
    assert about["version"]
    assert (poisoned / "artifacts" / "finetune" / "adapter_model.safetensors").is_file()
    assert not (home / "artifacts" / "export").exists()
    before = written(poisoned)
    assert poison(home, rows=24) == poisoned
    changed = {path for path, when in written(poisoned).items() if before.get(path) != when}
    assert {path.name for path in changed} <= {"train.parquet"}
