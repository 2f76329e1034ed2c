"""A stage that is started by hand before those whose files it reads."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from stages.common.artifacts import find_missing

ROOT = Path(__file__).parents[2]
STAGES = yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
READERS = [name for name in STAGES if any(dep.startswith("artifacts/") for dep in STAGES[name]["deps"])]


@pytest.mark.parametrize("stage", READERS)
def test_a_stage_without_its_input_ends_with_one_error_that_names_the_stage_to_run(tmp_path, stage):
    shutil.copy(ROOT / "params.yaml", tmp_path)
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", f"stages.{stage}"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    lines = done.stderr.splitlines()
    said = "\n".join(line for line in lines if not line.startswith("import time:"))
    imported = {line.split("|")[-1].strip() for line in lines if line.startswith("import time:")}
    assert done.returncode == 1 and "Traceback" not in said, said
    assert len(re.findall("^error: ", said, re.MULTILINE)) == 1, said
    assert re.search(r"(artifacts|reports)/\S+ (does not exist|contains no model)", said), said
    named = set(re.findall(r"dvc repro (\w+)", said))
    assert named and named <= STAGES.keys()
    assert "torch" not in imported and "transformers" not in imported


@pytest.mark.parametrize(
    ("path", "fix"),
    [
        ("artifacts/split/train.parquet", "dvc repro split"),
        ("artifacts/finetune", "dvc repro finetune"),
        ("/checkout/reports/evaluate/metrics.json", "dvc repro evaluate"),
        ("artifacts/initial_adapter/origin.json", "git checkout artifacts/initial_adapter"),
    ],
)
def test_a_file_that_a_library_does_not_find_is_named_with_what_makes_it(path, fix):
    with pytest.raises(FileNotFoundError) as error:
        Path("/nowhere", path).read_text()
    found = find_missing(error.value)
    assert found is not None and found.what.endswith("does not exist") and fix in found.fix
    assert find_missing(FileNotFoundError(2, "No such file", "/etc/nothing")) is None
