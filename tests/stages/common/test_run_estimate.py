import json
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

from stages.common.artifacts import write_json
from stages.common.chat.common_prefix import count_common_prefix
from stages.common.chat.fitting import encode_fitting
from stages.common.machine import devices
from stages.common.machine.devices import read_gpu_watts
from stages.common.machine.memory import format_bytes
from stages.common.machine.products import measure_product_speed
from stages.common.machine.training_memory import Batch, count_state_bytes, estimate_training_memory
from stages.common.messages import Message
from stages.common.params.loading import load_params
from stages.common.records import make_row
from stages.common.run_estimate.__main__ import (
    choose_memory,
    describe,
    describe_costs,
    describe_memory,
    format_minutes,
    main,
)
from stages.common.run_estimate.methods import PLAIN, MethodWork, read_method
from stages.common.run_estimate.seconds import (
    ANSWERING_SHARE,
    DEFAULT_SIZE,
    OVERHEAD_S,
    TRAINING_SHARE,
    TRANSFORMERS_SHARE,
    Estimate,
    ModelSize,
    count_processes,
    estimate_run,
    read_gradients,
    read_model_size,
)
from stages.common.run_estimate.work import Work, count_asked_rows, list_learned_sides, read_work
from stages.preflight.__main__ import describe_side
from tests.stages.families import build_config, build_model
from tests.tiny import make_model, make_tokenizer

ROOT = Path(__file__).parents[3]

SIDES = ("train", "validation", "test")
WORK = Work(1000, 50_000, 20_000, 100, 5000, 40)


def tell_memory(params, counted, base, dtype, free, processes=1, has_gpus=False, method=PLAIN):
    memory = choose_memory(params, counted, base, dtype, free, processes, has_gpus, method)
    return describe_memory(memory, params.finetune, free, processes, has_gpus)


def test_the_size_of_a_model_is_that_of_its_matrices(tmp_path):
    model = make_model(num_key_value_heads=2)
    model.save_pretrained(tmp_path)
    matrices = {name: p.numel() for name, p in model.named_parameters() if p.dim() == 2}
    output = matrices.pop("model.embed_tokens.weight")
    assert read_model_size(tmp_path) == ModelSize(sum(matrices.values()), output)


def test_without_a_model_the_size_is_that_of_the_default(tmp_path):
    assert read_model_size(tmp_path) == DEFAULT_SIZE
    (tmp_path / "config.json").write_text(json.dumps({"n_embd": 8}))
    assert read_model_size(tmp_path) == DEFAULT_SIZE


@pytest.mark.parametrize("family", ["gpt2", "gemma3", "qwen3-moe"])
def test_the_size_of_another_architecture_is_that_of_the_weights_that_a_token_meets(tmp_path, family):
    config = build_config(family, 1000)
    model = build_model(config)
    model.save_pretrained(tmp_path)
    text = config.get_text_config()
    output = 1000 * text.hidden_size
    found = read_model_size(tmp_path)
    assert found.output == output
    # Matrices of the blocks; of the experts, as many as a token is sent to.
    layers = sum(
        weights.numel() * (text.num_experts_per_tok / text.num_experts if ".experts." in name else 1)
        for name, weights in model.named_parameters()
        if weights.dim() > 1 and re.search(r"\.(layers|h)\.\d", name) and "vision" not in name
    )
    positions = getattr(text, "n_positions", 0) * text.hidden_size  # a table that is small in real models
    assert found.layers == pytest.approx(layers + positions, rel=0.1)


def test_the_size_of_a_mixture_has_the_experts_of_a_token_also_where_their_width_has_the_usual_name(tmp_path):
    names = ("hidden_size", "num_attention_heads", "num_hidden_layers", "intermediate_size", "vocab_size")
    config = dict(zip(names, (8, 2, 3, 20, 100), strict=True))
    config |= {"num_experts_per_tok": 2, "num_local_experts": 4, "text_config": None}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert read_model_size(tmp_path) == ModelSize(3 * (4 * 8 * 8 + 2 * 3 * 8 * 20), 800)


def test_twice_the_rows_or_half_the_speed_take_twice_as_long():
    once = estimate_run(WORK, DEFAULT_SIZE, "float32", 1e11)
    double = Work(2000, 100_000, 40_000, 100, 5000, 40)
    extra = estimate_run(double, DEFAULT_SIZE, "float32", 1e11).finetune_s - once.finetune_s
    operations = 4 * (50_000 * DEFAULT_SIZE.layers + 20_000 * DEFAULT_SIZE.output)
    assert extra == pytest.approx(operations / (TRAINING_SHARE["float32"] * 1e11))
    slower = estimate_run(WORK, DEFAULT_SIZE, "float32", 0.5e11)
    assert slower.finetune_s - once.finetune_s == pytest.approx(extra)
    assert slower.ask_base_s > once.ask_base_s > once.evaluate_s


def test_training_the_weights_costs_their_gradients_and_fewer_blocks_cost_less():
    def trained(gradients):
        estimate = estimate_run(WORK, DEFAULT_SIZE, "float32", 1e11, gradients=gradients)
        return (estimate.finetune_s - OVERHEAD_S) * TRAINING_SHARE["float32"] * 1e11

    full = read_gradients({"method": "full", "reach": 1.0, "parameters": 100, "trained_parameters": 100})
    assert trained(full) == pytest.approx(6 * (50_000 * DEFAULT_SIZE.layers + 20_000 * DEFAULT_SIZE.output))
    half = read_gradients({"method": "partial", "reach": 0.5, "parameters": 100, "trained_parameters": 40})
    layers = 2 * (1 + 0.5 + 0.4) * 50_000 * DEFAULT_SIZE.layers
    assert trained(half) == pytest.approx(layers + 4 * 20_000 * DEFAULT_SIZE.output)
    adapter = {"method": "dora", "reach": 1.0, "parameters": 100, "trained_parameters": 5}
    assert read_gradients(adapter) == read_gradients(None)


def test_the_memory_of_trained_weights_is_that_of_their_gradients_and_averages(tmp_path, monkeypatch):
    gib = 2**30
    assert count_state_bytes(gib, gib, 4, replaced=True) == 16 * gib
    assert count_state_bytes(gib, gib, 2, replaced=True) == 18 * gib  # a copy to compute with
    assert count_state_bytes(gib, gib // 8, 2, replaced=True) == 2 * (gib - gib // 8) + 18 * gib // 8
    assert count_state_bytes(gib, gib // 8, 2, replaced=False) == 4 * gib
    assert count_state_bytes(gib, gib, 4, replaced=True, is_averaged=True) == 20 * gib
    make_model().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    plain, full = (
        estimate_training_memory(config, 10**9, 16, Batch(4, 99, 40), 2, replaced) for replaced in (0, 10**9)
    )
    assert full - plain == pytest.approx(16 * 10**9, rel=0.01)


def test_gpus_divide_the_training_and_nothing_else_and_that_is_told():
    one, four = (estimate_run(WORK, DEFAULT_SIZE, "bfloat16", 1e11, gpus=gpus) for gpus in (1, 4))
    assert one.finetune_s - OVERHEAD_S == pytest.approx(4 * (four.finetune_s - OVERHEAD_S))
    assert (one.ask_base_s, one.evaluate_s) == (four.ask_base_s, four.evaluate_s)
    assert "on 4 GPUs, if they are 4 times as fast as one" in describe(WORK, four)
    assert "GPU" not in describe(WORK, one)


def test_rows_that_are_asked_during_the_training_are_part_of_its_time():
    assert [count_asked_rows(*settings) for settings in ((None, 32, 99), (0.5, 32, 99), (0.3, 32, 10))] == [
        *(0, 64, 30)
    ]
    asked = replace(WORK, validation_tokens=3000, validation_answer_tokens=1000)
    more = (estimate_run(work, DEFAULT_SIZE, "float32", 1e11, gpus=2).finetune_s for work in (asked, WORK))
    weights = DEFAULT_SIZE.layers + DEFAULT_SIZE.output
    expected = 2 * weights * (3000 / ANSWERING_SHARE["float32"] + 1000 / TRANSFORMERS_SHARE) / 1e11
    assert next(more) - next(more) == pytest.approx(expected)


def test_each_gpu_has_a_process_and_processes_on_a_cpu_share_it():
    assert (count_processes("auto", 4, "cpu"), count_processes(2, 4, "cpu")) == (1, 2)
    assert count_processes("auto", 4, "cuda") == min(torch.cuda.device_count(), 4)


def test_several_processes_have_a_part_of_the_rows_each_and_the_model_and_its_state_each(tmp_path):
    params = load_params(ROOT / "params.yaml")
    params = params.model_copy(update={"finetune": params.finetune.model_copy(update={"batch_size": 5})})
    counted = {"sides": {"train": {"rows": 1000, "longest": 500, "longest_answer": 100}}}
    make_model().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    settings = (params.finetune.rank, Batch(3, 500, 100), 4)
    weights = sum(p.numel() for p in make_model().parameters())
    each = estimate_training_memory(config, weights, *settings, is_averaged=True)
    assert each > estimate_training_memory(config, weights, *settings)

    def tell(*where):
        return tell_memory(params, counted, tmp_path, "float32", 8 << 30, *where)

    assert tell(2, True) == f"  memory: finetune takes about {format_bytes(each)} on each of 2 GPUs"
    assert tell(2) == f"  memory: finetune takes about {format_bytes(2 * each)} in 2 processes"


def test_processes_share_a_model_that_does_not_fit_one_device(tmp_path):
    params = load_params(ROOT / "params.yaml")
    counted = {"sides": {"train": {"rows": 1000, "longest": 500, "longest_answer": 100}}}
    model = make_model(num_hidden_layers=8, hidden_size=64)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    weights = sum(p.numel() for p in model.parameters())
    settings = (params.finetune.rank, Batch(2, 500, 100), 4)
    whole = estimate_training_memory(config, weights, *settings, is_averaged=True)
    part = estimate_training_memory(config, weights, *settings, shards=2)
    outside = 258 * 64
    # Half of the weights; and what is gathered: two of the eight blocks, and the embedding.
    adapter = estimate_training_memory(config, weights, *settings) - estimate_training_memory(
        config, weights, 0, *settings[1:]
    )
    assert part < whole
    assert abs(whole - part - (2 * weights - 4 * (outside + 2 * (weights - outside) // 8))) < adapter

    def tell(free, **changes):
        finetune = params.finetune.model_copy(
            update={"batch_size": 4, "gradient_checkpointing": False, **changes}
        )
        own = params.model_copy(update={"finetune": finetune})
        return tell_memory(own, counted, tmp_path, "float32", free, 2, True)

    assert "share the model" not in tell(whole)
    assert tell(whole - 1).endswith(
        f"{format_bytes(part)} on each of 2 GPUs, which share the model (finetune.sharding)"
    )
    assert "share the model" not in tell(whole - 1, sharding="none")
    assert "share the model" not in tell(whole - 1, method="qlora")
    assert "share the model" in tell(whole, sharding="full")


def test_transformers_answers_more_slowly():
    fast, slow = (estimate_run(WORK, DEFAULT_SIZE, "float32", 1e11, paged) for paged in (True, False))
    assert slow.evaluate_s > fast.evaluate_s
    assert slow.finetune_s == fast.finetune_s


def test_the_speed_of_products_is_a_number_of_this_machine():
    assert 1e8 < measure_product_speed("float32", seconds=0.05) < 1e15


def test_work_is_what_preflight_counted():
    tokenizer = make_tokenizer()
    rows = [make_row([Message("user", f"q{i}"), Message("assistant", "yes")], "toy", "mit") for i in range(9)]
    encoded = [encode_fitting(tokenizer, part) for part in (rows, rows[:4])]
    sides = dict(zip(("train", "test"), (describe_side(*side) for side in encoded), strict=True))
    sides["validation"] = sides["test"]
    once = read_work(sides, epochs=1, batch_size=4, max_test_rows=2)
    assert (once.validation_tokens, once.validation_answer_tokens) == (0, 0)
    asked = read_work(sides, 1, 4, 2, validate_every=0.5, validation_rows=3)
    assert asked.validation_answer_tokens == 2 * 3 * 4
    assert asked.validation_tokens == 2 * 3 * once.train_tokens // 9
    assert (once.train_rows, once.test_rows) == (9, 2)
    assert once.train_answer_tokens == 9 * 4  # three letters and the end of the turn
    assert once.longest_answer == 4
    assert once.test_tokens == round(once.train_tokens / 9 * 2)
    assert read_work(sides, 3, 4, None).train_tokens == 3 * once.train_tokens
    beginning = sides["train"]["shared_tokens"]
    assert 0 < beginning < min(len(e.input_ids) for _, e in encoded[0][0])
    assert once.train_repeated == (9 - 3) * beginning  # computed once in each of three batches
    assert once.test_repeated == beginning  # of two rows


def test_the_tokens_with_which_all_rows_begin_are_counted():
    assert count_common_prefix([[1, 2, 3, 4], [1, 2, 5], [1, 2, 3, 9]]) == 2
    assert count_common_prefix([[1, 2], [1, 2, 5]]) == 2
    assert count_common_prefix([[1], [2]]) == count_common_prefix([]) == 0


def test_what_all_rows_begin_with_takes_the_time_of_one_in_each_batch():
    def estimate(**repeated):
        return estimate_run(replace(WORK, **repeated), DEFAULT_SIZE, "bfloat16", 1e11)

    whole, shared = estimate(), estimate(train_repeated=25_000, test_repeated=2500)
    layers = 4 * 25_000 * DEFAULT_SIZE.layers / (TRAINING_SHARE["bfloat16"] * 1e11)
    assert whole.finetune_s - shared.finetune_s == pytest.approx(layers)
    assert shared.ask_base_s < whole.ask_base_s and shared.evaluate_s < whole.evaluate_s


def test_the_command_reads_preflights_counts_and_says_where_there_are_none(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["run_estimate", "finetune"])
    shutil.copy(ROOT / "params.yaml", tmp_path)
    metrics = Path("reports/preflight/metrics.json")
    with pytest.raises(SystemExit):
        main()
    assert "dvc repro preflight" in capsys.readouterr().err
    write_json(metrics, {"success": False, "problems": ["the chat template writes no end of turn"]})
    with pytest.raises(SystemExit):
        main()
    assert "no tokens: the chat template writes no end of turn" in capsys.readouterr().err
    side = {"rows": 1234, "tokens": 99_000, "learned_tokens": 5000, "longest": 99, "longest_answer": 40}
    counted = {"success": True, "problems": [], "sides": dict.fromkeys(SIDES, side)}
    write_json(metrics, counted | {"answered_by": "paged"})
    main()
    found = capsys.readouterr().out
    assert "finetune: 1,234 rows (99,000 tokens)" in found
    assert re.match(r"this machine: \d+ cores, \S+ [MG]iB of memory, \S+ [MG]iB of it free\n", found)
    assert "memory: not known before finetune" in found and "costs: energy not known" in found
    make_model().save_pretrained("artifacts/fetch_base")
    params = yaml.safe_load(Path("params.yaml").read_text())
    params["flows"]["training"] |= {"power_watts": 100, "co2_g_per_kwh": 400, "price_per_hour": 2}
    Path("params.yaml").write_text(yaml.safe_dump(params))
    main()
    found = capsys.readouterr().out
    assert re.search(r"memory: finetune takes about [679]\d\d MiB\n", found)
    minutes = float(re.search(r"about (\S+) min on this machine", found)[1])
    costs = r"costs: about (\S+) Wh at 100 W, (\S+) g CO2, a price of about (\S+)\n"
    watt_hours, grams, price = map(float, re.search(costs, found).groups())
    assert watt_hours == pytest.approx(100 * minutes / 60, abs=100 * 0.26 / 60)  # to half a minute
    assert grams == pytest.approx(0.4 * watt_hours, rel=0.02)
    assert price == pytest.approx(0.02 * watt_hours, rel=0.02)


def test_the_energy_of_a_gpu_is_at_most_its_limit_times_the_time(monkeypatch):
    settings = load_params(ROOT / "params.yaml").flows.training
    assert describe_costs(1800, settings) == "  costs: energy not known (flows.training.power_watts)"
    of_gpus = describe_costs(1800, settings, 1400.0)
    assert of_gpus == "  costs: about 700 Wh at the most that the GPUs may take, 1400 W"
    known = settings.model_copy(update={"power_watts": 60, "price_per_hour": 3.0})
    assert describe_costs(1800, known, 1400.0) == "  costs: about 30 Wh at 60 W, a price of about 1.5"
    assert read_gpu_watts() is None  # no GPU that torch uses, or no library for it
    library = SimpleNamespace(nvmlDeviceGetEnforcedPowerLimit={"handle": 700_000}.get)
    monkeypatch.setattr(devices, "find_nvml_device", lambda: (library, "handle"))
    assert read_gpu_watts() == 700


def test_a_training_that_does_not_fit_names_what_to_lower_and_another_architecture_is_not_judged(
    tmp_path,
):
    params = load_params(ROOT / "params.yaml")
    counted = {"sides": {"train": {"rows": 1000, "longest": 500, "longest_answer": 100}}}
    make_model().save_pretrained(tmp_path)
    whole = tell_memory(params, counted, tmp_path, "float32", 8 << 30)
    assert whole.endswith("MiB")
    less = (int(whole.split()[4]) - 1) << 20
    twice = tell_memory(params, counted, tmp_path, "float32", less)
    assert twice.endswith("MiB, computing each layer twice (finetune.gradient_checkpointing)")
    assert twice.split()[4] < whole.split()[4]
    assert "are free: lower finetune.batch_size" in tell_memory(params, counted, tmp_path, "float32", 1 << 20)
    (tmp_path / "config.json").write_text(json.dumps({"n_embd": 8}))
    assert "not known before finetune" in tell_memory(params, counted, tmp_path, "float32", 8 << 30)


@pytest.mark.parametrize(("seconds", "text"), [(4, "0.5 min"), (95, "1.5 min"), (600, "10 min")])
def test_a_duration_is_rounded_to_what_the_estimate_knows(seconds, text):
    assert format_minutes(seconds) == text


def test_the_text_names_the_stages_that_run_with_their_rows_and_minutes():
    estimate = Estimate("float32", 60, 300, 30)
    whole = describe(WORK, estimate)
    assert whole.startswith("about 6.5 min on this machine, in float32")
    assert "finetune: 1,000 rows (50,000 tokens), about 5 min" in whole
    part = describe(WORK, estimate, ["finetune", "evaluate"])
    assert part.startswith("about 5.5 min")
    assert "ask_base" not in part


def with_method(**changes):
    return load_params(ROOT / "params.yaml").finetune.model_copy(update=changes)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"method": "lora"}, PLAIN),
        ({"method": "lora", "teacher": "t"}, PLAIN),  # which it does not learn from
        ({"method": "dpo"}, MethodWork(in_memory=2, scored_before=1)),
        ({"method": "orpo"}, MethodWork(in_memory=2)),
        ({"method": "kto"}, MethodWork(scored_before=2, scored=1)),
        ({"method": "grpo", "group_size": 6}, MethodWork(6, 6, sampled=6)),
        ({"method": "grpo", "group_size": 6, "kl_weight": 0.1}, MethodWork(6, 6, scored=1, sampled=6)),
        ({"method": "distill", "teacher": "t"}, MethodWork(teacher=9, is_beside=True)),
        ({"method": "full", "teacher": "t", "distill": "answers"}, MethodWork(teacher=9)),
    ],
)
def test_each_method_has_its_work(changes, expected):
    assert read_method(with_method(**changes), 9 if "teacher" in changes else 0) == expected


@pytest.mark.parametrize(
    ("method", "more"),
    [
        (MethodWork(in_memory=2), 0),
        (MethodWork(scored_before=1), 1 / 3),  # of three epochs, whose forward passes are half of the work
        (MethodWork(scored=1), 1),
        (MethodWork(scored_before=2, scored=1), 5 / 3),
    ],
)
def test_what_is_scored_without_gradients_takes_the_time_of_forward_passes(method, more):
    work = replace(WORK, epochs=3)
    plain, found = (
        estimate_run(work, DEFAULT_SIZE, "float32", 1e11, method=one).finetune_s - OVERHEAD_S
        for one in (PLAIN, method)
    )
    assert found / plain == pytest.approx(1 + more / 2)


def test_layers_that_are_computed_twice_take_a_third_pass():
    once, twice = (
        estimate_run(WORK, DEFAULT_SIZE, "float32", 1e11, computes_twice=again).finetune_s
        for again in (False, True)
    )
    layers = 2 * 50_000 * DEFAULT_SIZE.layers
    assert twice - once == pytest.approx(layers / (TRAINING_SHARE["float32"] * 1e11))


def test_a_teacher_reads_each_batch_or_writes_an_answer_to_each_row_once():
    def estimate(epochs=2, **changes):
        work = replace(WORK, train_repeated=10_000, epochs=epochs)
        return estimate_run(work, DEFAULT_SIZE, "float32", 1e11, method=MethodWork(**changes)).finetune_s

    beside, writing = (estimate(teacher=10**9, is_beside=yes) - estimate() for yes in (True, False))
    assert beside == pytest.approx(2e9 * 50_000 / (TRAINING_SHARE["float32"] * 1e11))
    once = 25_000 / ANSWERING_SHARE["float32"] + 10_000 / TRANSFORMERS_SHARE
    assert writing == pytest.approx(2e9 * once / 1e11)


def test_grpo_reads_each_prompt_once_writes_its_group_and_trains_on_it():
    side = {"rows": 10, "tokens": 1000, "learned_tokens": 200, "longest": 99, "longest_answer": 30}
    sides = {name: {**side, "shared_tokens": 7} for name in SIDES}
    one, six = (read_work(sides, 2, 5, None, times=times) for times in (1, 6))
    assert (six.train_tokens, six.train_answer_tokens) == (6 * one.train_tokens, 6 * one.train_answer_tokens)
    assert six.train_repeated == 7 * (6 * 2 * 10 - 4)  # once in each of four batches
    sampled = MethodWork(6, 6, sampled=6)
    found, plain = (
        estimate_run(six, DEFAULT_SIZE, "float32", 1e11, gpus=2, method=method).finetune_s
        for method in (sampled, PLAIN)
    )
    weights = DEFAULT_SIZE.layers + DEFAULT_SIZE.output
    written = 2000 / ANSWERING_SHARE["float32"] + 2400 / TRANSFORMERS_SHARE
    assert found - plain == pytest.approx(2 * weights * written / 2e11)


def test_the_memory_is_that_of_all_sequences_of_a_batch_and_of_a_teacher_beside_it(tmp_path):
    params = load_params(ROOT / "params.yaml")
    counted = {"sides": {"train": {"rows": 1000, "longest": 500, "longest_answer": 100}}}
    make_model().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    weights = sum(p.numel() for p in make_model().parameters())

    def need(method):
        return choose_memory(params, counted, tmp_path, "float32", 8 << 30, method=method).needed

    size, rank = params.finetune.batch_size, params.finetune.rank
    for sequences in (1, 2, 8):
        batch = Batch(sequences * size, 500, 100)
        assert need(MethodWork(in_memory=sequences)) == estimate_training_memory(
            config, weights, rank, batch, 4
        )
    assert need(MethodWork(teacher=1000, is_beside=True)) - need(PLAIN) == 4000
    assert need(MethodWork(teacher=1000)) == need(PLAIN)


def test_what_is_learned_from_preferences_is_estimated_by_their_tokens():
    side = {"rows": 100, "tokens": 1000, "learned_tokens": 200, "longest": 9, "longest_answer": 3}
    pairs = {"pairs": 7, "rows": 7, "tokens": 90, "learned_tokens": 40, "longest": 8, "longest_answer": 2}
    sides = dict.fromkeys(("train", "validation", "test"), side)
    assert list_learned_sides({"sides": sides}) == sides
    work = read_work(list_learned_sides({"sides": sides, "preferences": pairs}), 2, 4, None)
    assert (work.train_rows, work.train_tokens, work.train_answer_tokens) == (7, 180, 80)
    assert work.test_rows == 100
