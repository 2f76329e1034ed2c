"""What a training needs and took: operations, memory, energy."""

import json
import logging

import pytest
import torch
import yaml

from stages.common.artifacts import read_json, write_json
from stages.common.chat.template import Encoded
from stages.common.errors import InputError
from stages.common.machine.memory import format_bytes, read_free_memory, read_held_memory, read_total_memory
from stages.common.model.generation import EvalPrompt, _choose_likeliest, _prefill, _reference_losses, _write
from stages.common.model.loading import load_base
from stages.finetune.__main__ import main
from stages.finetune.adapter import build_model
from stages.finetune.answer_loss import sum_answer_loss
from stages.finetune.checkpoints import mark_complete
from stages.finetune.devices import group
from stages.finetune.devices.choice import Place
from stages.finetune.objectives.protocol import Pass
from stages.finetune.progress import energy as energy_module
from stages.finetune.progress import meter as meter_module
from stages.finetune.progress.asking import estimate_answers
from stages.finetune.progress.cost import Cost, Prices, Taken
from stages.finetune.progress.energy import Energy, EnergyMeter, add_up, join
from stages.finetune.progress.flops import count_work
from stages.finetune.progress.memory import (
    MemoryEstimate,
    MemoryPlan,
    explain_full_memory,
    judge_memory,
    plan_memory,
)
from stages.finetune.progress.meter import Meter
from stages.finetune.progress.validation import Sample
from stages.finetune.shared_prefix import lay_out
from stages.finetune.speedups import speed_up_training
from stages.finetune.trainer import TrainingMonitor
from tests.stages.finetune.project import adapter, change_finetune, make_recipe
from tests.stages.finetune.test_kernels import LiveBytes
from tests.tiny import save_model

MIB = 1 << 20
ASSUMED = "assumed: 60 W (flows.training.power_watts)"
EXAMPLES = [Encoded([0, *range(5, 5 + n), 1], 8) for n in (96, 240, 136, 200)]


@pytest.fixture
def model(tmp_path):
    return build_model(save_model(tmp_path), make_recipe())


def test_operations_are_four_of_a_frozen_weight_and_six_of_a_trained_one(model):
    work = count_work(model)
    frozen = 2 * (16 * 16 * 2 + 16 * 8 * 2 + 3 * 16 * 32)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    first = 16 * 16  # no gradient arrives behind the first weight that is used
    assert work.each_token == 4 * frozen - 2 * first + 6 * trained
    assert work.each_answer_token == 4 * 16 * 258
    assert work.count(10, 3) == 10 * work.each_token + 3 * work.each_answer_token


def test_a_pass_that_only_reads_is_two_operations_of_every_weight_and_learns_no_token(model, tmp_path):
    meter = Meter(model, torch.float32, [1], 0)
    teacher = load_base(tmp_path, torch.float32, torch.device("cpu"))
    work = count_work(teacher, learns=False)
    weights = 2 * (16 * 16 * 2 + 16 * 8 * 2 + 3 * 16 * 32)
    assert (work.each_token, work.each_answer_token) == (2 * weights, 2 * 16 * 258)
    meter.count(Pass(3, 10, 5, reader=teacher))
    assert (meter._operations, meter.tokens) == (work.count(30, 5), 0)
    meter.count(Pass(3, 10, 5, tokens=28))
    assert (meter._operations, meter.tokens) == (work.count(30, 5) + count_work(model).count(30, 5), 28)


def test_operations_of_a_block_before_all_trained_ones_are_two_of_a_weight(model):
    whole = count_work(model).each_token
    for name, weight in model.named_parameters():
        weight.requires_grad = weight.requires_grad and ".layers.1." in name
    block = 16 * 16 * 2 + 16 * 8 * 2 + 3 * 16 * 32
    adapters = sum(p.numel() for n, p in model.named_parameters() if "lora" in n and ".layers.0." in n)
    assert whole - count_work(model).each_token == 2 * block + 4 * adapters


@pytest.mark.parametrize("fast", [True, False])
def test_the_activations_that_are_estimated_are_those_that_autograd_keeps(model, fast):
    shares = speed_up_training(model, EXAMPLES, 1)[0] if fast else False
    plan = MemoryPlan(model, EXAMPLES, 1, shares)
    batch = lay_out(EXAMPLES, 1, shares)
    own = {p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers()]}
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = (tensor.untyped_storage().nbytes(), tensor)
        return tensor

    model.train()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = sum_answer_loss(model, batch)
    real = sum(size for place, (size, _) in kept.items() if place not in own)
    assert loss.requires_grad
    # Without the faster steps attention is torch's, which keeps a mask where there are values to hide.
    found = plan._count_kept(batch)
    assert found.outside + sum(found.layers) == pytest.approx(real, rel=0.01 if fast else 0.3)
    assert found.count(checkpointing=False) == found.outside + sum(found.layers) + max(found.layers)
    assert plan.estimate(4, 100).held == 100
    assert plan.estimate(1, 0).activations < plan.estimate(4, 0).activations


def test_a_training_that_cannot_fit_is_refused_with_what_would_and_a_narrow_one_is_warned_of(model, caplog):
    caplog.set_level(logging.INFO)
    assert speed_up_training(model, EXAMPLES, 1)[0]
    plan = plan_memory(model, EXAMPLES, 1, share_prefix=True)
    whole = plan.estimate(4, held=0)

    def judge(free):
        judge_memory(whole, free, lambda: plan.suggest(4, 2, 0, free))

    judge(2 * whole.peak)
    assert "may be too little" not in caplog.text
    judge(whole.peak)
    halved = "set finetune.batch_size: 2 and finetune.gradient_accumulation: 4"
    assert f"may be too little: {halved}" in caplog.text
    two = plan.estimate(2, 0)
    with pytest.raises(InputError, match="the memory is too small") as error:
        judge(int(two.added * 1.11))
    assert error.value.fix == f"{halved}, which take {format_bytes(two.peak)}"
    judge_memory(whole, 0, lambda: "a smaller batch", uncertainty=1.0)  # on a GPU it is only a warning
    assert "may be too little: a smaller batch" in caplog.text
    with pytest.raises(InputError) as error:
        judge(0)
    assert "no batch fits: choose a smaller base model" in error.value.fix
    long = [Encoded(list(range(2, 252)), 8)]
    narrow = plan_memory(model, long, 1, share_prefix=True)
    free = int(narrow.estimate(1, 0, 128).added * 1.11)
    assert "finetune.batch_size: 1 and finetune.max_length: 128" in narrow.suggest(1, 1, 0, free)


def test_a_training_that_does_not_fit_is_told_to_compute_its_layers_twice(tmp_path):
    model = build_model(save_model(tmp_path, num_hidden_layers=6), make_recipe())
    assert speed_up_training(model, EXAMPLES, 1)[0]
    plan = plan_memory(model, EXAMPLES, 1, share_prefix=True)
    whole = plan.estimate(4, 0)
    plan.checkpointing = True
    twice = plan.estimate(4, 0)
    plan.checkpointing, plan.can_checkpoint = False, True
    assert twice.activations < whole.activations
    free = int(twice.added * 1.11)
    assert free < whole.added
    assert plan.suggest(4, 1, 0, free).startswith("set finetune.gradient_checkpointing: true, which takes")


@pytest.mark.parametrize(("wanted", "is_on"), [("auto", False), (True, True)])
def test_a_training_whose_layers_are_computed_twice_learns_the_same_adapter(project, wanted, is_on, caplog):
    main()
    before = adapter(project)
    change_finetune(project, gradient_checkpointing=wanted)
    main()
    assert adapter(project) == before
    took = json.loads((project / "reports" / "finetune" / "metrics.json").read_text())["throughput"]
    assert took["gradient_checkpointing"] is is_on and took["packed"] is False


def test_answers_to_validation_rows_count_where_they_take_more_than_a_step(model):
    estimate = MemoryEstimate(100, 10, 50, answers=80)
    assert (estimate.peak, estimate.added) == (190, 90)
    assert "80 MiB for validation rows" in MemoryEstimate(0, 0, 0, answers=80 * MIB).describe()
    questions = [EvalPrompt(list(range(2, 2 + n)), [5, 6, 7, 1]) for n in (60, 100)]
    sample = Sample(None, None, [], questions, 24)
    with torch.inference_mode(), LiveBytes() as live:
        prefilled = _prefill(model, [q.prompt for q in questions], 1)
        _reference_losses(model, prefilled, [q.reference for q in questions])
        _write(model, prefilled, [], sample.limit, _choose_likeliest)
    # Beside what it counts there are masks and positions, which only a model this small has more of.
    assert 0.5 * live.peak < estimate_answers(model, sample, 2) < 4 * live.peak


@pytest.mark.parametrize(
    ("dtype", "batches", "lengths"), [("bfloat16", 5, 5), ("bfloat16", 500, 23), ("float32", 500, 0)]
)
def test_the_code_of_products_is_counted_by_lengths_of_batches(model, dtype, batches, lengths):
    model.to(getattr(torch, dtype))
    plan = MemoryPlan(model, EXAMPLES, 1, share_prefix=False)
    plan.batches = batches
    estimate = plan.estimate(4, 0)
    assert estimate.kernels == lengths * 11 * MIB
    assert estimate.peak == estimate.optimizer + estimate.activations + estimate.kernels
    assert ("for the code of products" in estimate.describe()) == (lengths > 0)


def test_memory_that_is_full_in_a_step_is_an_error_with_what_would_fit(model):
    assert speed_up_training(model, EXAMPLES, 1)[0]
    plan = plan_memory(model, EXAMPLES, 1, share_prefix=True)
    with (
        pytest.raises(InputError, match=r"the memory is full: .*allocate memory") as error,
        explain_full_memory(plan, 4, 1),
    ):
        torch.empty(1 << 55)
    assert "finetune.batch_size: 2 and finetune.gradient_accumulation: 2" in error.value.fix
    with pytest.raises(ZeroDivisionError), explain_full_memory(plan, 4, 1):
        1 / 0  # noqa: B018
    with pytest.raises(MemoryError), explain_full_memory(None, 4, 1):
        raise MemoryError


def test_energy_is_read_from_counters_that_begin_again_or_assumed_or_not_known(tmp_path):
    package = tmp_path / "intel-rapl:0"
    for name in ("intel-rapl:0", "intel-rapl:0:0"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "max_energy_range_uj").write_text("1000000000\n")
        (tmp_path / name / "energy_uj").write_text("900000000\n")
    energy = EnergyMeter("cpu", rapl=tmp_path)
    (package / "energy_uj").write_text("980000000\n")
    energy.read()
    (package / "energy_uj").write_text("280000000\n")
    assert energy.measure() == Energy(pytest.approx(380 / 3600), "measured: RAPL")
    assumed = EnergyMeter("cpu", 60.0, rapl=tmp_path / "nothing").measure()
    assert assumed.watt_hours is not None and assumed.source.startswith("assumed: 60 W")
    assert EnergyMeter("cpu", rapl=tmp_path / "nothing").measure().watt_hours is None


def test_the_energy_of_several_processes_is_that_of_each_gpu_and_of_each_host_once(tmp_path, monkeypatch):
    (tmp_path / "intel-rapl:0").mkdir()
    for name in ("max_energy_range_uj", "energy_uj"):
        (tmp_path / "intel-rapl:0" / name).write_text("1000\n")
    assert EnergyMeter("cpu", rapl=tmp_path).read() == {"RAPL": 0.0}
    monkeypatch.setattr(group._Own, "place", Place(1, 2, 1, 2))
    assert EnergyMeter("cpu", rapl=tmp_path).read() == {}
    whole = [{"RAPL": 3600.0, "NVML": 7200.0}, {"NVML": 7200.0}]
    assert add_up(whole, 60.0, 1.0) == Energy(5.0, "measured: RAPL and NVML")
    part = [{"RAPL": None, "NVML": 7200.0}, {"NVML": None}]
    assert add_up(part, None, 1.0) == Energy(2.0, "measured: NVML of 1 of 2 GPUs only")
    assert add_up(part, 60.0, 60.0) == Energy(1.0, "assumed: 60 W (flows.training.power_watts)")
    hosts = [{"RAPL": 3600.0}, {"RAPL": None}]
    assert add_up(hosts, None, 1.0) == Energy(1.0, "measured: RAPL of 1 of 2 hosts only")
    both = "assumed: 2 times 60 W (flows.training.power_watts)"
    assert add_up([{"RAPL": None}, {}, {"RAPL": None}], 60.0, 60.0) == Energy(2.0, both)


def test_several_processes_hold_their_gradients_twice(model, monkeypatch):
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    alone = MemoryPlan(model, EXAMPLES, 1, share_prefix=False).estimate(1, 0).optimizer
    monkeypatch.setattr(group._Own, "place", Place(0, 2, 0, 2))
    together = MemoryPlan(model, EXAMPLES, 1, share_prefix=False).estimate(1, 0).optimizer
    assert (alone, together) == (12 * trained, 16 * trained)


def test_costs_are_shown_where_their_parts_are_known():
    def tell(energy, prices):
        return Cost(Taken(1800.0, energy), prices, 2e11, 0.4, 900 * MIB, None)

    whole = tell(Energy(50.0, "measured: RAPL"), Prices(None, 400.0, 3.0))
    found = whole.to_metrics()
    assert (found["energy_wh"], found["co2_g"], found["cost"]) == (50.0, 20.0, 1.5)
    assert (found["product_limit_gflops"], found["estimated_peak_mib"]) == (200.0, 900)
    assert "50.00 Wh (measured: RAPL), 20.00 g CO2, cost 1.5000" in whole.describe()
    bare = tell(Energy(None, "not known"), Prices())
    assert bare.describe() == "40% of the matrix products of its devices (200 GFLOP/s)"


def test_the_parts_of_a_resumed_training_are_added_up():
    read, assumed, nothing = (
        Energy(2.0, "measured: RAPL"),
        Energy(1.0, "assumed: 60 W"),
        Energy(None, "not known"),
    )
    assert join(read, read) == Energy(4.0, "measured: RAPL")
    both = Energy(3.0, "measured: RAPL; then assumed: 60 W")
    assert join(read, assumed) == both
    assert join(both, read) == Energy(5.0, both.source)
    part = Energy(2.0, "measured: RAPL, of a part of the training only")
    assert join(read, nothing) == join(nothing, read) == join(nothing, part) == part
    assert join(nothing, nothing) == nothing


def test_every_host_of_a_training_costs_its_price(model, monkeypatch):
    meter = Meter(model, torch.float32, [1], 0, Prices(None, None, 3600.0))
    meter.start()
    alone = meter.measure_taken().host_seconds
    monkeypatch.setattr(meter_module, "gather", lambda value: [value] * 3)  # as from three hosts
    assert meter.measure_taken().host_seconds >= 3 * alone > 0


def test_a_resumed_training_reports_what_all_of_its_parts_took(project, monkeypatch):
    params = yaml.safe_load((project / "params.yaml").read_text())
    params["flows"]["training"] |= {"power_watts": 60, "co2_g_per_kwh": 400, "price_per_hour": 2}
    (project / "params.yaml").write_text(yaml.safe_dump(params))
    monkeypatch.setattr(energy_module, "_find_packages", lambda _: [])
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(TrainingMonitor, "on_log", stop_after_seven)
        main()
    (checkpoint,) = project.glob("checkpoints/finetune/*/checkpoint-6")
    hour = {"host_seconds": 3600.0, "energy": {"watt_hours": 60.0, "source": ASSUMED}}
    assert 0 < read_json(checkpoint / "taken.json")["host_seconds"] < 3600
    write_json(checkpoint / "taken.json", hour)
    mark_complete(checkpoint)
    main()
    took = read_json(project / "reports" / "finetune" / "metrics.json")["throughput"]
    assert took["energy_source"] == ASSUMED
    assert 60.0 < took["energy_wh"] < 120 and 2.0 < took["cost"] < 4
    assert took["co2_g"] == pytest.approx(0.4 * took["energy_wh"], rel=0.01)


def stop_after_seven(monitor, arguments, state, *_: object, **__: object) -> None:
    if state.global_step == 7:
        raise KeyboardInterrupt


def test_a_training_reports_its_speed_memory_and_share_of_the_machine(project, caplog):
    caplog.set_level(logging.INFO)
    main()
    took = json.loads((project / "reports" / "finetune" / "metrics.json").read_text())["throughput"]
    assert 0 < took["product_share"] < 1 and took["product_limit_gflops"] > 0
    assert took["energy_source"] and took["cost"] is None
    assert took["estimated_peak_mib"] > read_held_memory() // MIB // 4
    assert "of the products), " in caplog.text and "the training takes about" in caplog.text
    assert read_free_memory() <= read_total_memory()
    assert MemoryEstimate(1, 2, 3).peak == 6
