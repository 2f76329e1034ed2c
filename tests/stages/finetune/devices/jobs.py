"""What test processes run: functions that `start_workers` finds in this module by their names."""

import contextlib
import os
import shutil
import signal
import time
from importlib.util import find_spec
from pathlib import Path

from stages.common.errors import InputError
from stages.common.logs import HIDDEN_PACKAGES
from stages.finetune.checkpoints import choose_checkpoint, mark_complete
from stages.finetune.devices import group

RUNS = Path("checkpoints")


def tell_each_other():
    """Every function of the group, and a checkpoint that both see; packages that are hidden."""
    rank = group.get_rank()
    assert not any(map(find_spec, HIDDEN_PACKAGES))
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


def decide_together():
    """Each process has weights of its own, as if it computed in another way; all decide alike."""
    # Imported here: the processes of the other jobs need not wait for them.
    import torch
    from transformers import TrainerControl, TrainerState

    from stages.common.model.generation import answer_questions
    from stages.common.task.kinds import make_task
    from stages.finetune.progress.asking import Validation
    from stages.finetune.progress.early_stopping import EarlyStopping
    from stages.finetune.progress.validation import draw_sample, read_attention
    from stages.finetune.progress.watch import Watch
    from tests.stages.finetune.project import rows
    from tests.tiny import make_model, make_tokenizer

    task, tokenizer = make_task({"kind": "text"}), make_tokenizer()
    sample = draw_sample(task, tokenizer, rows(5), "last", 5, 8, 7)
    same = make_model(0)
    alone = answer_questions(same, tokenizer, sample.questions, 1, sample.limit)
    scored = task.score([answer.text for answer in alone], [row.answer for row in sample.rows])
    point = sample.ask(same, 1, 1)
    assert point.metrics == {name: metric.value() for name, metric in scored.items()}
    tokens = sum(len(question.reference) for question in sample.questions)
    assert abs(point.loss - sum(answer.reference_loss for answer in alone) / tokens) < 1e-9

    watch = Watch(sample, 0.05, EarlyStopping("loss", 1, lower_is_better=True))
    validation = Validation(watch, 20, read_attention(same), RUNS, 4)
    state, control = TrainerState(max_steps=20), TrainerControl()
    while not control.should_training_stop:
        state.global_step += 1
        model = make_model(2 * state.global_step + group.get_rank())
        own = sum(a.reference_loss for a in answer_questions(model, tokenizer, sample.questions, 4, 8))
        first, second = group.gather(own)
        assert first != second
        validation.on_log(None, state, control, model=model, logs={"loss": 1.0})
        found = (state.log_history, control.should_training_stop, control.should_save)
        assert group.gather(found) == [found, found]
    assert validation.restore_best(model, state) < state.global_step
    first, second = group.gather(torch.cat([weight.detach().flatten() for weight in model.parameters()]))
    assert torch.equal(first, second)


def resume_from_what_one_has():
    """The first process has a checkpoint in its folder, the other has not in its own."""
    if group.is_main():
        (RUNS / "checkpoint-3").mkdir(parents=True)
        mark_complete(RUNS / "checkpoint-3")
    else:
        Path("other").mkdir()
        os.chdir("other")
    choose_checkpoint(RUNS)


def train_shared_models():
    """Train what is in each folder; one training is interrupted, and goes on."""
    from stages.finetune.__main__ import train_adapter
    from stages.finetune.trainer import TrainingMonitor

    def stop_after_seven(monitor, arguments, state, *_, **__):
        if state.global_step == 7:
            raise KeyboardInterrupt

    root, on_log = Path.cwd(), TrainingMonitor.on_log
    for name in ("lora", "full"):
        os.chdir(root / name)
        train_adapter()
    os.chdir(root / "broken")
    TrainingMonitor.on_log = stop_after_seven
    with contextlib.suppress(KeyboardInterrupt):
        train_adapter()
    TrainingMonitor.on_log = on_log
    if group.is_main():
        shutil.copytree("checkpoints", root / "other" / "checkpoints")
    group.wait_for_all()
    train_adapter()


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
