"""Switching between the shipped tasks: params.yaml is replaced only if nothing of the user's is lost."""

import shutil
import subprocess
from pathlib import Path

import pytest

from flows.training.task_params import list_tasks, use_task
from stages.common.errors import InputError, ParamsError
from stages.common.params.loading import load_params

ROOT = Path(__file__).parents[3]


def git(root, *arguments):
    subprocess.run(
        ["git", "-c", "user.name=a", "-c", "user.email=a@example.org", *arguments],
        cwd=root,
        check=True,
        capture_output=True,
    )


@pytest.fixture
def checkout(tmp_path):
    """A git checkout of the two shipped files."""
    for name in ("params.yaml", "params.tools.yaml"):
        shutil.copy(ROOT / name, tmp_path)
    git(tmp_path, "init")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "shipped")
    return tmp_path


def read(root, name="params.yaml"):
    return (root / name).read_text(encoding="utf-8")


def edit(root, name="params.yaml"):
    text = read(root, name).replace("rank: 16", "rank: 24")
    (root / name).write_text(text, encoding="utf-8")
    return text


def test_a_task_takes_the_place_of_params_and_default_brings_the_committed_one_back(checkout):
    before = read(checkout)
    use_task(checkout, "tools")
    assert read(checkout) == read(checkout, "params.tools.yaml")
    assert load_params(checkout / "params.yaml").task.kind == "tools"
    use_task(checkout, "tools")  # a second time: nothing to do
    use_task(checkout, "default")
    assert read(checkout) == before


def test_changes_of_the_user_are_never_replaced(checkout):
    text = edit(checkout)
    for task in ("tools", "default"):
        with pytest.raises(InputError, match=r"params\.yaml has changes of your own") as error:
            use_task(checkout, task)
        assert "git checkout params.yaml" in str(error.value.fix)
    assert read(checkout) == text
    use_task_text = edit_after_switch(checkout)
    with pytest.raises(InputError, match="changes of your own"):
        use_task(checkout, "default")
    assert read(checkout) == use_task_text


def edit_after_switch(root):
    git(root, "checkout", "params.yaml")
    use_task(root, "tools")
    return edit(root)


def test_committed_changes_are_replaced_and_come_back(checkout):
    text = edit(checkout)
    git(checkout, "commit", "-am", "own")
    use_task(checkout, "tools")
    use_task(checkout, "default")
    assert read(checkout) == text


def test_a_shipped_file_that_changed_replaces_its_older_self(checkout):
    use_task(checkout, "tools")
    text = edit(checkout, "params.tools.yaml")
    use_task(checkout, "tools")
    assert read(checkout) == text


def test_a_committed_task_leaves_no_default_to_go_back_to(checkout):
    use_task(checkout, "tools")
    git(checkout, "commit", "-am", "tools")
    with pytest.raises(InputError, match=r"of the last commit is params\.tools\.yaml"):
        use_task(checkout, "default")


@pytest.mark.parametrize("task", ["tool", "../tools", ""])
def test_an_unknown_task_is_refused_with_the_known_ones(checkout, task):
    assert list_tasks(checkout) == ["default", "tools"]
    with pytest.raises(InputError, match="there is no task") as error:
        use_task(checkout, task)
    assert "default, tools" in str(error.value.fix)


def test_wrong_parameters_of_a_task_leave_params_as_they_were(checkout):
    before = read(checkout)
    wrong = read(checkout, "params.tools.yaml").replace("  rank: 16", "  rnak: 16")
    (checkout / "params.tools.yaml").write_text(wrong, encoding="utf-8")
    with pytest.raises(ParamsError, match=r"params\.tools\.yaml:\d+: finetune\.rnak"):
        use_task(checkout, "tools")
    assert read(checkout) == before


def test_without_git_the_task_is_refused_only_for_the_default(tmp_path):
    for name in ("params.yaml", "params.tools.yaml"):
        shutil.copy(ROOT / name, tmp_path)
    with pytest.raises(InputError, match="git"):
        use_task(tmp_path, "default")
    with pytest.raises(InputError, match="changes of your own"):  # it cannot be known that there are none
        use_task(tmp_path, "tools")


@pytest.mark.slow
def test_the_run_takes_the_task_before_it_makes_its_plan(finished):
    """A run with the task goes by its parameters; so does the next one without."""
    text = read(finished.root).replace("learning_rate: 0.003", "learning_rate: 0.001")
    (finished.root / "params.slow.yaml").write_text(text, encoding="utf-8")
    git(finished.root, "add", "params.yaml")
    git(finished.root, "commit", "-m", "params")

    done = finished.run("--task", "slow")

    assert done.returncode == 0, done.stderr
    assert "params.yaml is now a copy of params.slow.yaml; back: make run TASK=default" in done.stderr
    assert finished.begun() == ["train"] and read(finished.root) == text
    assert finished.run("--task", "nosuch").returncode == 1
