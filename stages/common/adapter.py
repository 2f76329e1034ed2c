"""`artifacts/start`: the adapter from which training goes on, put there by a flow or by hand.

The folder holds a page (README.md, always there: DVC wants a path that a stage depends on) and, or not,
an adapter:

    adapter_config.json, adapter_model.safetensors   as `artifacts/finetune` has them
    start.json                                       {"version": ..., "base_sha256": ...}
    learned.txt                                      ids of the rows that it has learned; may be missing

`version` is that of the model whose adapter it is, `base_sha256` the hash of the base model's weights that
it was trained on: both as `artifacts/export/serving.json` has them. `start.json` is written last and
removed first, so that half an adapter is never taken for one.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from stages.common.artifacts import artifacts, atomic_write, read_json, write_json, write_text
from stages.common.errors import InputError

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
START = "start.json"
LEARNED = "learned.txt"
PAGE = "README.md"
FOLDER = artifacts("start")


@dataclass(frozen=True, slots=True)
class Start:
    """An adapter to learn on from: where it lies, of which model it is, and for which base."""

    folder: Path
    version: str
    base_sha256: str

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that decide what is learned."""
        return self.folder / CONFIG, self.folder / WEIGHTS

    def learned(self) -> frozenset[str]:
        """Return the ids of the rows that it has learned; none where that is not known."""
        return read_learned(self.folder)


def read_start(folder: Path = FOLDER) -> Start | None:
    """Return the adapter in `folder`, or None where there is none.

    Raises:
        InputError: part of it is missing, or start.json says nothing of use.
    """
    names = (CONFIG, WEIGHTS, START)
    absent = [name for name in names if not (folder / name).is_file()]
    if len(absent) == len(names):
        return None
    if absent:
        raise InputError(
            f"{folder} holds half an adapter: {', '.join(absent)} is not there", _emptying(folder)
        )
    about = read_json(folder / START)
    values = [about.get(key) if isinstance(about, dict) else None for key in ("version", "base_sha256")]
    version, base_sha256 = values
    if not (isinstance(version, str) and version and isinstance(base_sha256, str) and base_sha256):
        raise InputError(
            f"{folder / START} has no version and base_sha256: {about}",
            f"write both as artifacts/export/serving.json has them, or {_emptying(folder)}",
        )
    return Start(folder, version, base_sha256)


def put_start(adapter: Path, version: str, base_sha256: str, folder: Path = FOLDER) -> Start:
    """Copy the adapter in the folder `adapter` to where training goes on from, in place of the one there.

    Raises:
        InputError: `adapter` holds no adapter; then nothing is changed.
    """
    for name in (CONFIG, WEIGHTS):
        if not (adapter / name).is_file():
            raise InputError(
                f"{adapter} holds no adapter: {name} is not there", "give the folder of a peft adapter"
            )
    for name in (START, LEARNED):
        (folder / name).unlink(missing_ok=True)
    for name in adapter_files(adapter):
        with atomic_write(folder / name) as beside:
            shutil.copyfile(adapter / name, beside)
    write_json(folder / START, {"version": version, "base_sha256": base_sha256})
    return Start(folder, version, base_sha256)


def clear_start(folder: Path = FOLDER) -> None:
    """Remove the adapter from `folder`: training begins with a new one. Its page stays."""
    for name in (START, LEARNED, WEIGHTS, CONFIG):
        (folder / name).unlink(missing_ok=True)


def adapter_files(adapter: Path) -> list[str]:
    """Return the names of what is kept of the adapter in a folder; the weights come last."""
    return [name for name in (CONFIG, LEARNED, WEIGHTS) if (adapter / name).is_file()]


def read_learned(adapter: Path) -> frozenset[str]:
    """Return the ids of the rows that the adapter in a folder has learned; none where that is not known."""
    path = adapter / LEARNED
    return frozenset(path.read_text(encoding="utf-8").split()) if path.is_file() else frozenset()


def write_learned(ids: Iterable[str], adapter: Path) -> None:
    """Write the ids of the rows that the adapter in a folder has learned, one a line."""
    write_text(adapter / LEARNED, "".join(f"{one}\n" for one in sorted(ids)))


def check_base(start: Start, base_sha256: str) -> None:
    """Refuse an adapter of another base model: its weights would mean nothing there.

    Raises:
        InputError: with both hashes.
    """
    if start.base_sha256 != base_sha256:
        raise InputError(
            f"the adapter in {start.folder} ({start.version}) was trained on a base model with the sha256\n"
            f"  {start.base_sha256}, and artifacts/fetch_base has\n  {base_sha256}",
            f"{_emptying(start.folder)}, or fetch the base model it belongs to",
        )


def _emptying(folder: Path) -> str:
    return f"empty {folder} (all but {PAGE}), and a new adapter is trained"
