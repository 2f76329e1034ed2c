"""Adapters on disk, and `artifacts/initial_adapter`: the adapter that training starts from.

A flow, or a user, puts the initial adapter there. The folder always has a README.md (DVC needs an existing
path as a dependency), and may have an adapter:

    adapter_config.json, adapter_model.safetensors   as in `artifacts/finetune`
    origin.json                                      {"version": ..., "base_sha256": ...}
    trained_row_ids.txt                              ids of the rows it was trained on; may be missing

`version` is the version of the model that the adapter belongs to, and `base_sha256` the hash of the weights
of its base model, both as in `artifacts/export/serving.json`. `origin.json` is written last and removed
first, so an adapter without it is incomplete.
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
ORIGIN = "origin.json"
TRAINED_IDS = "trained_row_ids.txt"
PAGE = "README.md"
FOLDER = artifacts("initial_adapter")


@dataclass(frozen=True, slots=True)
class InitialAdapter:
    """An adapter to start training from, the version of its model, and the hash of its base model."""

    folder: Path
    version: str
    base_sha256: str

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that decide the result of the training."""
        return self.folder / CONFIG, self.folder / WEIGHTS

    def read_trained_ids(self) -> frozenset[str]:
        """Return the ids of the rows that it was trained on; none if they are not recorded."""
        return read_trained_ids(self.folder)


def read_initial_adapter(folder: Path = FOLDER) -> InitialAdapter | None:
    """Return the adapter in `folder`, or None if there is none.

    Raises:
        InputError: a file is missing, or origin.json has no version or base_sha256.
    """
    names = (CONFIG, WEIGHTS, ORIGIN)
    absent = [name for name in names if not (folder / name).is_file()]
    if len(absent) == len(names):
        return None
    if absent:
        raise InputError(
            f"the adapter in {folder} is incomplete: it lacks {', '.join(absent)}", _how_to_empty(folder)
        )
    origin = read_json(folder / ORIGIN)
    values = [origin.get(key) if isinstance(origin, dict) else None for key in ("version", "base_sha256")]
    version, base_sha256 = values
    if not (isinstance(version, str) and version and isinstance(base_sha256, str) and base_sha256):
        raise InputError(
            f"{folder / ORIGIN} has no version and base_sha256: {origin}",
            f"write both as artifacts/export/serving.json has them, or {_how_to_empty(folder)}",
        )
    return InitialAdapter(folder, version, base_sha256)


def put_initial_adapter(
    adapter: Path, version: str, base_sha256: str, folder: Path = FOLDER
) -> InitialAdapter:
    """Copy the adapter in the folder `adapter` to `folder`, replacing the one there.

    Raises:
        InputError: `adapter` is not an adapter's folder; then nothing is changed.
    """
    for name in (CONFIG, WEIGHTS):
        if not (adapter / name).is_file():
            raise InputError(
                f"{adapter} contains no adapter: {name} does not exist", "use the folder of a peft adapter"
            )
    for name in (ORIGIN, TRAINED_IDS):
        (folder / name).unlink(missing_ok=True)
    for name in list_adapter_files(adapter):
        with atomic_write(folder / name) as temporary:
            shutil.copyfile(adapter / name, temporary)
    write_json(folder / ORIGIN, {"version": version, "base_sha256": base_sha256})
    return InitialAdapter(folder, version, base_sha256)


def clear_initial_adapter(folder: Path = FOLDER) -> None:
    """Remove the adapter from `folder`, but not its README.md: training starts with a new adapter."""
    for name in (ORIGIN, TRAINED_IDS, WEIGHTS, CONFIG):
        (folder / name).unlink(missing_ok=True)


def list_adapter_files(adapter: Path) -> list[str]:
    """Return the names of the files of an adapter that are kept with it; the weights are last."""
    return [name for name in (CONFIG, TRAINED_IDS, WEIGHTS) if (adapter / name).is_file()]


def read_trained_ids(adapter: Path) -> frozenset[str]:
    """Return the ids of the rows that an adapter was trained on; none if they are not recorded."""
    path = adapter / TRAINED_IDS
    return frozenset(path.read_text(encoding="utf-8").split()) if path.is_file() else frozenset()


def write_trained_ids(ids: Iterable[str], adapter: Path) -> None:
    """Write the ids of the rows that an adapter was trained on, one a line."""
    write_text(adapter / TRAINED_IDS, "".join(f"{one}\n" for one in sorted(ids)))


def check_base(initial: InitialAdapter, base_sha256: str) -> None:
    """Check that an adapter was trained on this base model.

    Raises:
        InputError: with both hashes.
    """
    if initial.base_sha256 != base_sha256:
        raise InputError(
            f"the adapter in {initial.folder} ({initial.version}) was trained on a base model with the "
            f"sha256\n  {initial.base_sha256}, and artifacts/fetch_base has\n  {base_sha256}",
            f"{_how_to_empty(initial.folder)}, or fetch the base model that it belongs to",
        )


def check_weights_file(initial: InitialAdapter) -> None:
    """Check that the file of an adapter's weights is whole, by its header; the weights are not read.

    Raises:
        InputError: it is cut, or is no file of weights.
    """
    from safetensors import SafetensorError, safe_open

    path = initial.folder / WEIGHTS
    try:
        with safe_open(path, framework="numpy"):
            pass
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"{path} cannot be read: {error}", f"write it again, or {_how_to_empty(initial.folder)}"
        ) from None


def _how_to_empty(folder: Path) -> str:
    return f"empty {folder} (all but {PAGE}) to train a new adapter"
