"""A home of its own for the demo: a checkout beside the user's, whose files it leaves alone.

It has the tracked files of the checkout, its own git repository, its own parameters, and DVC's
cache of the checkout, so that what the checkout has computed already need not be computed again.
"""

from __future__ import annotations

import configparser
import json
import os
import random
import shutil
import subprocess
import sys
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import yaml

from stages.common.artifacts import STATE, read_json, write_bytes, write_json
from stages.common.errors import InputError
from stages.common.params.loading import load_params
from stages.common.records import Message, Row, make_row, read_rows, write_rows

MANIFEST = STATE / "home.json"
# Its trainer's answers to these rows are all that the gate needs of its evaluation.
POISONED = {"ask_base.max_rows": 48, "ask_base.min_test_rows": 1}
TAIL_LINES = 15  # of a failed command's words that are shown

# The home's own from the first copy on: `dvc repro` in the home writes it.
OWN = ("dvc.lock",)


def make_home(root: Path, folder: Path, overrides: Mapping[str, Any] | None = None) -> Path:
    """Make a home at `folder` with the tracked files of the checkout at `root`, or bring it up to date.

    A file that has changed in the checkout is copied again, one that is gone there is removed, and
    all else in the home stays: what its pipeline made, what its service has kept. Where nothing has
    changed, nothing is written.

    Args:
        root: a checkout with git and DVC.
        folder: of the home; it may lie in the checkout where git ignores it.
        overrides: new values of `params.yaml` by dotted key, a list's entry by its number, as
            {"services.port": 4000, "collect.sources.0.reserved_share": 0.15}.

    Returns:
        The home's folder, absolute.

    Raises:
        InputError: `root` is no checkout, `folder` holds something else, or a key is not there.
        ParamsError: a value cannot be taken.
    """
    root, folder = root.resolve(), folder.resolve()
    if folder == root:
        raise InputError(f"{folder} is the checkout itself", "give the home a folder of its own")
    before = _manifest(folder)
    contents = dict(_tracked(root))
    if "params.yaml" not in contents:
        raise InputError(
            f"{root} tracks no params.yaml: it is no checkout of this project", "run in the checkout"
        )
    contents["params.yaml"] = with_overrides(contents["params.yaml"].decode(), overrides or {}).encode()
    known = before | (contents.keys() - set(OWN))
    if before != known:  # before the first copy: a home half made is known for one
        write_json(folder / MANIFEST, {"files": sorted(known)})
    for name in OWN:
        own, first = folder / name, root / name
        contents.pop(name, None)
        if not own.exists() and first.is_file():
            write_bytes(own, first.read_bytes())
    for name, data in contents.items():
        _write_changed(folder / name, data, (root / name).stat().st_mode & 0o777)
    for name in known - contents.keys():
        (folder / name).unlink(missing_ok=True)
    cache = _cache(root)
    _write_changed(folder / ".dvc" / "config.local", f"[cache]\n    dir = {cache}\n".encode(), 0o644)
    if known != contents.keys():
        write_json(folder / MANIFEST, {"files": sorted(contents)})
    load_params(folder / "params.yaml")
    _commit(folder)
    return folder


def with_overrides(text: str, overrides: Mapping[str, Any]) -> str:
    """Return the text of `params.yaml` with other values; comments and all else stay as they are.

    Raises:
        InputError: a key is not there, or its value stands on several lines.
    """
    spans = []
    for key, value in overrides.items():
        node = _node(text, key)
        if "\n" in text[node.start_mark.index : node.end_mark.index]:
            raise InputError(f"params.yaml: {key} stands on several lines", "change a key inside it")
        # JSON is YAML too, on one line.
        spans.append((node.start_mark.index, node.end_mark.index, json.dumps(value, ensure_ascii=False)))
    for start, end, value in sorted(spans, reverse=True):
        text = text[:start] + value + text[end:]
    return text


def _node(text: str, key: str) -> yaml.Node:
    node: yaml.Node | None = yaml.compose(text, Loader=yaml.SafeLoader)
    for part in key.split("."):
        if isinstance(node, yaml.MappingNode):
            node = next((value for name, value in node.value if name.value == part), None)
        elif isinstance(node, yaml.SequenceNode) and part.isdigit() and int(part) < len(node.value):
            node = node.value[int(part)]
        else:
            node = None
    if node is None:
        raise InputError(f"params.yaml has no key {key}", "docs/reference/params.md has every key")
    return node


def _tracked(root: Path) -> Iterator[tuple[str, bytes]]:
    """Yield the tracked files as they are now, committed or not."""
    listed = _git(root, "ls-files", "-z")
    for name in filter(None, listed.split("\0")):
        if (root / name).is_file():
            yield name, (root / name).read_bytes()


def _manifest(folder: Path) -> set[str]:
    """Return the names of the files that were copied into a home last time.

    Raises:
        InputError: there is something in the folder, and it is no home.
    """
    if (folder / MANIFEST).is_file():
        return set(read_json(folder / MANIFEST)["files"])
    if folder.is_dir() and any(folder.iterdir()):
        raise InputError(f"{folder} holds something that is no home", "empty it, or give another folder")
    return set()


def _write_changed(path: Path, data: bytes, mode: int) -> None:
    if not path.is_file() or path.read_bytes() != data:
        write_bytes(path, data)
    if path.stat().st_mode & 0o777 != mode:
        path.chmod(mode)


def _cache(root: Path) -> Path:
    """Return the folder of DVC's cache as the checkout has it."""
    for name in ("config.local", "config"):
        parser = configparser.ConfigParser()
        parser.read(root / ".dvc" / name, encoding="utf-8")
        for section in parser.sections():
            if section.strip("'\"") == "cache" and (value := parser[section].get("dir")):
                return (root / ".dvc" / value).resolve()
    return root / ".dvc" / "cache"


def _commit(folder: Path) -> None:
    if not (folder / ".git").is_dir():
        _git(folder, "init", "--quiet", "--initial-branch=main", ".")
    _git(folder, "add", "--all", ".")
    if _git(folder, "status", "--porcelain"):
        identity = ("-c", "user.name=perennial", "-c", "user.email=perennial@localhost")
        plain = ("-c", "commit.gpgsign=false", "-c", "core.hooksPath=/dev/null")
        _git(folder, *identity, *plain, "commit", "--quiet", "--message", "The demo's home")


def _git(folder: Path, *arguments: str) -> str:
    # Inside a git hook these would point to the hook's repository.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=folder, env=environment, capture_output=True, text=True, check=False
        )
    except OSError as error:
        raise InputError(f"git cannot be run in {folder}: {error}", "install git") from None
    if done.returncode:
        raise InputError(
            f"git {arguments[0]} fails in {folder}: {done.stderr.strip()}", "run in a checkout with git"
        )
    return done.stdout


def home_environment(home: Path, extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the environment for what runs in a home: this Python first, and none of the checkout's code.

    The current folder comes first on the path of `python -m`, so a home runs its own copy. Prefect has a home
    there too: the user's own would bring its deployments along, and a profile that points elsewhere.
    """
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith(("PYTHONPATH", "PREFECT_"))
    }
    kept["PREFECT_HOME"] = str(home.resolve() / STATE / "prefect")
    path = os.pathsep.join([str(Path(sys.executable).parent), kept.get("PATH", os.defpath)])
    return {**kept, "PATH": path, **(extra or {})}


def run_python(
    home: Path,
    *arguments: str,
    log: Path | None = None,
    environment: Mapping[str, str] | None = None,
) -> None:
    """Run `python ARGUMENTS` in a home and wait for its end.

    Args:
        home: where.
        arguments: as ("-m", "dvc", "repro").
        log: file that what it says is added to; without one it is thrown away.
        environment: variables besides those of this process.

    Raises:
        InputError: it fails; with its last words.
    """
    tail: deque[str] = deque(maxlen=TAIL_LINES)
    with subprocess.Popen(
        [sys.executable, *arguments],
        cwd=home,
        env=home_environment(home, environment),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
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
        said = "".join(tail).rstrip() or "it said nothing"
        where = f"see {log}" if log else "run it there by hand to see all it says"
        raise InputError(
            f"python {' '.join(arguments)} ended with exit code {process.returncode} in {home}\n{said}", where
        )


def poison(home: Path, folder: Path | None = None, rows: int = 800, seed: int = 7) -> Path:
    """Train a model on wrong answers, from the rows of a home, in a workspace beside it.

    Each question gets the answer of another row, so what is learned is the form of an answer and
    nothing of its sense: a candidate that a gate must refuse. A training of so few rows takes about
    a minute; a second call with the same rows and code trains nothing.

    Args:
        home: with `artifacts/fetch_base` and `artifacts/split`, as its pipeline left them.
        folder: of the workspace; beside the home where none is given.
        rows: of the training, at most.
        seed: of which rows, and of the shuffling.

    Returns:
        The workspace; its `artifacts/export` is a version as the home's pipeline makes them.

    Raises:
        InputError: the home has no trained model yet, or a stage fails.
    """
    home = home.resolve()
    folder = make_home(home, folder or home.with_name(f"{home.name}-poisoned"), POISONED)
    train = list(read_rows(home / "artifacts" / "split" / "train.parquet"))
    chosen = random.Random(f"{seed}/poison").sample(train, min(rows, len(train)))
    _link_folder(home / "artifacts" / "fetch_base", folder / "artifacts" / "fetch_base")
    for name in ("validation", "test"):
        _write_changed(
            folder / "artifacts" / "split" / f"{name}.parquet",
            (home / "artifacts" / "split" / f"{name}.parquet").read_bytes(),
            0o644,
        )
    write_rows(folder / "artifacts" / "split" / "train.parquet", shuffled_answers(chosen, seed))
    metrics = Path("reports") / "fetch_base" / "metrics.json"
    _write_changed(folder / metrics, (home / metrics).read_bytes(), 0o644)
    state = _state(folder)
    done = folder / STATE / "poisoned.json"
    if not done.is_file() or read_json(done) != {"state": state}:
        log = folder / STATE / "logs" / "poison.log"
        for stage in ("ask_base", "finetune", "export", "evaluate"):
            run_python(folder, "-m", f"stages.{stage}", log=log, environment={"HF_HUB_OFFLINE": "1"})
        write_json(done, {"state": state})
    return folder


def shuffled_answers(rows: Sequence[Row], seed: int) -> list[Row]:
    """Return the rows with each other's answers; no row keeps an answer of the same text.

    Raises:
        InputError: more than half of the rows have one and the same answer.
    """
    # Rows in the order of their answers, each given the answer half a round further: equal answers
    # stand together, so as long as none fills more than half of the round, no row meets its own.
    order = list(rows)
    random.Random(f"{seed}/order").shuffle(order)
    order.sort(key=lambda row: row.answer)
    half = len(order) // 2
    given = [
        replace_answer(row, order[(index + half) % len(order)].answer) for index, row in enumerate(order)
    ]
    if any(new.answer == old.answer for new, old in zip(given, order, strict=True)):
        raise InputError(
            f"more than half of {len(rows)} rows have one and the same answer", "give rows with more answers"
        )
    random.Random(f"{seed}/rows").shuffle(given)
    return given


def replace_answer(row: Row, answer: str) -> Row:
    """Return a row that asks the same and is answered otherwise."""
    messages = (*row.prompt, Message("assistant", answer))
    return make_row(messages, row.source, row.license, row.group, row.tags, row.origin)


def _link_folder(source: Path, target: Path) -> None:
    """Have a folder's files in another place too, without a copy where the disk can do that."""
    if not source.is_dir():
        raise InputError(f"{source} is not there", "run the home's pipeline first")
    if target.is_dir() and {p.name for p in target.iterdir()} == {p.name for p in source.iterdir()}:
        return
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target, copy_function=_link)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another disk, or one without hard links
        shutil.copy2(source, target)


def _state(folder: Path) -> str:
    """Return a hash of what the training of a workspace hangs on: its code, parameters and rows."""
    digest = sha256(_git(folder, "rev-parse", "HEAD").encode())
    digest.update((folder / "artifacts" / "split" / "train.parquet").read_bytes())
    base = folder / "artifacts" / "fetch_base"
    for path in sorted(base.iterdir()):
        digest.update(f"{path.name} {path.stat().st_size} {path.stat().st_mtime_ns}".encode())
    return digest.hexdigest()
