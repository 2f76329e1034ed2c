import os
import shutil

import pytest

from stages.common.chat.template import Encoded
from stages.common.errors import InputError
from stages.common.model.adapter import put_initial_adapter
from stages.finetune import recipe as recipe_module
from stages.finetune.checkpoints import check_free_space, find_checkpoint, mark_complete, remove_other_runs
from stages.finetune.recipe import Recipe, compute_fingerprint


def test_a_checkpoint_cut_short_or_damaged_is_never_taken_for_whole(tmp_path, caplog):
    for step in (3, 6, 9, 12, 15):
        checkpoint = tmp_path / f"checkpoint-{step}"
        checkpoint.mkdir()
        for name in ("adapter_model.safetensors", "optimizer.pt"):
            (checkpoint / name).write_bytes(b"x" * 100)
        if step != 9:
            mark_complete(checkpoint)
    (tmp_path / "checkpoint-12" / "optimizer.pt").write_bytes(b"x" * 50)
    # After a power failure a file can have its size and no content.
    (tmp_path / "checkpoint-15" / "adapter_model.safetensors").write_bytes(b"\0" * 100)
    shutil.copytree(tmp_path / "checkpoint-12", tmp_path / "checkpoint-12.bak")  # by a person
    assert find_checkpoint(tmp_path) == tmp_path / "checkpoint-6"
    left = ["checkpoint-12.bak", "checkpoint-3", "checkpoint-6"]
    assert sorted(path.name for path in tmp_path.iterdir()) == left
    assert "checkpoint-12: optimizer.pt is cut: it has 50 bytes of 100" in caplog.text
    assert "checkpoint-15: adapter_model.safetensors is damaged" in caplog.text


def test_checkpoints_of_other_parameters_are_not_resumed_and_do_not_pile_up(project):
    base = project / "artifacts" / "fetch_base"
    examples = [Encoded([0, 1, 2], 1)]
    settings = dict.fromkeys(Recipe.__dataclass_fields__, 1)
    recipe = Recipe(**settings)
    start = project / "adapter"
    start.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (start / name).write_text("{}")
    other, dora = (Recipe(**{**settings, **change}) for change in ({"rank": 2}, {"method": "dora"}))
    names = {
        compute_fingerprint(recipe, examples, base),
        compute_fingerprint(other, examples, base),
        compute_fingerprint(dora, examples, base),
        compute_fingerprint(recipe, [Encoded([0, 1, 3], 1)], base),
        compute_fingerprint(
            recipe, examples, base, put_initial_adapter(start, "v", "b", project / "initial")
        ),
    }
    assert len(names) == 5
    runs = project / "checkpoints" / "finetune"
    for age, name in enumerate(("new", "middle", "old")):
        (runs / name).mkdir(parents=True)
        os.utime(runs / name, (1000 - age, 1000 - age))
    remove_other_runs(runs / "mine", kept=1)
    assert [path.name for path in runs.iterdir()] == ["new"]


def test_code_that_decides_rewards_is_part_of_a_run_of_grpo(project, monkeypatch):
    read = []
    monkeypatch.setattr(recipe_module, "hash_file", lambda path: read.append(path.name) or "hash")
    settings = dict.fromkeys(Recipe.__dataclass_fields__, 1)
    found = []
    for method in ("lora", "grpo"):
        read.clear()
        compute_fingerprint(Recipe(**{**settings, "method": method}), [], project / "artifacts/fetch_base")
        found.append("label_task.py" in read and "calls.py" in read)
    assert found == [False, True]


def test_a_disk_too_small_for_the_checkpoints_is_an_error_before_the_work(tmp_path):
    with pytest.raises(InputError, match="MiB left"):
        check_free_space(tmp_path, trained_parameters=10**15)
    mib = 1 << 20  # 36 bytes of a weight, and 16 more for the best ones that early stopping keeps
    with pytest.raises(InputError, match=rf"need {36 * 10**15 // mib} MiB"):
        check_free_space(tmp_path, 10**15)
    with pytest.raises(InputError, match=rf"need {52 * 10**15 // mib} MiB"):
        check_free_space(tmp_path, 10**15, keeps_best=True)
