import pytest
import torch
from safetensors.torch import load_file, save_file

from stages.common.errors import InputError
from stages.common.messages import Message
from stages.common.records import make_row, read_rows, write_rows
from stages.finetune.__main__ import main
from stages.finetune.checkpoints import find_checkpoint
from stages.finetune.objectives.pairs import Pairs
from tests.stages.finetune.project import adapter, change_finetune, make_project
from tests.tiny import make_tokenizer, save_model

SPLIT = ("artifacts", "split")
ODD = make_row(
    [Message("system", "Answer."), Message("user", "z"), Message("assistant", '{"n":1}')], "toy", "cc0-1.0"
)


def break_letter(project, letter):
    """Give a letter an embedding that is no number: each row with it has such a loss."""
    base = project / "artifacts" / "fetch_base"
    save_model(base, tie_word_embeddings=False)
    weights = load_file(base / "model.safetensors")
    weights["model.embed_tokens.weight"][make_tokenizer().encode(letter)] = torch.nan
    save_file(weights, base / "model.safetensors", {"format": "pt"})


def add_row(project, side, rejected=None):
    path = project.joinpath(*SPLIT, f"{side}.parquet")
    odd = make_row(ODD.messages, "toy", "cc0-1.0", rejected=rejected)
    write_rows(path, [*read_rows(path), odd])


# grpo samples answers before there is a loss, so cold that no other row is answered with the letter.
@pytest.mark.parametrize("settings", [{}, {"method": "grpo", "group_size": 2, "temperature": 0.0001}])
def test_a_loss_that_is_no_number_names_update_batch_and_rows_and_keeps_the_checkpoint(project, settings):
    break_letter(project, "z")
    add_row(project, "train")
    settings = {"batch_size": 2, "gradient_accumulation": 2, "seed": 3, **settings}
    change_finetune(project, checkpoint_every_steps=1, **settings)
    with pytest.raises(InputError, match="training has diverged: the loss is nan in update") as error:
        main()
    message = error.value.what
    assert ODD.id in message
    assert message.count("batch ") == 1  # the other batch of the update is right
    (folder,) = (project / "checkpoints" / "finetune").iterdir()
    kept = find_checkpoint(folder)
    assert kept is not None and f"kept: {kept.relative_to(project)}" in message
    assert "lower finetune.learning_rate" in error.value.fix
    assert not (project / "artifacts" / "finetune").exists()


def test_weights_that_are_no_numbers_are_never_kept(project):
    change_finetune(project, learning_rate=1e39, warmup_fraction=0.0, checkpoint_every_steps=1)
    with pytest.raises(InputError, match=r"lora_\w+.* has weights that are not numbers after update 1"):
        main()
    assert not list((project / "checkpoints").rglob("complete.json"))


def test_a_validation_loss_that_is_no_number_leaves_the_adapter_of_the_run_before(project):
    main()
    before = adapter(project)
    break_letter(project, "z")
    add_row(project, "validation")
    with pytest.raises(InputError, match="validation rows is nan"):
        main()
    assert adapter(project) == before


@pytest.mark.parametrize("side", ["train", "validation"])
@pytest.mark.parametrize("method", ["dpo", "orpo", "kto"])
def test_a_start_whose_probability_is_no_number_names_the_rows(tmp_path, monkeypatch, method, side):
    project = make_project(tmp_path, method=method)
    monkeypatch.chdir(project)
    break_letter(project, "z")
    add_row(project, side, rejected=Message("assistant", '{"n":2}'))
    # Without a reference, orpo learns the row as the methods for answers do.
    found = "training has diverged: the loss is nan" if (method, side) == ("orpo", "train") else ""
    with pytest.raises(InputError, match=found or "log-probability of an answer is not a number") as error:
        main()
    (row,) = (one for one in read_rows(project.joinpath(*SPLIT, f"{side}.parquet")) if one.question == "z")
    assert row.id in error.value.what


@pytest.mark.parametrize("step", ["prepare", "measure"])
def test_memory_that_is_full_before_or_after_the_updates_is_an_error_with_what_would_fit(
    tmp_path, monkeypatch, step
):
    monkeypatch.chdir(make_project(tmp_path, method="dpo"))
    monkeypatch.setattr(Pairs, step, lambda *_: torch.empty(1 << 55))
    with pytest.raises(InputError, match=r"the memory is full: .*allocate memory") as error:
        main()
    assert "finetune.gradient_checkpointing: true, which takes" in error.value.fix
