"""A Ray cluster of this machine: two workers learn as one process does, and end as one."""

import os
import re
import secrets
import shutil
import signal
import tempfile
import time

import psutil
import pytest

from stages.common.errors import InputError
from stages.finetune.__main__ import main
from stages.finetune.devices.ray_cluster import choose_cores
from tests.stages.finetune.devices.test_two_processes import TWO_CORES, curve
from tests.stages.finetune.project import (
    MODULE,
    REPO,
    adapter,
    change_finetune,
    evidence,
    make_project,
    start_stage,
)

SETTINGS = {"dropout": 0.1, "epochs": 2, "checkpoint_every_steps": 4}
# On a machine of one's own every worker sees the folder: here none does.
NOT_SHARED = """
from stages.finetune import __main__ as stage
from stages.finetune.devices import ray_cluster
from stages.common.logs import run_stage

ray_cluster._find_sharing = lambda ray, actors: [False for _ in actors]
run_stage(stage.main)
"""


def test_the_cores_of_the_nodes_are_dealt_out():
    assert choose_cores([16], 2) == 8
    assert choose_cores([16, 4], 3) == 5  # three on the first node, none on the second
    assert choose_cores([8, 8], 3) == 4
    assert choose_cores([2], 2) == choose_cores([1, 1], 2) == 1


@pytest.mark.parametrize("address", [None, "ray://head:10001"])
def test_without_a_cluster_that_this_machine_is_a_node_of_nothing_is_read(project, monkeypatch, address):
    (project / "artifacts" / "split" / "train.parquet").write_bytes(b"no Parquet")
    change_finetune(project, launcher="ray", devices=2)
    if address:
        monkeypatch.setenv("RAY_ADDRESS", address)
    else:
        monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(InputError, match=f"RAY_ADDRESS is {address or 'not set'}") as caught:
        main()
    assert "ray start --head" in caught.value.fix


@pytest.fixture(scope="module")
def cluster():
    """A cluster of two cores, which listens on the loopback interface only."""
    import ray

    # The sockets in it have names of at most 107 characters.
    folder = tempfile.mkdtemp(prefix="ray-")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))  # else Ray writes one into the user's home
        patch.setenv("PYTHONPATH", str(REPO))
        context = ray.init(
            num_cpus=2,
            num_gpus=0,
            include_dashboard=False,
            log_to_driver=False,
            object_store_memory=100 << 20,
            _node_ip_address="127.0.0.1",
            _temp_dir=folder,
        )
        yield context.address_info["address"]
        ray.shutdown()
        os.environ.pop("RAY_AUTH_MODE")  # which Ray has set, for the stages too
    shutil.rmtree(folder, ignore_errors=True)


def start(project, address, command=MODULE):
    return start_stage(project, command, RAY_ADDRESS=address)


def end(stage):
    output, _ = stage.communicate(timeout=280)
    return output


def finish(stage):
    output = end(stage)
    assert stage.returncode == 0, output
    return output


def find_workers():
    """The actors that train; the cluster's processes are children of this one."""
    children = psutil.Process().children(recursive=True)
    return [child for child in children if child.status() != "zombie" and "ray::Worker" in child.cmdline()[0]]


def wait_for(condition):
    deadline = time.monotonic() + 280
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow
@TWO_CORES
def test_two_workers_have_the_losses_of_one_process(tmp_path, cluster, monkeypatch):
    one = make_project(tmp_path / "one", 41)
    monkeypatch.chdir(one)
    main()
    two = make_project(tmp_path / "two", 41, launcher="ray", devices=2)
    log = finish(start(two, cluster))
    assert "finetune: training on 41 rows, lora in float32 on cpu in 2 processes" in log
    assert len(re.findall("^finetune: progress 11/11 ", log, re.M)) == 1
    assert len(curve(one)) == 11 and curve(two) == pytest.approx(curve(one), rel=1e-4)
    assert evidence(two)["validation_loss"] == pytest.approx(evidence(one)["validation_loss"], rel=1e-4)
    assert (evidence(two)["processes"], evidence(two)["steps"]) == (2, 11)
    assert not find_workers()
    change_finetune(two, devices=3)
    refused = end(stage := start(two, cluster))
    assert stage.returncode == 1
    assert "error: finetune.devices is 3, and the Ray cluster has no GPU and 2 cores\n" in refused


@pytest.mark.slow
@TWO_CORES
def test_hosts_without_the_folder_send_checkpoints_to_the_url_and_the_adapter_back(tmp_path, cluster):
    store = tmp_path / "store"
    settings = {**SETTINGS, "launcher": "ray", "devices": 2}
    unbroken = make_project(tmp_path / "unbroken", 80, **settings)
    finish(start(unbroken, cluster))
    killed = make_project(tmp_path / "killed", 80, **settings)
    (killed / "artifacts" / "split" / "empty").touch()
    told = end(stage := start(killed, cluster, ("-c", NOT_SHARED)))
    assert stage.returncode == 1 and "finetune.checkpoint_url is null" in told
    change_finetune(killed, checkpoint_url=f"file://{store}")
    stage = start(killed, cluster, ("-c", NOT_SHARED))
    wait_for(lambda: list(store.glob("*/checkpoint-[0-9]*/complete.json")))
    workers = find_workers()
    assert len(workers) == 2
    workers[1].send_signal(signal.SIGKILL)
    told = end(stage)
    assert stage.returncode == 1
    assert told.count("error: ") == 1 and "Traceback" not in told, told
    assert re.search(r"error: process \d of 2 has ended, .*\n  fix: .*last complete checkpoint", told)
    wait_for(lambda: not find_workers())
    assert not (killed / "artifacts" / "finetune").exists()
    log = finish(start(killed, cluster, ("-c", NOT_SHARED)))
    assert int(re.search(r"resuming from step (\d+) of 40", log)[1]) >= 4
    assert adapter(killed) == adapter(unbroken)
    assert evidence(killed) == evidence(unbroken)
    assert not (killed / "checkpoints").exists()
    assert not list(store.iterdir())


@pytest.mark.slow
@TWO_CORES
def test_the_end_of_the_stage_is_the_end_of_its_workers(tmp_path, cluster):
    endless = make_project(tmp_path / "endless", 160, launcher="ray", devices=2, epochs=1000)
    stage = start(endless, cluster)
    wait_for(lambda: list(endless.glob("checkpoints/finetune/*/checkpoint-*/complete.json")))
    workers = find_workers()
    assert len(workers) == 2
    stage.terminate()
    end(stage)
    assert stage.returncode
    _, alive = psutil.wait_procs(workers, timeout=30)
    assert not alive
