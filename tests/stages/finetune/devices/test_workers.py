"""How failures of several processes become one, and what one process does that torchrun started."""

import socket

import pytest
import torch
from torch.distributed import HashStore

from stages.common.errors import InputError, ParamsError
from stages.finetune.__main__ import main
from stages.finetune.devices import group, workers
from stages.finetune.devices.choice import Place
from tests.stages.finetune.project import adapter, change_finetune, evidence

SECOND = Place(1, 2, 1, 2)


def explain(errors, exit_codes, first=0):
    store = HashStore()
    for error in errors:
        workers.report_failure(store, SECOND, error, "lower the batch")
    return workers.find_reason(exit_codes, first, "process 1 terminated with exit code 3", store)


def test_the_first_failure_is_the_one_that_is_raised():
    found = explain([ParamsError("bad", "better"), RuntimeError("later")], [1, 1])
    assert (type(found), found.what, found.fix, found.exit_code) == (InputError, "bad", "better", 2)


def test_a_full_memory_has_the_fix_of_the_stage():
    found = explain([MemoryError("no room")], [-15, 1], first=1)
    assert str(found) == "the memory is full: no room\n  fix: lower the batch"


def test_a_bug_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError) as caught:
        1 / 0  # noqa: B018
    found = explain([caught.value], [1, -15])
    assert isinstance(found, RuntimeError)
    assert "process 1 of 2 failed" in str(found) and "1 / 0" in str(found)


def test_a_process_that_was_killed_is_named_and_not_the_connection_that_others_lost():
    lost = RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:525] Connection closed by peer")
    found = explain([lost], [1, -9])
    assert "process 1 of 2 was ended by SIGKILL" in str(found) and "last complete checkpoint" in found.fix
    # Of two with SIGTERM the first to end got it from outside.
    assert "process 1 of 2 was ended by SIGTERM" in str(explain([], [-15, -15], first=1))
    found = explain([lost], [1, 1])
    assert "another process of this training has ended" in str(found)
    assert "stored no reason: process 1 terminated with exit code 3" in str(explain([], [0, 3], first=1))


def test_hosts_with_gpus_and_without_do_not_train_together():
    store = HashStore()
    workers.check_kinds(store, "cuda")
    workers.check_kinds(store, "cuda")
    with pytest.raises(InputError, match=r"would train on cpu, and another one on cuda"):
        workers.check_kinds(store, "cpu")


def test_a_training_alone_asks_only_itself():
    assert (group.gather("a"), group.all_agree(False), group.is_main()) == (["a"], False, True)
    assert group.compute_on_hosts(lambda: "x", "rows", "copy them") == "x"


def test_one_process_of_torchrun_trains_as_one_without(project, monkeypatch):
    main()
    expected = adapter(project), evidence(project)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    variables = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1, "MASTER_PORT": port}
    for name, value in {**variables, "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(InputError, match="RANK and WORLD_SIZE are set"):
        main()
    change_finetune(project, launcher="torchrun")
    main()
    assert (adapter(project), evidence(project)) == expected
    assert group.count_processes() == 1 and not torch.distributed.is_initialized()


def test_what_this_host_does_not_have_is_refused_before_anything_is_read(project):
    (project / "artifacts" / "split" / "train.parquet").write_bytes(b"no Parquet")
    change_finetune(project, devices=100_000)
    with pytest.raises(InputError, match=r"finetune.devices is 100000, and this host has"):
        main()
