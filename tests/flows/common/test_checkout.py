import os
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from dvc.repo import Repo

from flows.common.checkout import make_checkout, override_params, run_python
from flows.demo.__main__ import make_overrides
from stages.common.errors import InputError, ParamsError
from stages.common.params.loading import load_params

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


@pytest.fixture(params=["git", "tarball"])
def project(request, tmp_path):
    """A small project, with a repository and without one."""
    root = tmp_path / "100% {mine}"
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
    if request.param == "git":
        git(root, "init", "-q", ".")
        git(root, "add", "--all")
        git(root, "commit", "-qm", "first")
    (root / "artifacts").mkdir()
    (root / "artifacts" / "model").write_text("of the project")
    return root


def test_a_checkout_has_the_files_that_git_does_not_ignore_and_its_own_parameters(project):
    (project / "stages" / "new.py").write_text("not committed\n")
    before = git(project, "status", "--porcelain") if (project / ".git").exists() else None

    checkout = make_checkout(project, project / ".perennial" / "demo", {"services.port": 4321})

    assert (checkout / "stages" / "collect.py").read_text() == "rows = 1\n"
    assert (checkout / "stages" / "new.py").exists()
    assert os.access(checkout / "run", os.X_OK)
    assert not (checkout / "artifacts").exists()
    assert load_params(checkout / "params.yaml").services.port == 4321
    assert load_params(project / "params.yaml").services.port == 3000
    if before is not None:
        assert git(project, "status", "--porcelain") == before
        assert git(project, "worktree", "list").count("\n") == 1, (
            "the project's repository knows nothing of it"
        )


def test_dvc_works_in_a_checkout_with_the_cache_of_the_project_wherever_that_is(project):
    checkout = make_checkout(project, project / ".perennial" / "demo")
    with Repo(str(checkout)) as repo:
        assert Path(repo.cache.local_cache_dir) == project / ".dvc" / "cache"
    (project / ".dvc" / "config.local").write_text("[cache]\n    dir = ../../elsewhere\n")
    make_checkout(project, checkout)
    second = make_checkout(checkout, checkout.with_name("second"))
    for folder in (checkout, second):
        with Repo(str(folder)) as repo:
            assert Path(repo.cache.local_cache_dir) == project.parent / "elsewhere"


def test_an_update_replaces_changed_code_and_keeps_what_the_checkout_made(project):
    checkout = make_checkout(project, project / ".perennial" / "demo", {"services.port": 4321})
    (checkout / "artifacts").mkdir()
    (checkout / "artifacts" / "model").write_text("of the checkout")
    (checkout / "dvc.lock").write_text("of: the checkout\n")
    unchanged = (checkout / "run").stat().st_mtime_ns
    (project / "stages" / "collect.py").write_text("rows = 2\n")
    (project / "stages" / "old.py").unlink()
    (project / "dvc.lock").write_text("of: the project\n")

    make_checkout(project, checkout, {"services.port": 4322})

    assert (checkout / "stages" / "collect.py").read_text() == "rows = 2\n"
    assert not (checkout / "stages" / "old.py").exists()
    assert (checkout / "run").stat().st_mtime_ns == unchanged
    assert (checkout / "artifacts" / "model").read_text() == "of the checkout"
    assert (checkout / "dvc.lock").read_text() == "of: the checkout\n"
    assert load_params(checkout / "params.yaml").services.port == 4322


def test_equal_files_are_an_equal_commit(project):
    folder = project / ".perennial" / "demo"
    first = git(make_checkout(project, folder), "rev-parse", "HEAD")
    assert git(make_checkout(project, folder), "rev-parse", "HEAD") == first
    (project / "run").write_text("#!/bin/bash\n")
    assert git(make_checkout(project, folder), "rev-parse", "HEAD") != first


def test_a_checkout_that_was_removed_or_failed_is_made_again(project):
    folder = project / ".perennial" / "demo"
    with pytest.raises(InputError, match=r"no key services\.prot"):
        make_checkout(project, folder, {"services.prot": 1})
    with pytest.raises(ParamsError, match=r"services\.port"):
        make_checkout(project, folder, {"services.port": "a door"})
    assert load_params(make_checkout(project, folder) / "params.yaml").services.port == 3000
    shutil.rmtree(folder)
    assert (make_checkout(project, folder) / "run").exists()


def test_a_folder_with_something_else_in_it_is_left_alone(project, tmp_path):
    other = tmp_path / "letters"
    other.mkdir()
    (other / "to_mother.txt").write_text("Dear mother")
    with pytest.raises(InputError, match="is not empty"):
        make_checkout(project, other)
    assert [path.name for path in other.iterdir()] == ["to_mother.txt"]
    with pytest.raises(InputError, match="the project's own folder"):
        make_checkout(project, project)
    with pytest.raises(InputError, match=r"has no params\.yaml"):
        make_checkout(other, tmp_path / "checkout")


def test_values_are_set_by_dotted_key_and_all_others_stay(tmp_path):
    path = tmp_path / "params.yaml"
    shutil.copy(ROOT / "params.yaml", path)
    before = yaml.safe_load(path.read_text())

    override_params(path, {"services.port": 4000, "collect.sources.0.seed": 9, "flows.watch.cron": None})

    after = yaml.safe_load(path.read_text())
    assert after["services"].pop("port") == 4000 and before["services"].pop("port")
    assert after["collect"]["sources"][0].pop("seed") == 9 and before["collect"]["sources"][0].pop("seed")
    assert after["flows"]["watch"].pop("cron") is None and before["flows"]["watch"].pop("cron")
    assert after == before


@pytest.mark.parametrize("key", ["services.prot", "collect.sources.9.seed", "services.port.x", "nothing"])
def test_a_key_that_is_unknown_is_named(tmp_path, key):
    path = tmp_path / "params.yaml"
    shutil.copy(ROOT / "params.yaml", path)
    with pytest.raises(InputError, match=key):
        override_params(path, {key: 1})
    assert path.read_text() == (ROOT / "params.yaml").read_text()


def test_the_demo_runs_on_the_packaged_source_whatever_else_is_collected(tmp_path):
    path = tmp_path / "params.yaml"
    values = yaml.safe_load((ROOT / "params.yaml").read_text())
    own = {"kind": "file", "path": "data/mine.csv", "license": "mit"}
    values["collect"]["sources"] = [own, *values["collect"]["sources"]]
    path.write_text(yaml.safe_dump(values))

    override_params(path, make_overrides(load_params(path).collect.sources))

    sources = load_params(path).collect.sources
    assert [source.kind for source in sources] == ["home_intents", "feedback"]
    assert sources[0].reserved_share > 0


def test_a_command_that_fails_shows_the_end_of_its_output(tmp_path):
    (tmp_path / "here.py").write_text("import os\nprint('in', os.getcwd())\n")
    run_python(tmp_path, "-m", "here", log=tmp_path / "log")
    assert (tmp_path / "log").read_text() == f"in {tmp_path}\n"
    with pytest.raises(InputError, match=r"exit code 3 in .*\nno good"):
        run_python(tmp_path, "-c", "print('no good'); raise SystemExit(3)")
