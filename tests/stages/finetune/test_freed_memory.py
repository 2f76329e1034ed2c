"""Freed memory that is given back before a batch that may not fit into its places."""

import pytest
import torch

from stages.common.machine.memory import read_held_memory, release_freed_memory
from stages.finetune.fast_lora import keep_freed_memory
from stages.finetune.progress import freed_memory
from stages.finetune.progress.freed_memory import FreedMemory
from stages.finetune.progress.memory import MemoryEstimate

MIB = 1 << 20


def leave_freed_blocks(count):
    """Leave `count` MiB of freed blocks of 1 MiB, which what stays keeps apart; return what stays."""
    blocks, stays = [], []
    for _ in range(count):
        blocks.append(torch.ones(MIB // 4))
        stays.append(torch.ones(64))
    return stays


@pytest.mark.skipif(not keep_freed_memory(), reason="only glibc keeps what is freed")
def test_freed_blocks_are_given_back_when_a_batch_may_pass_the_estimate(monkeypatch):
    monkeypatch.setattr(freed_memory, "LARGE", 0.0)  # of whatever this process holds already
    release_freed_memory()
    before = read_held_memory()
    freed = FreedMemory(MemoryEstimate(before, 0, 300 * MIB, tokens=100))
    stays = leave_freed_blocks(200)
    kept = read_held_memory()
    assert kept > before + 150 * MIB
    freed.make_room(20)  # 60 MiB beside them are within the estimate
    freed.make_room(20)  # a batch of this size left places for it
    assert read_held_memory() > kept - 20 * MIB
    freed.make_room(60)
    assert read_held_memory() < before + 50 * MIB

    # Not for each batch anew, but at once for one that would pass it by far, or where the process is larger.
    stays += leave_freed_blocks(200)
    kept = read_held_memory()
    freed.make_room(60)
    assert read_held_memory() > kept - 20 * MIB
    monkeypatch.setattr(freed_memory, "LARGE", 1.0)
    freed.make_room(60)
    assert read_held_memory() > kept - 20 * MIB  # a small batch waits
    monkeypatch.setattr(freed_memory, "LARGE", 0.0)
    freed.make_room(100)
    assert read_held_memory() < before + 50 * MIB
    stays += leave_freed_blocks(400)
    assert read_held_memory() > before + 320 * MIB
    freed.make_room(1)
    assert read_held_memory() < before + 50 * MIB
    assert len(stays) == 800


def test_without_an_estimate_nothing_is_given_back():
    keep_freed_memory()
    stays = leave_freed_blocks(100)
    kept = read_held_memory()
    FreedMemory(None).make_room(10**9)
    assert read_held_memory() > kept - 20 * MIB and len(stays) == 100
