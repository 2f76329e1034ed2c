import subprocess
import sys


def run_stage(body: str) -> subprocess.CompletedProcess[str]:
    imports = "import errno\nfrom stages.common.errors import *\nfrom stages.common.logs import *\n"
    code = f"{imports}def main():\n    {body}\nrun_stage(main)"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


def test_bad_input_is_told_without_a_traceback():
    done = run_stage("raise InputError('rows.jsonl:3: broken', 'mend the line')")
    assert (done.returncode, done.stderr) == (1, "error: rows.jsonl:3: broken\n  fix: mend the line\n")


def test_bad_parameters_exit_2():
    assert run_stage("raise ParamsError('a', 'b')").returncode == 2


def test_a_full_disk_is_told_as_one():
    done = run_stage("raise OSError(errno.ENOSPC, 'No space left on device', 'model.safetensors')")
    assert done.returncode == 1
    assert "the disk is full while writing model.safetensors" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_full_disk_that_a_library_tells_in_words_is_told_as_one():
    done = run_stage("raise RuntimeError('Error while serializing: I/O error: No space left (os error 28)')")
    assert done.returncode == 1
    assert done.stderr.startswith("error: the disk is full")


def test_a_bug_keeps_its_traceback():
    done = run_stage("1 / 0")
    assert done.returncode == 1
    assert "ZeroDivisionError" in done.stderr


def test_progress_is_sparse_and_ends_with_the_last_step():
    done = run_stage("[show_progress(get_logger('finetune'), n, 500, 'loss 1') for n in range(1, 501)]")
    lines = done.stderr.splitlines()
    assert lines[-1] == "finetune: progress 500/500 loss 1"
    assert len(lines) < 5
