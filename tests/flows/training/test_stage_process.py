import signal
import threading
import time

import pytest

from flows.training.stage_process import Progress, StageProcesses, find_error, is_chatter, parse_progress


@pytest.mark.parametrize(
    ("line", "progress"),
    [
        ("finetune: progress 120/400 loss 0.52, 3 min left", Progress(120, 400, "loss 0.52, 3 min left")),
        ("finetune: progress 400/400 ", Progress(400, 400, "")),
        ("progress 1/2", Progress(1, 2, "")),
        ("finetune: no progress 1/2 here", None),
        ("collect: 3 rows", None),
    ],
)
def test_progress_lines_are_told_from_others(line, progress):
    assert parse_progress(line) == progress


@pytest.mark.parametrize(
    ("line", "chatter"),
    [
        ("Running stage 'collect':", True),
        ("> python -m stages.collect", True),
        ("\tgit add dvc.lock .gitignore", True),
        ("Map:  20%|##        | 20/100 [00:01<00:04]", True),
        ("", True),
        ("collect: 20% of the rows", False),
        ("error: data/x.jsonl is empty", False),
        ("WARNING: 'artifacts/preflight/test.jsonl' is empty.", True),
        ("ERROR: failed to reproduce 'x': failed to run: python x.py, exited with 1", True),
        ("ERROR: failed to reproduce 'x': output 'x.txt' does not exist", False),
    ],
)
def test_dvcs_routine_and_drawn_bars_are_kept_out_of_the_log(line, chatter):
    assert is_chatter(line) is chatter


def test_the_error_of_a_stage_is_its_own_words_with_the_fix():
    lines = [
        "curate: begins",
        "error: data/x.jsonl:7: not JSON",
        "data/x.jsonl:9: not JSON",
        "  fix: correct the lines",
        "ERROR: failed to reproduce 'curate': failed to run: python -m stages.curate, exited with 1",
    ]

    assert (
        find_error(lines, "curate", 1)
        == "data/x.jsonl:7: not JSON\ndata/x.jsonl:9: not JSON\n  fix: correct the lines"
    )


def test_a_stage_that_crashed_is_told_by_its_last_line():
    lines = [
        "Traceback (most recent call last):",
        '  File "x.py", line 1',
        "ZeroDivisionError: division by zero",
    ]

    assert (
        find_error(lines, "x", 1)
        == "it ended with exit code 1; its last line: ZeroDivisionError: division by zero"
    )
    killed = find_error([], "x", -9)
    assert killed.startswith("it was killed by signal 9 and printed nothing\n  fix: ")
    assert "ran out of memory: lower finetune.batch_size" in killed
    assert find_error([], "x", -15) == "it was killed by signal 15 and printed nothing"


def test_an_error_of_dvc_itself_is_told_as_dvc_tells_it():
    lines = ["ERROR: failed to reproduce 'x': output 'x.txt' does not exist"]

    assert find_error(lines, "x", 255) == "output 'x.txt' does not exist"


def test_a_stage_started_early_is_the_one_that_is_taken(offline):
    offline.change("params.yaml", "learning_rate: 0.003", "learning_rate: 0.002")
    processes = StageProcesses(offline.root)

    processes.start_early("train")
    offline.wait_for("train")
    lines: list[str] = []
    outcome = processes.run("train", lines.append, lambda blocked: False)

    assert outcome.how == "ran" and "train: wrote train.txt" in lines
    assert offline.begun() == ["train"]


def test_dvc_says_whether_a_stage_ran_was_unchanged_or_restored(offline):
    processes = StageProcesses(offline.root)

    assert processes.run("train", [].append, lambda blocked: False).how == "unchanged"
    (offline.root / "train.txt").unlink()
    assert processes.run("train", [].append, lambda blocked: False).how == "restored"


def test_a_stage_that_ignores_the_interrupt_is_killed_in_the_end(offline, monkeypatch):
    monkeypatch.setattr("flows.training.stage_process.INTERRUPT_PATIENCE_S", 0.5)
    offline.change(
        "dvc.yaml", "python work/stage.py train 0 train.txt", "trap '' INT TERM; sleep 60; echo train.txt"
    )
    processes = StageProcesses(offline.root)
    outcomes = []
    thread = threading.Thread(
        target=lambda: outcomes.append(processes.run("train", [].append, lambda blocked: False))
    )
    thread.start()
    while not any("sleep" in one.name() for one in offline.processes()):
        time.sleep(0.05)

    processes.stop(signal.SIGINT)
    thread.join(timeout=300)

    assert outcomes[0].how == "failed"
    assert offline.processes() == []
    with pytest.raises(InterruptedError):
        processes.run("judge", [].append, lambda blocked: False)
