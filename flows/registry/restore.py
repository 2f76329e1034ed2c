"""Bring a version back that BentoML's store has lost: its adapter from the registry, exported once more.

The registry keeps adapters, which are small; what is served is base and adapter together. The export is
deterministic on a machine, and a version is the hash of what it writes: so the result proves itself.

    python -m flows.registry restore NAME:VERSION
"""

from __future__ import annotations

import argparse
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import yaml

from flows.common.cli import run_command
from flows.registry.model_versions import download_adapter, download_file, find_version
from services.versions.__main__ import add_pipeline_output, stored_tags
from stages.common.adapter import list_adapter_files
from stages.common.artifacts import STATE, artifacts, missing, read_json, reports, write_text
from stages.common.errors import InputError
from stages.common.params.loading import Params, load_params

log = logging.getLogger("flows.registry.restore")

# What exporting reads besides the adapter: of the checkout as it is now.
NEEDED = (
    artifacts("fetch_base"),
    artifacts("split") / "train.parquet",
    reports("fetch_base") / "metrics.json",
)


def restore(root: Path, params: Params, tag: str) -> str:
    """Put a recorded version into BentoML's store, if it is not there; return its tag.

    Exports in a folder of its own, so the pipeline's newest output stays. Takes as long as an export.

    Raises:
        InputError: the registry has no such version, the base model here is another, or what was exported is
            not this version.
    """
    if tag in stored_tags(tag.rpartition(":")[0]):
        return tag
    for path in NEEDED:
        if not (root / path).exists():
            raise missing(path)
    wanted = find_version(root, params, tag).tags["base_sha256"]
    found = read_json(root / reports("fetch_base") / "metrics.json")["sha256"]
    if found != wanted:
        raise InputError(
            f"{tag} belongs to the base model {wanted[:12]}, and {artifacts('fetch_base')} is {found[:12]}",
            "fetch that base model first: fetch_base in params.yaml, then dvc repro fetch_base",
        )
    kept = root / STATE
    kept.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="restore-", dir=kept) as name:
        folder = Path(name)
        _lay_out(root, params, tag, folder)
        _export(folder)
        version = read_json(folder / artifacts("export") / "serving.json")["version"]
        if version != tag.rpartition(":")[2]:
            raise InputError(
                f"the adapter of {tag} was exported as version {version}: code or libraries are others",
                "restore it where it was trained, from its git revision (a tag of its run in MLflow)",
            )
        # Schema and system prompt come from the training rows, which are others by now.
        download_file(root, params, tag, "serving.json", folder / artifacts("export"))
        return add_pipeline_output(folder)


def _lay_out(root: Path, params: Params, tag: str, folder: Path) -> None:
    """Make a checkout for the stage `export`: files of this one by link, the adapter and its parameters."""
    for path in NEEDED:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).symlink_to((root / path).resolve())
    adapter = folder / artifacts("finetune")
    adapter.mkdir(parents=True)
    downloaded = download_adapter(root, params, tag, folder / "downloaded")
    for name in list_adapter_files(downloaded):
        shutil.copyfile(downloaded / name, adapter / name)
    values = yaml.safe_load((root / "params.yaml").read_text(encoding="utf-8"))
    recorded = yaml.safe_load(
        download_file(root, params, tag, "params.yaml", folder / "downloaded").read_text(encoding="utf-8")
    )
    values["export"] = recorded["export"]
    values["model_card"]["name"] = recorded["model_card"]["name"]
    write_text(folder / "params.yaml", yaml.safe_dump(values, allow_unicode=True, sort_keys=False))


def _export(folder: Path) -> None:
    code = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, (code, os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [sys.executable, "-m", "stages.export"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise InputError(
            f"the export failed: {done.stderr.strip()[-2000:]}", "mend what it says, and run it again"
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """Restore one version; return the exit code."""
    parser = argparse.ArgumentParser(prog="perennial registry restore", description=__doc__)
    parser.add_argument("tag", help="NAME:VERSION, as MLflow's page and the releases show it")
    options = parser.parse_args(arguments)

    def restored() -> int:
        tag = restore(Path(), load_params(), options.tag)
        sys.stdout.write(f"{tag} is in the store\n")
        return 0

    return run_command(restored)
