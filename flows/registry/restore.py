"""Restore a version that BentoML's store has lost: download its adapter from MLflow and export it again.

MLflow keeps adapters, which are small; what is served is base and adapter together. The export is
deterministic on one machine, and a version is the hash of its files, so the result can be verified.
"""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
import tempfile
import uuid
from pathlib import Path

import yaml

from flows.common import processes
from flows.registry.model_versions import download_adapter, download_file, find_version
from flows.registry.tracking import Registry
from services.versions.store import add_pipeline_output, list_versions
from stages.common.artifacts import (
    STATE,
    artifacts,
    make_folder,
    missing,
    read_json,
    reports,
    write_json,
    write_text,
)
from stages.common.errors import InputError
from stages.common.model.adapter import list_adapter_files
from stages.common.model.exported import SERVING
from stages.common.tag import Tag
from stages.common.task.kinds import TASK_FILE

logger = logging.getLogger("flows.registry.restore")

# The inputs of the export besides the adapter, taken from the checkout as it is.
NEEDED = (
    artifacts("fetch_base"),
    artifacts("split") / "train.parquet",
    reports("fetch_base") / "metrics.json",
)


def restore(registry: Registry, tag: str) -> str:
    """Put a registered version into BentoML's store, unless it is there; return its tag.

    Exports in a folder of its own, so the pipeline's newest output stays. Takes as long as an export.

    Raises:
        InputError: MLflow has no such version, the base model of the checkout is another, or the export gave
            another version.
    """
    root = registry.root
    if tag in list_versions(Tag.parse(tag).name):
        return tag
    for path in NEEDED:
        if not (root / path).exists():
            raise missing(path)
    wanted = find_version(registry, tag).tags["base_sha256"]
    found = read_json(root / reports("fetch_base") / "metrics.json")["sha256"]
    if found != wanted:
        raise InputError(
            f"{tag} belongs to the base model {wanted[:12]}, and {artifacts('fetch_base')} is {found[:12]}",
            "fetch that base model first: fetch_base in params.yaml, then dvc repro fetch_base",
        )
    kept = root / STATE
    make_folder(kept)
    with tempfile.TemporaryDirectory(prefix="restore-", dir=kept) as name:
        folder = Path(name)
        _make_checkout(registry, tag, folder)
        _export(folder)
        version = read_json(folder / artifacts("export") / SERVING)["version"]
        if version != Tag.parse(tag).version:
            raise InputError(
                f"the adapter of {tag} was exported as version {version}: code or libraries have changed",
                "restore it where it was trained, from its git revision (a tag of its run in MLflow)",
            )
        # Schema and system prompt come from the training rows, which have changed since.
        download_file(registry, tag, SERVING, folder / artifacts("export"))
        return add_pipeline_output(folder)


def _make_checkout(registry: Registry, tag: str, folder: Path) -> None:
    """Make a checkout for `export`: links into this one, and the version's adapter, task and parameters."""
    root = registry.root
    for path in NEEDED:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).symlink_to((root / path).resolve())
    adapter = folder / artifacts("finetune")
    adapter.mkdir(parents=True)
    downloaded = download_adapter(registry, tag, folder / "downloaded")
    for name in list_adapter_files(downloaded):
        shutil.copyfile(downloaded / name, adapter / name)
    serving = read_json(download_file(registry, tag, SERVING, folder / "downloaded"))
    if compression := serving.get("compression"):
        raise InputError(
            f"{tag} is a smaller model ({compression['variant']}), which its adapter alone does not give",
            "make it again where it was made: dvc repro compress at its git revision, a tag of its run",
        )
    write_json(folder / TASK_FILE, serving["task"])
    values = yaml.safe_load((root / "params.yaml").read_text(encoding="utf-8"))
    recorded = yaml.safe_load(
        download_file(registry, tag, "params.yaml", folder / "downloaded").read_text(encoding="utf-8")
    )
    values["export"] = recorded["export"]
    values["model_card"]["name"] = recorded["model_card"]["name"]
    write_text(folder / "params.yaml", yaml.safe_dump(values, allow_unicode=True, sort_keys=False))


def _export(folder: Path) -> None:
    """Run the stage in a process of its own, which ends with this one even if this one is killed."""
    code = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, (code, os.environ.get("PYTHONPATH"))))
    run_id = uuid.uuid4().hex
    with processes.run_watchdog(run_id):
        done = subprocess.run(
            [sys.executable, "-m", "stages.export"],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": path, processes.RUN_ID_VARIABLE: run_id},
            capture_output=True,
            text=True,
            check=False,
        )
    if done.returncode != 0:
        raise InputError(
            f"the export failed: {done.stderr.strip()[-2000:]}", "fix the cause and run it again"
        )
