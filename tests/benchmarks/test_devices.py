"""The benchmark of several processes runs the stage itself, on what this checkout has."""

import pytest

from benchmarks import devices
from stages.common.records import read_rows
from tests.stages.finetune.project import make_project


@pytest.mark.slow
def test_each_share_of_a_batch_is_trained_and_its_exchange_computed(tmp_path, monkeypatch):
    monkeypatch.chdir(make_project(tmp_path, 16))
    rows = list(read_rows(tmp_path / "artifacts/split/train.parquet"))
    found = devices.measure_shares(rows, batch_size=8, processes=2, repeats=1)
    assert found["seconds_of_update"].keys() == found["runs"].keys() == {1, 2}
    ours = [found["runs"][count][0] for count in (1, 2)]
    assert ours[0]["trained_parameters"] == ours[1]["trained_parameters"] > 0
    assert found["gradient_bytes"] == 4 * ours[0]["trained_parameters"]
