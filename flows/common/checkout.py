"""Make a second checkout, of the demo or of a sweep: the same files, other parameters, DVC's cache shared.

The files are a snapshot of the project's folder as it is, committed or not, in a repository of the checkout's
own (`.perennial/demo.git`), of which it is a worktree. So nothing is written to the user's repository, and a
release tarball without one works too. Ignored files (artifacts, reports, data) are not part of it: the
pipeline in there makes its own, and takes from the shared cache what is already there.
"""

from __future__ import annotations

import os
import sys
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from subprocess import PIPE, STDOUT, Popen
from typing import Any

import yaml

from stages.common.artifacts import STATE, make_folder, write_text
from stages.common.errors import InputError
from stages.common.params.loading import load_params
from stages.common.repository.git import run_git

TAIL_LINES = 15  # of a failed command's output that are shown
SNAPSHOT_DATE = "2000-01-01T00:00:00Z"  # a fixed one: equal files are an equal commit


def make_checkout(
    root: Path, folder: Path, overrides: Mapping[str, Any] | None = None, cache_type: str | None = None
) -> Path:
    """Make a checkout in `folder` with the files of the project at `root`, or update it.

    Changed files are replaced and removed ones deleted; what git ignores, and the `dvc.lock` of the
    checkout, stay.

    Args:
        root: the project's folder; it needs no repository.
        folder: of the checkout; inside `root` only where git ignores it.
        overrides: values of `params.yaml` by dotted key, a list's entry by its number, as
            {"services.port": 4000, "collect.sources.0.reserved_share": 0.15}.
        cache_type: how files come out of DVC's cache, as its `cache.type`; None: as in the project.

    Returns:
        The checkout's folder, absolute.

    Raises:
        InputError: git is not installed, `root` is not a project, `folder` holds something else, or a key
            is unknown.
        ParamsError: a value is invalid.
    """
    root, folder = root.resolve(), folder.resolve()
    if folder == root:
        raise InputError(f"{folder} is the project's own folder", "choose another folder")
    if not (root / "params.yaml").is_file():
        raise InputError(f"{root} has no params.yaml", "run in the project's folder")
    repository = folder.with_name(f"{folder.name}.git")
    is_ours = (folder / ".git").is_file()
    if not is_ours and folder.is_dir() and any(folder.iterdir()):
        raise InputError(f"{folder} is not empty and not a checkout", "empty it, or choose another folder")
    commit = _snapshot(root, repository)
    if is_ours:
        run_git(folder, "checkout", "--quiet", "--force", "--detach", commit)
    else:
        # --force: a folder that was removed by hand is still registered.
        run_git(repository, "worktree", "add", "--quiet", "--force", "--detach", str(folder), commit)
    override_params(folder / "params.yaml", overrides or {})
    _share_cache(root, folder, cache_type)
    load_params(folder / "params.yaml")
    return folder


def override_params(path: Path, overrides: Mapping[str, Any]) -> None:
    """Set values of a `params.yaml` by dotted key; its comments are lost.

    Raises:
        InputError: a key is unknown; the file stays as it is.
    """
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    for key, value in overrides.items():
        *parents, last = (int(part) if part.isdigit() else part for part in key.split("."))
        try:
            section = values
            for part in parents:
                section = section[part]
            _ = section[last]  # a new key would be a typing error
            section[last] = value
        except (KeyError, IndexError, TypeError):
            raise InputError(
                f"{path.name} has no key {key}", "docs/reference/params.md lists every key"
            ) from None
    if overrides:
        write_text(path, yaml.safe_dump(values, sort_keys=False, allow_unicode=True))


def _snapshot(root: Path, repository: Path) -> str:
    """Commit the files of `root` that git does not ignore to `repository`; return the commit."""
    if not repository.is_dir():
        make_folder(repository.parent)
        run_git(repository.parent, "init", "--quiet", "--bare", repository.name)
    identity = {
        f"GIT_{role}_{key}": value
        for role in ("AUTHOR", "COMMITTER")
        for key, value in {"NAME": "perennial", "EMAIL": "perennial@localhost", "DATE": SNAPSHOT_DATE}.items()
    }
    environment = {"GIT_DIR": str(repository), "GIT_WORK_TREE": str(root), **identity}
    # The lock is each checkout's own: it records what its own pipeline made.
    run_git(root, "add", "--all", "--", ".", ":(exclude)dvc.lock", environment=environment)
    tree = run_git(root, "write-tree", environment=environment).strip()
    return run_git(root, "commit-tree", tree, "-m", "snapshot", environment=environment).strip()


def _share_cache(root: Path, folder: Path, cache_type: str | None) -> None:
    """Give the checkout the DVC cache of the project, wherever that is."""
    from dvc.repo import Repo

    with Repo(str(root), config={"core": {"no_scm": True}}) as project:
        cache = project.cache.local_cache_dir
    with (
        Repo(str(folder), config={"core": {"no_scm": True}}) as checkout,
        checkout.config.edit("local") as config,
    ):
        settings = config.setdefault("cache", {})
        settings["dir"] = str(cache)
        if cache_type is not None:
            settings["type"] = cache_type


def build_checkout_environment(folder: Path, extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the environment for commands in a checkout: this Python first, none of the project's modules.

    `python -m` puts the current folder first on the import path, so a checkout runs its own code. Its Prefect
    home is its own too: the user's would bring its deployments along, and a profile that points elsewhere.
    """
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith(("PYTHONPATH", "PREFECT_"))
    }
    kept["PREFECT_HOME"] = str(folder.resolve() / STATE / "prefect")
    path = os.pathsep.join([str(Path(sys.executable).parent), kept.get("PATH", os.defpath)])
    return {**kept, "PATH": path, **(extra or {})}


def run_python(
    folder: Path,
    *arguments: str,
    log: Path | None = None,
    environment: Mapping[str, str] | None = None,
) -> None:
    """Run `python ARGUMENTS` in a checkout and wait for its end.

    Args:
        folder: of the checkout.
        arguments: as ("-m", "dvc", "repro").
        log: the file to append the output to; None to drop it.
        environment: variables to add.

    Raises:
        InputError: it fails; with the end of its output.
    """
    tail: deque[str] = deque(maxlen=TAIL_LINES)
    with Popen(
        [sys.executable, *arguments],
        cwd=folder,
        env=build_checkout_environment(folder, environment),
        stdout=PIPE,
        stderr=STDOUT,
        text=True,
        errors="replace",
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            tail.append(line)
            if log is not None:
                log.parent.mkdir(parents=True, exist_ok=True)
                with log.open("a", encoding="utf-8") as written:
                    written.write(line)
    if process.returncode:
        output = "".join(tail).rstrip() or "it printed nothing"
        fix = f"see {log}" if log else "run it there by hand to see all of its output"
        command = f"python {' '.join(arguments)}"
        raise InputError(f"{command} ended with exit code {process.returncode} in {folder}\n{output}", fix)
