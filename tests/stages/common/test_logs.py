import re
import subprocess
import sys
from importlib.util import find_spec

import pytest

from stages.common.logs import HIDDEN_PACKAGES


def run_stage(body: str, more: str = "") -> subprocess.CompletedProcess[str]:
    imports = "import errno\nfrom stages.common.errors import *\nfrom stages.common.logs import *\n"
    code = f"{imports}def main():\n    {body}\nrun_stage(main{more})"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


def test_bad_input_is_told_without_a_traceback():
    done = run_stage("raise InputError('rows.jsonl:3: broken', 'correct the line')")
    assert (done.returncode, done.stderr) == (1, "error: rows.jsonl:3: broken\n  fix: correct the line\n")


def test_a_stage_finds_no_package_that_only_development_installs_until_it_is_shown():
    if not all(map(find_spec, HIDDEN_PACKAGES)):  # to import them takes seconds
        pytest.skip("they are not installed")
    found = "[find_spec(name) is not None for name in HIDDEN_PACKAGES]"
    body = f"from importlib.util import find_spec; print({found}); show_packages(); print({found})"
    assert run_stage(body).stdout == "[False, False]\n[True, True]\n"


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


FULL = (
    "MemoryError()",
    "__import__('torch').OutOfMemoryError('CUDA out of memory. Tried to allocate 2 GiB.\\nmore')",
    "RuntimeError('MPS backend out of memory (MPS allocated: 8 GB)')",
    """RuntimeError(\"[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried\")""",
)


@pytest.mark.parametrize("error", FULL)
def test_a_full_memory_is_told_with_what_to_lower(error):
    done = run_stage(f"raise {error}", ", 'lower the batch'")
    assert done.returncode == 1
    assert re.fullmatch(r"error: the memory is full: .+\n  fix: lower the batch\n", done.stderr)


def test_what_torch_says_of_a_memory_that_is_too_small_is_known():
    done = run_stage("__import__('torch').empty(1 << 55)")
    assert (done.returncode, done.stderr.split(":")[1]) == (1, " the memory is full")


@pytest.mark.parametrize("stage", ["ask_base", "evaluate.__main__", "finetune.__main__"])
def test_a_stage_that_computes_says_what_to_lower(stage, tmp_path):
    train = tmp_path / "artifacts" / "split" / "train.parquet"  # finetune looks for it first
    train.parent.mkdir(parents=True)
    train.touch()
    code = (
        f"import runpy, stages.common.params.loading as p\n"
        f"def full(): raise MemoryError\n"
        f"p.load_params = full\nrunpy.run_module('stages.{stage}', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1 and "fix: lower " in done.stderr and ".batch_size" in done.stderr


def test_a_bug_keeps_its_traceback():
    done = run_stage("1 / 0")
    assert done.returncode == 1
    assert "ZeroDivisionError" in done.stderr


def test_progress_is_sparse_and_ends_with_the_last_step():
    done = run_stage("[show_progress(get_logger('finetune'), n, 500, 'loss 1') for n in range(1, 501)]")
    lines = done.stderr.splitlines()
    assert lines[-1] == "finetune: progress 500/500 loss 1"
    assert len(lines) < 5
