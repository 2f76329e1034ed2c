import json
import re

import pytest
import torch
import yaml

from stages.common.errors import InputError
from stages.common.model.adapter import check_alike, put_initial_adapter, read_initial_adapter
from stages.common.model.loading import read_config
from stages.common.params.loading import load_params
from stages.finetune.__main__ import main
from stages.finetune.adapter import build_model, save_adapter
from stages.finetune.methods.lora import add_adapter
from stages.finetune.recipe import Recipe
from stages.preflight.finetune_checks import count_training
from tests.stages.families import make_base
from tests.stages.finetune.project import REPO, make_recipe, put_own_adapter
from tests.tiny import make_model


def test_every_tensor_of_the_start_is_taken_over_bit_by_bit(project):
    from peft import get_peft_model_state_dict
    from safetensors.torch import load_file

    main()
    put_own_adapter(project)
    start = read_initial_adapter()
    params = load_params().finetune
    recipe = Recipe(**params.model_dump(include=set(Recipe.__dataclass_fields__)))
    model = build_model(project / "artifacts" / "fetch_base", recipe, start)
    own, there = get_peft_model_state_dict(model), load_file(start.folder / "adapter_model.safetensors")
    assert own.keys() == there.keys()
    assert all(torch.equal(own[name], there[name]) for name in own)
    assert any(tensor.abs().sum() > 0 for name, tensor in own.items() if "lora_B" in name)


def test_an_adapter_that_does_not_fit_is_refused_with_what_both_are_before_any_training(project):
    main()
    put_own_adapter(project)
    start = project / "artifacts" / "initial_adapter"
    params = yaml.safe_load((project / "params.yaml").read_text())
    params["finetune"] |= {"rank": 8, "target_modules": ["q_proj", "v_proj"]}
    (project / "params.yaml").write_text(yaml.safe_dump(params))
    with pytest.raises(InputError, match=r"rank: 8 here, 4 there\n  target_modules: .*q_proj") as error:
        main()
    assert "finetune.rank" in error.value.fix
    params["finetune"] |= {"rank": 4, "target_modules": "all-linear"}
    (project / "params.yaml").write_text(yaml.safe_dump(params))
    weights = (start / "adapter_model.safetensors").read_bytes()
    (start / "adapter_model.safetensors").write_bytes(weights[:200])
    with pytest.raises(InputError, match="cannot be read"):
        main()
    (start / "adapter_model.safetensors").write_bytes(weights)
    (project / "reports" / "fetch_base" / "metrics.json").write_text('{"sha256": "of another base"}')
    with pytest.raises(InputError, match="was trained on a base model"):
        main()
    put_own_adapter(project)
    config = json.loads((start / "adapter_config.json").read_text())
    (start / "adapter_config.json").write_text(json.dumps(config | {"alpha_pattern": {"q_proj": 64}}))
    with pytest.raises(InputError, match=r"a scaling of their own: alpha_pattern: \{'q_proj': 64\}"):
        main()
    (start / "origin.json").unlink()
    with pytest.raises(InputError, match="is incomplete"):
        main()


def test_an_adapter_without_some_tensors_is_refused_though_its_config_fits(project):
    from safetensors.torch import load_file, save_file

    main()
    put_own_adapter(project)
    path = project / "artifacts" / "initial_adapter" / "adapter_model.safetensors"
    weights = load_file(path)
    lost = sorted(weights)[0]
    save_file({name: tensor for name, tensor in weights.items() if name != lost}, path)
    with pytest.raises(InputError, match=rf"1 of them: {re.escape(lost)} is None"):
        main()


def test_an_adapter_of_experts_is_counted_and_goes_on_with_the_rank_and_alpha_that_peft_doubles(tmp_path):
    make_base(base := tmp_path / "base", "qwen3-moe")
    recipe = make_recipe(rank=4, alpha=8)
    trained = build_model(base, recipe)
    for name, weights in trained.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weights)
    save_adapter(trained, recipe, tmp_path / "adapter", ["row"])
    start = put_initial_adapter(tmp_path / "adapter", "v", "base", tmp_path / "initial")
    config = json.loads((start.folder / "adapter_config.json").read_text())
    settings = load_params(REPO / "params.yaml").finetune.model_copy(update={"rank": 4})
    counted = count_training(read_config(base), settings).trained_parameters
    assert counted == sum(weights.numel() for weights in trained.parameters() if weights.requires_grad)
    assert config["rank_pattern"] == {r".*\.gate_up_proj": 8} and config["r"] == 4
    check_alike(start)
    going_on = dict(build_model(base, recipe, start).named_parameters())
    assert all(torch.equal(going_on[name], weights) for name, weights in trained.named_parameters())
    for alphas in ({r".*\.gate_up_proj": 64}, {r".*\.gate_up_proj": 16, "q_proj": 64}):
        (start.folder / "adapter_config.json").write_text(json.dumps(config | {"alpha_pattern": alphas}))
        with pytest.raises(InputError, match="a scaling of their own"):
            check_alike(start)


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_dora_names_the_weight_by_whose_length_it_would_divide_by_zero(model_type):
    shape = {"n_embd": 16, "n_layer": 2, "n_head": 4} if model_type == "gpt2" else {}
    model = make_model(model_type=model_type, **shape)
    name = {"llama": "model.layers.1.mlp.down_proj", "gpt2": "transformer.h.1.mlp.c_proj"}[model_type]
    weight = model.get_submodule(name).weight.data
    add_adapter(model, make_recipe(method="dora")).unload()
    (weight if model_type == "llama" else weight.T)[[3, 5]] = 0
    with pytest.raises(InputError, match=rf"{name}.weight .* has 2 of length 0, .* number 3\n") as error:
        add_adapter(model, make_recipe(method="dora"))
    assert "finetune.method: lora" in error.value.fix
