"""Trainings in processes of their own, which are killed."""

import logging
import multiprocessing
import os
import re
import time

# Each process forks from one that has imported everything: that takes longer than such a training.
FORKS = multiprocessing.get_context("forkserver")
IMPORTED = ["stages.finetune.__main__", "stages.finetune.adapter", "stages.finetune.trainer"]
WITHIN_S = 120


def kill_in_the_middle(project, checkpoints="checkpoint-1[0-9]"):
    """Start a training, and kill it once it has a checkpoint to go on from, whose name is like this."""
    FORKS.set_forkserver_preload(IMPORTED)
    training = FORKS.Process(target=_train, args=(str(project),))
    training.start()
    try:
        deadline = time.monotonic() + WITHIN_S
        while not list(project.glob(f"checkpoints/finetune/*/{checkpoints}/complete.json")):
            assert time.monotonic() < deadline and training.is_alive()
            time.sleep(0.005)
    finally:
        training.kill()
        training.join()
    assert not (project / "artifacts" / "finetune").exists()


def resume(project, monkeypatch, caplog, least=9):
    """Train where a process was killed, and check that this goes on from a step of at least so many."""
    from stages.finetune.__main__ import main

    monkeypatch.chdir(project)
    caplog.clear()
    with caplog.at_level(logging.INFO):
        main()
    found = re.search(r"resuming from step (\d+) of", caplog.text)
    assert found and int(found[1]) >= least


def _train(project):
    import torch

    from stages.finetune.__main__ import main

    torch.set_num_threads(1)
    os.chdir(project)
    main()
