"""Every method trains what it names and nothing else, resumes, and starts from its own kind only."""

import json
import shutil

import pytest
import torch

from stages.common.errors import InputError
from stages.common.machine.products import measure_product_speed
from stages.common.model.loading import is_stored_in_bfloat16, load_base, load_tuned
from stages.common.params.loading import load_params
from stages.finetune.__main__ import main
from stages.finetune.adapter import build_model
from stages.finetune.progress import meter
from stages.finetune.recipe import Recipe
from tests.stages.finetune.killing import kill_in_the_middle, resume
from tests.stages.finetune.project import (
    adapter,
    change_finetune,
    evidence,
    make_labels,
    make_project,
    put_own_adapter,
)

CPU = torch.device("cpu")
FAST = {  # modules with faster code: a method has what stays equal
    "rslora": {"lora_linear": 14, "rms_norm": 5, "output_layer": 1},
    "dora": {"lora_linear": 0, "rms_norm": 5, "output_layer": 1},
    "full": {"lora_linear": 0, "rms_norm": 0},
    "partial": {"lora_linear": 0, "rms_norm": 3, "output_layer": 1},
    "prompt_tuning": {"lora_linear": 0, "rms_norm": 5, "output_layer": 1},
    "prefix_tuning": {"lora_linear": 0, "rms_norm": 5, "output_layer": 1},
}
SETTINGS = {
    "rslora": {"alpha": 2},
    "dora": {},
    "full": {"learning_rate": 0.003},
    "partial": {"trained_modules": 1, "learning_rate": 0.003},
    "prompt_tuning": {"num_virtual_tokens": 5, "learning_rate": 0.3},
    "prefix_tuning": {"num_virtual_tokens": 5, "learning_rate": 0.1},
}


def changed(project):
    """The weights of the base model that differ after training."""
    base = load_base(project / "artifacts/fetch_base", torch.float32, CPU)
    tuned = load_tuned(project / "artifacts/fetch_base", project / "artifacts/finetune", torch.float32, CPU)
    before = dict(base.named_parameters())
    tuned = getattr(tuned, "base_model", tuned) if hasattr(tuned, "peft_config") else tuned
    return {name for name, weights in tuned.named_parameters() if not torch.equal(weights, before[name])}


@pytest.mark.parametrize("method", SETTINGS)
def test_a_method_learns_and_changes_what_it_names(project, method):
    change_finetune(project, method=method, **SETTINGS[method])
    main()
    metrics = evidence(project)
    assert metrics["method"] == method
    assert metrics["fast_modules"] == FAST[method]
    assert metrics["share_prefix"] is True
    curve = (project / "reports/finetune/loss.csv").read_text().splitlines()
    losses = [float(line.split(",")[1]) for line in curve[1:]]
    assert losses[-1] < losses[0]
    whole = {
        name for name, _ in load_base(project / "artifacts/fetch_base", torch.float32, CPU).named_parameters()
    }
    block = {name for name in whole if name.startswith("model.layers.1.")}
    linear = {name for name in whole if name.endswith("_proj.weight")}
    virtual = {"prompt_tuning": set(), "prefix_tuning": set()}
    assert changed(project) == {"full": whole, "partial": block, **virtual}.get(method, linear)
    kept = {path.name: path.read_bytes() for path in (project / "artifacts/finetune").iterdir()}
    main()
    assert {path.name: path.read_bytes() for path in (project / "artifacts/finetune").iterdir()} == kept
    assert not list((project / "checkpoints/finetune").iterdir())


def test_trained_weights_are_under_the_names_of_the_base_model_with_what_was_trained(project):
    from safetensors.torch import load_file

    change_finetune(project, method="partial", trained_modules=["mlp", "norm"], learning_rate=0.003)
    main()
    folder = project / "artifacts/finetune"
    assert {path.name for path in folder.iterdir()} == {
        *("replaced_config.json", "replaced_weights.safetensors", "trained_row_ids.txt")
    }
    weights = load_file(folder / "replaced_weights.safetensors")
    assert {name.split(".")[-2] for name in weights} == {"gate_proj", "up_proj", "down_proj", "norm"}
    assert evidence(project)["trained_parameters"] == sum(tensor.numel() for tensor in weights.values())
    assert json.loads((folder / "replaced_config.json").read_text()) == {
        "base_model_name_or_path": "artifacts/fetch_base",
        "method": "partial",
        "trained_modules": ["mlp", "norm"],
    }


def test_in_bfloat16_the_trained_weights_are_float32_and_the_frozen_ones_are_not(project, monkeypatch):
    measured = []

    def measure(dtype, *settings):
        measured.append(dtype)
        return measure_product_speed(dtype, *settings)

    monkeypatch.setattr(meter, "measure_product_speed", measure)
    modules = ["layers.1", "embed_tokens"]
    change_finetune(project, method="partial", trained_modules=modules, dtype="bfloat16", learning_rate=0.003)
    recipe = Recipe(**load_params().finetune.model_dump(include=set(Recipe.__dataclass_fields__)))
    model = build_model(project / "artifacts/fetch_base", recipe)
    kinds = {(weights.requires_grad, weights.dtype) for weights in model.parameters()}
    assert kinds == {(True, torch.float32), (False, torch.bfloat16)}
    assert model(torch.tensor([[2, 3, 4]]), logits_to_keep=1).logits.dtype == torch.bfloat16
    main()
    assert evidence(project)["dtype"] == "bfloat16"
    assert (
        measured == ["bfloat16"] * 2
    )  # before and after the steps: what the steps compute in, and what their speed is a share of
    assert changed(project) > {"model.layers.1.mlp.up_proj.weight"}


@pytest.mark.parametrize("method", ["full", "partial"])
def test_weights_that_are_stored_in_bfloat16_are_trained_as_the_same_ones_in_float32(project, method):
    change_finetune(project, method=method, trained_modules=1, dtype="bfloat16", learning_rate=0.003)
    recipe = Recipe(**load_params().finetune.model_dump(include=set(Recipe.__dataclass_fields__)))
    base = project / "artifacts/fetch_base"
    narrow = load_base(base, torch.bfloat16, CPU)
    assert not is_stored_in_bfloat16(base) and not is_stored_in_bfloat16(project)
    for kind in (torch.bfloat16, torch.float32):
        shutil.copytree(base, project / str(kind))
        narrow.to(kind).save_pretrained(project / str(kind))
    assert is_stored_in_bfloat16(project / "torch.bfloat16")
    stored, wide = (build_model(project / name, recipe) for name in ("torch.bfloat16", "torch.float32"))
    expected = dict([*wide.named_parameters(), *wide.named_buffers()])
    found = dict([*stored.named_parameters(), *stored.named_buffers()])
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert (tensor.dtype, tensor.requires_grad) == (expected[name].dtype, expected[name].requires_grad)
        assert torch.equal(tensor, expected[name])
    ids = torch.tensor([[2, 3, 4]])
    assert torch.equal(stored(ids, use_cache=False).logits, wide(ids, use_cache=False).logits)


@pytest.mark.parametrize("method", ["dora", "full", "partial", "prompt_tuning", "prefix_tuning"])
def test_training_goes_on_from_an_adapter_of_the_same_method_only(project, method):
    change_finetune(project, method=method, **SETTINGS[method])
    main()
    first, learned = evidence(project)["train_loss"], adapter(project)
    put_own_adapter(project)
    main()
    assert evidence(project)["started_from"] == "0123456789ab"
    assert evidence(project)["train_loss"] < first
    other = "lora" if method != "lora" else "full"
    for name in (other, "rslora"):
        change_finetune(project, method=name)
        with pytest.raises(InputError, match=f"method: {name} here, {method} there") as error:
            main()
        assert "set finetune.method" in error.value.fix and "empty" in error.value.fix
    assert adapter(project) != learned


def test_trained_weights_of_other_modules_or_of_another_model_are_no_start(project):
    change_finetune(project, method="partial", trained_modules=1, learning_rate=0.003)
    main()
    put_own_adapter(project)
    change_finetune(project, trained_modules=2)
    with pytest.raises(InputError, match="trained_modules: 2 here, 1 there"):
        main()
    path = project / "artifacts/initial_adapter/replaced_weights.safetensors"
    change_finetune(project, trained_modules=1)
    from safetensors.torch import load_file, save_file

    weights = load_file(path)
    lost = sorted(weights)[0]
    save_file({name: tensor for name, tensor in weights.items() if name != lost}, path)
    with pytest.raises(InputError, match="1 of them"):
        main()
    path.write_bytes(b"cut")
    with pytest.raises(InputError, match="cannot be read"):
        main()


def test_weights_of_another_base_model_are_not_loaded(project):
    from tests.tiny import save_model

    change_finetune(project, method="full", learning_rate=0.003)
    main()
    other = save_model(project / "other", hidden_size=32)
    with pytest.raises(InputError, match="does not fit the base model, in 20 of 20 weights") as error:
        load_tuned(other, project / "artifacts/finetune", torch.float32, CPU)
    assert "fetch the base model" in error.value.fix


def test_a_head_over_a_single_label_is_refused_before_anything_is_trained(project):
    make_labels(project, count=1)
    change_finetune(project, method="head")
    with pytest.raises(InputError, match=r'the task has 1: {"n":0}') as error:
        main()
    assert "another label" in error.value.fix
    assert not (project / "checkpoints").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("rslora", {}),
        ("dora", {"dropout": 0.1}),
        ("full", {"dtype": "bfloat16", "gradient_accumulation": 2}),
        ("partial", {"epochs": 2}),
        ("qlora", {"dropout": 0.1}),
        ("head", {"dtype": "bfloat16", "epochs": 2}),
        ("prompt_tuning", {"dtype": "bfloat16"}),
        ("prefix_tuning", {"early_stopping": {"metric": "loss", "patience": 5}, "validate_every": 0.2}),
    ],
)
def test_a_method_that_is_killed_ends_with_the_bytes_of_an_unbroken_run(
    tmp_path, monkeypatch, caplog, method, settings
):
    if method == "qlora":
        pytest.importorskip("bitsandbytes")
    settings = {"method": method, **SETTINGS.get(method, {}), **settings}
    unbroken, killed = (make_project(tmp_path / name, 160, **settings) for name in ("unbroken", "killed"))
    if method == "head":
        make_labels(unbroken)
        make_labels(killed)
    monkeypatch.chdir(unbroken)
    main()
    kill_in_the_middle(killed, "checkpoint-[69]")
    resume(killed, monkeypatch, caplog, 6)
    assert evidence(killed) == evidence(unbroken)
    assert adapter(killed) == adapter(unbroken)
    assert (killed / "reports/finetune/loss.csv").read_bytes() == (
        unbroken / "reports/finetune/loss.csv"
    ).read_bytes()
