"""A model that processes share: it learns what a whole one does, and is refused where it cannot be shared."""

import csv
import os

import pytest
import torch
from safetensors.torch import load_file
from torch import distributed

from stages.common.chat.template import Encoded
from stages.common.errors import InputError, ParamsError
from stages.common.machine.training_memory import PROGRAM_BYTES
from stages.common.model.adapter import find_weights
from stages.common.model.loading import read_config
from stages.common.model.replaced import check_shardable, list_trained
from stages.common.params.loading import load_params
from stages.finetune.__main__ import main
from stages.finetune.adapter import build_model
from stages.finetune.answer_loss import unchunk_head
from stages.finetune.devices import group, sharding
from stages.finetune.devices.choice import Place
from stages.finetune.devices.workers import start_workers
from stages.finetune.progress import fit
from stages.finetune.progress.memory import MemoryPlan
from stages.finetune.shared_prefix import lay_out
from stages.finetune.speedups import speed_up_training
from tests.stages.finetune.devices import jobs
from tests.stages.finetune.project import adapter, evidence, make_project, make_recipe
from tests.tiny import make_model, save_model

EXAMPLES = [Encoded([0, *range(5, 5 + n), 1], 8) for n in (96, 40, 66, 50)]


@pytest.fixture
def group_of_one():
    """A process group that is there and has one member: weights are parts that are whole."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("method", "dtype"), [("lora", "float32"), ("full", "float32"), ("full", "bfloat16")]
)
def test_a_shared_model_computes_as_a_whole_one_and_its_memory_is_estimated(
    group_of_one, tmp_path, method, dtype
):
    recipe = make_recipe(method=method, dtype=dtype)
    base = save_model(tmp_path)
    found = []
    for shared in (False, True):
        model = build_model(base, recipe, sharded=shared)
        assert sharding.is_sharded(model) == shared
        shares_prefix, modules = speed_up_training(model, EXAMPLES, 1)
        unchunk_head(model)
        plan = MemoryPlan(model, EXAMPLES, 1, shares_prefix)
        with torch.no_grad():
            batch = lay_out(EXAMPLES, 1, shares_prefix)
            logits = batch.answer_logits(model).float()
        weights = sharding.gather_trained(model)
        assert {weight.dtype for weight in list_trained(model).values()} == {torch.float32}
        found.append((shares_prefix, modules, logits, weights, plan.estimate(4, 0), model))
    whole, parts = found
    whole[1].pop("output_layer", None)  # of a shared model its weights are not whole after the pass
    assert whole[:2] == parts[:2]
    rounding = 0.0 if dtype == "float32" else 0.05
    torch.testing.assert_close(parts[2], whole[2], rtol=rounding, atol=rounding)
    for name, weight in whole[3].items():
        assert torch.equal(parts[3][name], weight)
    gathered = sharding.count_gathered_bytes(parts[5])
    assert gathered > 0 == sharding.count_gathered_bytes(whole[5])
    # Autocasting keeps a narrow copy of each weight, which the parts' gathering does not.
    kept = parts[4].activations - gathered
    assert kept == whole[4].activations if dtype == "float32" else kept < whole[4].activations
    assert parts[4].optimizer == whole[4].optimizer


def test_what_is_gathered_is_each_block_and_what_is_outside_of_them(group_of_one, tmp_path):
    model = build_model(save_model(tmp_path), make_recipe(method="full", dtype="float32"), sharded=True)
    block = 2 * 16 * 16 + 2 * 16 * 8 + 3 * 16 * 32 + 2 * 16
    outside = 258 * 16 + 16
    sizes = [sum(weight.numel() for weight in part) for part in sharding.list_groups(model)]
    assert sizes == [block, block, outside]
    assert sharding.count_gathered_bytes(model) == 4 * (outside + 2 * block + 2 * outside)


def test_who_has_finished_computes_along(group_of_one, monkeypatch, tmp_path):
    model = build_model(save_model(tmp_path), make_recipe(), sharded=True)
    others = iter([True, True, True, False])  # whether the other process still computes
    told, along = [], []

    def gather(value):
        told.append(value)
        return [value, next(others)]

    monkeypatch.setattr(sharding, "gather", gather)
    with torch.no_grad(), sharding.keep_in_step(model, lambda: along.append(1)):
        model(input_ids=torch.zeros((1, 1), dtype=torch.long))
    assert told == [True, False, False, False] and along == [1, 1]
    with sharding.keep_in_step(make_model(), lambda: along.append(1)):
        pass
    assert len(told) == 4


def test_a_method_or_an_architecture_that_cannot_be_shared_is_refused(tmp_path):
    project = make_project(tmp_path / "project", 4, method="prefix_tuning", sharding="full")
    with pytest.raises(
        ParamsError, match=r"finetune.sharding: 'full' must be none or auto with method: prefix_tuning"
    ):
        load_params(project / "params.yaml")
    model = make_model()
    check_shardable(model, list_trained(model))
    with pytest.raises(InputError, match=r"LlamaForCausalLM has experts.*: model.experts.0.up"):
        check_shardable(model, ["model.experts.0.up"])
    model.scale = torch.nn.Parameter(torch.tensor(1.0))
    with pytest.raises(InputError, match="has weights of a single number: scale"):
        check_shardable(model, [])
    model.model.layers = torch.nn.ModuleList(model.model.layers[:1])
    with pytest.raises(InputError, match="has none that are found"):
        check_shardable(model, [])


def test_a_model_is_shared_where_it_does_not_fit_one_device(tmp_path, monkeypatch, caplog):
    base = save_model(tmp_path)
    config, recipe = read_config(base), make_recipe()

    def decide(wanted, free, processes=2, **changes):
        monkeypatch.setattr(group._Own, "place", Place(0, processes, 0, processes))
        monkeypatch.setattr(fit, "all_agree", bool)
        monkeypatch.setattr(fit, "read_device_memory", lambda device: (0, free))
        return fit.decide_sharding(wanted, make_recipe(**changes), base, config, EXAMPLES, False)

    needed = fit.estimate_whole(recipe, base, config, EXAMPLES, 2, False)
    more = fit.estimate_whole(make_recipe(method="full"), base, config, EXAMPLES, 2, False)
    assert PROGRAM_BYTES < needed < more
    assert not decide("none", 0)
    assert not decide("auto", needed)
    assert decide("auto", needed - 1) and decide("full", needed)
    assert not decide("auto", 0, processes=1)
    assert not decide("full", needed, processes=1)
    assert "one process has nobody to share the model with" in caplog.text
    assert not decide("auto", 0, method="grpo")
    assert "a model is shared by several processes for the methods lora" in caplog.text


def curve(project):
    with (project / "reports" / "finetune" / "loss.csv").open() as file:
        return [float(point["loss"]) for point in csv.DictReader(file)]


@pytest.mark.slow
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="two processes want two cores")
def test_two_processes_that_share_a_model_learn_what_one_does_and_are_resumed_by_any_number(
    tmp_path, monkeypatch
):
    # 41 rows: of the last batch one process has none. The lora training takes its best weights in the end.
    common = {"gradient_accumulation": 2, "epochs": 2, "validate_every": 0.3, "learning_rate": 0.003}
    # Of a rank that two processes do not divide: their parts of an adapter are unequal.
    lora = {**common, "early_stopping": {"metric": "exact_match", "patience": 2}, "dropout": 0.0, "rank": 3}
    full = {**common, "method": "full"}
    for name, settings in (("lora", lora), ("full", full), ("broken", full)):
        again = name != "lora"  # in the backward pass
        shared = {"devices": 2, "sharding": "full", "gradient_checkpointing": again}
        make_project(tmp_path / name, 41, **settings, **shared)
    for name, settings in (("lora-one", lora), ("full-one", full), ("other", full)):
        make_project(tmp_path / name, 41, **settings)
    monkeypatch.chdir(tmp_path)
    start_workers(jobs.train_shared_models, 2, "cpu", "")
    for name in ("lora-one", "full-one", "other"):
        monkeypatch.chdir(tmp_path / name)
        main()
    for method in ("lora", "full"):
        two, one = tmp_path / method, tmp_path / f"{method}-one"
        assert evidence(two)["sharded"] and not evidence(one)["sharded"]
        assert evidence(two)["steps"] == evidence(one)["steps"] == len(curve(one))
        assert curve(two) == pytest.approx(curve(one), rel=1e-5)
        assert evidence(two)["validation_loss"] == pytest.approx(evidence(one)["validation_loss"], rel=1e-5)
        for alone, together in zip(
            evidence(one)["validation_points"], evidence(two)["validation_points"], strict=True
        ):
            assert together == pytest.approx(alone, rel=1e-5)
        files = [find_weights(project / "artifacts" / "finetune") for project in (two, one)]
        parts, whole = map(load_file, files)
        assert parts.keys() == whole.keys()
        for name, weight in whole.items():
            torch.testing.assert_close(parts[name], weight, rtol=1e-3, atol=1e-5)
    assert adapter(tmp_path / "broken") == adapter(tmp_path / "full")
    assert evidence(tmp_path / "broken") == evidence(tmp_path / "full")
    assert curve(tmp_path / "other") == pytest.approx(curve(tmp_path / "full-one"), rel=1e-5)
    assert evidence(tmp_path / "other")["processes"] == 1
