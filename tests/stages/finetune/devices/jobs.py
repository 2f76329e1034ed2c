"""What test processes run: functions that `start_workers` finds in this module by their names."""

import os
import signal
import time
from pathlib import Path

from stages.common.errors import InputError
from stages.finetune.checkpoints import choose_checkpoint, mark_complete
from stages.finetune.devices import group

RUNS = Path("checkpoints")


def tell_each_other():
    """Every function of the group, and a checkpoint that both see."""
    rank = group.get_rank()
    assert group.gather(rank) == [0, 1] and group.count_processes() == 2
    assert group.all_agree(True) and not group.all_agree(rank == 0)
    assert group.compute_on_hosts(lambda: f"rank {rank}", "rows", "copy them") == "rank 0"
    if group.is_main():
        (RUNS / "checkpoint-3").mkdir(parents=True)
        mark_complete(RUNS / "checkpoint-3")
        (RUNS / "checkpoint-6").mkdir()
    assert choose_checkpoint(RUNS) == RUNS / "checkpoint-3"
    assert not (RUNS / "checkpoint-6").exists()
    Path(f"done-{rank}").touch()


def resume_from_what_one_has():
    """The first process has a checkpoint in its folder, the other has not in its own."""
    if group.is_main():
        (RUNS / "checkpoint-3").mkdir(parents=True)
        mark_complete(RUNS / "checkpoint-3")
    else:
        Path("other").mkdir()
        os.chdir("other")
    choose_checkpoint(RUNS)


def fail_in_the_second():
    """The first process waits for the second, which has a reason to fail."""
    if not group.is_main():
        raise InputError("row 7 is broken", "correct it")
    group.wait_for_all()


def divide_by_zero():
    """Both have the same bug."""
    return 1 / 0


def end_the_second_and_hold_the_first():
    """The second process ends itself; the first does not ask for it, and ignores SIGTERM."""
    if group.is_main():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        Path("held").touch()
        while True:
            time.sleep(1)
    while not Path("held").exists():
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGTERM)
