"""Trials as DVC experiments: commits under `refs/exps/`, for `dvc exp show` and `dvc exp apply`.

`dvc exp save` would write to the index of a checkout and to `refs/exps/exec/`, which a kill leaves behind:
from then on `dvc exp list` hides new experiments (treeverse/dvc issue 9260). Here the commit is made beside
the user's index, and appears by one rename of a reference.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

from stages.common.errors import InputError
from stages.common.repository.git import read_git, run_git

FALLBACK = {"NAME": "perennial", "EMAIL": "perennial@localhost"}


def read_head(root: Path) -> str:
    """Return the commit to which experiments belong.

    Raises:
        InputError: the folder is in no git repository, or it has no commit.
    """
    if read_git(root, "rev-parse", "--git-dir") is None:
        raise InputError(
            f"{root} is not a git repository, and trials are DVC experiments, which are commits",
            "clone it with git, or run: git init, and commit its files",
        )
    head = read_git(root, "rev-parse", "--verify", "HEAD")
    if head is None:
        raise InputError(f"{root} has no commit, and an experiment belongs to one", "git add . && git commit")
    return head


def save_experiment(root: Path, head: str, name: str, files: Mapping[str, str]) -> None:
    """Make an experiment of the commit `head`: its files with the user's changes, and `files` replaced.

    The changes are part of it as in `dvc exp run`: `dvc exp apply` puts the experiment's version of every
    tracked file into the workspace. An experiment of the same name is replaced.

    Args:
        files: texts by path, relative to `root`.
    """
    with TemporaryDirectory() as folder:
        index = {"GIT_INDEX_FILE": str(Path(folder) / "index")}
        run_git(root, "read-tree", head, environment=index)
        run_git(root, "add", "--update", "--", ".", environment=index)
        prefix = run_git(root, "rev-parse", "--show-prefix").strip()
        for path, text in files.items():
            source = Path(folder) / "file"
            source.write_text(text, encoding="utf-8")
            blob = run_git(root, "hash-object", "-w", "--no-filters", str(source)).strip()
            entry = f"100644,{blob},{prefix}{path}"
            run_git(root, "update-index", "--add", "--cacheinfo", entry, environment=index)
        tree = run_git(root, "write-tree", environment=index).strip()
    message = f"dvc: commit experiment {name}"
    commit = run_git(root, "commit-tree", tree, "-p", head, "-m", message, environment=_identify(root))
    run_git(root, "update-ref", f"refs/exps/{head[:2]}/{head[2:]}/{name}", commit.strip())


def _identify(root: Path) -> dict[str, str]:
    """Return an identity for the commit, if git knows none of the user."""
    if read_git(root, "var", "GIT_COMMITTER_IDENT") is not None:
        return {}
    return {f"GIT_{role}_{key}": value for role in ("AUTHOR", "COMMITTER") for key, value in FALLBACK.items()}
