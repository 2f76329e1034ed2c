"""Where a stage's files are, and how they are written: to a temporary name, then renamed."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from stages.common.errors import InputError

STATE = Path(".perennial")  # of a checkout: what runs remember between them; never tracked by git or DVC


def artifacts(stage: str) -> Path:
    """Return the folder of what later stages read from `stage`."""
    return Path("artifacts") / stage


def reports(stage: str) -> Path:
    """Return the folder of what people read from `stage`: evidence as JSON, pictures, pages."""
    return Path("reports") / stage


def make_folder(path: Path) -> None:
    """Create a folder with its parents; that of the state, wherever it is above, only for its owner.

    What runs remember has texts of users: events, answers, logs. A folder of theirs that others can open is
    closed, if it is this user's.
    """
    state = next((folder for folder in (path, *path.parents) if folder.name == STATE.name), None)
    if state is not None:
        state.parent.mkdir(parents=True, exist_ok=True)
        state.mkdir(mode=0o700, exist_ok=True)
        close_to_others(state, 0o700)
    path.mkdir(parents=True, exist_ok=True)


def close_to_others(path: Path, mode: int) -> None:
    """Give a file or folder a mode, if it is this user's and others can open it."""
    found = path.stat()
    if found.st_mode & 0o077 and found.st_uid == os.getuid():
        path.chmod(mode)


def write_bytes(path: Path, data: bytes) -> None:
    """Write `data` so that `path` holds either the old content or all of the new."""
    with atomic_write(path) as temporary:
        temporary.write_bytes(data)


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8, all or nothing."""
    write_bytes(path, text.encode("utf-8"))


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """Write lines that end with their line feed as UTF-8, all or nothing; they are never all in memory."""
    with atomic_write(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        file.writelines(lines)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as JSON with sorted keys, so that equal values are equal bytes.

    Raises:
        ValueError: `value` holds NaN or an infinity, which JSON does not know.
    """
    # DVC takes a file that begins in Hindi or Chinese for a binary one, and refuses it as metrics.
    is_ascii = path.name == "metrics.json"
    text = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=is_ascii, allow_nan=False)
    write_text(path, f"{text}\n")


def write_private_json(path: Path, value: Any) -> None:
    """Write `value` as JSON that only its owner can read, at no moment anyone else."""
    with atomic_write(path, 0o600) as temporary:
        temporary.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    """Read a JSON file that an earlier stage wrote.

    Raises:
        InputError: it is not there, or is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise missing(path) from None
    except ValueError as error:
        raise InputError(
            f"{path} is not JSON: {error}", f"remove it and run its stage again: {_repro(path)}"
        ) from None


def read_lines(path: Path) -> list[str]:
    """Return the lines of a JSON Lines file; only "\\n" ends one, U+2028 and U+0085 may be in its texts."""
    return path.read_text(encoding="utf-8").removesuffix("\n").split("\n") if path.stat().st_size else []


def hash_file(path: Path) -> str:
    """Return the SHA-256 of a file in hex, read in blocks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_files(paths: Iterable[Path]) -> str:
    """Return a SHA-256 in hex of several files, of their names and contents in this order."""
    whole = hashlib.sha256()
    for path in paths:
        whole.update(f"{path.name}\0{hash_file(path)}\n".encode())
    return whole.hexdigest()


def missing(path: Path) -> InputError:
    """Return the error for a file that an earlier stage should have written."""
    if path.is_relative_to(artifacts("initial_adapter")):  # no stage writes it
        return InputError(
            f"{path} does not exist",
            "git checkout artifacts/initial_adapter, or set finetune.warm_start_from: null",
        )
    return InputError(f"{path} does not exist", f"run the stage that writes it: {_repro(path)}")


def find_missing(error: FileNotFoundError) -> InputError | None:
    """Return the error of `missing` for what a library has not found; None if no stage writes it."""
    found = re.search(r"(?:artifacts|reports)/[^\s'\"]+", str(error))
    return missing(Path(found[0])) if found else None


def _repro(path: Path) -> str:
    parts = path.parts
    return f"dvc repro {parts[1]}" if len(parts) > 1 and parts[0] in ("artifacts", "reports") else "dvc repro"


@contextmanager
def atomic_write(path: Path, mode: int = 0o644) -> Iterator[Path]:
    """Yield a path next to `path` for the caller to write; rename it over `path` on success.

    Args:
        mode: the permissions of the file in the end; until then only its owner can read it.
    """
    make_folder(path.parent)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        os.chmod(temporary, mode)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_dir(path: Path) -> Iterator[Path]:
    """Yield an empty folder next to `path`; on success it takes the place of `path`."""
    make_folder(path.parent)
    for killed in path.parent.glob(f".{path.name}.*"):  # a process killed in here could not tidy up
        shutil.rmtree(killed, ignore_errors=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        yield temporary
        os.chmod(temporary, 0o755)
        if path.exists():
            shutil.rmtree(path)
        os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
