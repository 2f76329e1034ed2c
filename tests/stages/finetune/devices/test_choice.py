import re

import pytest

from stages.common.errors import InputError
from stages.common.machine.devices import Host, inspect_host
from stages.finetune.devices.choice import (
    Place,
    check_not_started,
    check_place,
    choose_processes,
    read_place,
)

CPU, GPUS = Host("cpu", 4), Host("cuda", 8)
TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
}


def test_auto_takes_all_gpus_that_get_a_row_of_a_batch_and_one_process_on_a_cpu(caplog):
    assert choose_processes("auto", 16, GPUS) == 8
    assert not caplog.messages
    assert choose_processes("auto", 4, GPUS) == 4
    assert "4 of 8 GPUs are used: finetune.batch_size is 4" in caplog.text
    assert choose_processes("auto", 16, CPU) == 1
    assert choose_processes("auto", 16, Host("mps", 1)) == 1


def test_a_number_is_taken_and_a_batch_that_it_does_not_divide_is_named(caplog):
    assert choose_processes(4, 8, CPU) == 4
    assert not caplog.messages
    assert choose_processes(4, 6, CPU) == 4
    assert "batch_size 6 is no multiple of 4" in caplog.text


@pytest.mark.parametrize(
    ("devices", "batch_size", "host", "message"),
    [
        (5, 8, CPU, "finetune.devices is 5, and this host has no GPU and 4 cores"),
        (9, 16, GPUS, "finetune.devices is 9, and this host has 8 GPUs"),
        (2, 8, Host("mps", 1), r"this host has 1 GPU \(mps\)"),
        (4, 3, CPU, "finetune.batch_size is 3, and 4 processes share each batch"),
    ],
)
def test_what_the_host_or_the_batch_does_not_have_is_refused(devices, batch_size, host, message):
    with pytest.raises(InputError, match=message):
        choose_processes(devices, batch_size, host)


def test_the_host_of_this_test_can_train():
    host = inspect_host()
    assert host.count >= 1
    assert choose_processes("auto", 1, host) == 1


def test_the_place_is_read_from_what_torchrun_sets():
    assert read_place({"PATH": "/bin"}) is None
    assert read_place(TORCHRUN) == Place(5, 8, 1, 4)
    with pytest.raises(InputError, match="but LOCAL_RANK, MASTER_PORT not"):
        read_place({n: v for n, v in TORCHRUN.items() if n not in ("LOCAL_RANK", "MASTER_PORT")})
    with pytest.raises(InputError, match="not to whole numbers: RANK=first"):
        read_place({**TORCHRUN, "RANK": "first"})


@pytest.mark.parametrize(
    ("place", "devices", "batch_size", "host", "message"),
    [
        (None, "auto", 8, CPU, "torchrun did not start this process"),
        (Place(0, 8, 0, 4), 2, 8, CPU, "started 4 processes on this host, and finetune.devices is 2"),
        (Place(0, 8, 0, 4), "auto", 8, Host("cuda", 2), "started 4 processes on this host, and .* 2 GPUs"),
        (Place(0, 8, 0, 4), "auto", 7, CPU, "batch_size is 7, and 8 processes"),
        (Place(0, 2, 0, 1), "auto", 8, Host("mps", 1), "cannot connect several on mps"),
    ],
)
def test_what_torchrun_started_must_fit_the_parameters_and_the_host(
    place, devices, batch_size, host, message
):
    with pytest.raises(InputError, match=message):
        check_place(place, devices, batch_size, host)


def test_what_torchrun_started_is_taken_and_starts_no_others():
    place = Place(0, 8, 0, 4)
    assert check_place(place, "auto", 8, CPU) == check_place(place, 4, 8, CPU) == place
    with pytest.raises(InputError, match=re.escape("this is process 0 of 8 of torchrun")):
        check_not_started(place)
    check_not_started(None)
