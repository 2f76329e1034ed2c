"""Steps that take less memory: packed rows, the output layer in parts, layers computed twice."""

import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from stages.common.chat.template import Encoded
from stages.common.errors import InputError
from stages.finetune.adapter import build_model as build_adapter
from stages.finetune.answer_loss import (
    chunk_head,
    find_chunked_head,
    sum_answer_loss,
    sum_cross_entropy,
    sum_linear_cross_entropy,
    unchunk_head,
)
from stages.finetune.kernels.checkpointing import checkpoint_layers, decide_checkpointing
from stages.finetune.kernels.packed import PACKED, attend_without_scores, can_pack, pack, use_packed
from stages.finetune.progress.memory import MemoryPlan
from stages.finetune.shared_prefix import _causal, lay_out
from stages.finetune.speedups import is_packed, speed_up_training
from tests.stages.families import build_config, build_model
from tests.stages.finetune.project import make_recipe
from tests.stages.finetune.test_shared_prefix import (
    EXAMPLES,
    PAD,
    assert_equal_but_for_rounding,
    gradients,
    loss_and_gradient,
    one_by_one,
)
from tests.tiny import make_model, save_model

LONG = [Encoded([0, *range(5, 5 + n), 1], 8) for n in (96, 240, 136, 200)]


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that operations make and that are still there, and their peak."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self._known = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = {
            leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if torch.is_tensor(leaf)
        }
        out = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if not torch.is_tensor(leaf):
                continue
            storage = leaf.untyped_storage()
            if storage._cdata not in given | self._known:
                self._known.add(storage._cdata)
                self.now += storage.nbytes()
                weakref.finalize(storage, self._forget, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return out

    def _forget(self, key, size):
        self._known.discard(key)
        self.now -= size


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral"])
def test_packed_rows_have_the_loss_and_gradients_of_each_alone(family):
    config = build_config(family, 50)
    expected = one_by_one(build_model(config), EXAMPLES)
    model = build_model(config)
    use_packed(model)
    batch = lay_out(EXAMPLES, PAD, packed=True)
    assert batch.input_ids.numel() == 3 + sum(len(e.input_ids) - 3 for e in EXAMPLES)  # no padding
    assert_equal_but_for_rounding(loss_and_gradient(model, batch), expected)


@pytest.mark.parametrize("window", [1, 3, 5])
def test_packed_rows_see_no_further_than_the_window_of_their_layer(window):
    config = build_config("qwen2", 50)
    config.sliding_window, config.layer_types = window, ["full_attention", "sliding_attention"]
    expected = one_by_one(build_model(config), EXAMPLES)
    model = build_model(config)
    use_packed(model)
    assert_equal_but_for_rounding(loss_and_gradient(model, lay_out(EXAMPLES, PAD, packed=True)), expected)


def test_rows_with_nothing_in_common_a_row_alone_and_several_answers_are_packed_as_well():
    talk = Encoded([0, 5, 6, 7, 20, 30, 1, 8, 9, 21, 31, 1, 7, 6, 22, 1], 4, given=((7, 9), (12, 14)))
    strangers = [Encoded([3, 4, 5, 1], 2), Encoded([6, 7, 8, 9, 1], 3)]
    for examples in (strangers, strangers[:1], [talk, *EXAMPLES[:2]]):
        expected = one_by_one(make_model(), examples)
        model = make_model()
        use_packed(model)
        assert_equal_but_for_rounding(loss_and_gradient(model, lay_out(examples, PAD, packed=True)), expected)


def test_a_packing_names_the_place_of_each_key_and_its_copies():
    found = pack(2, [3, 1])
    assert found.list_sequences() == [(2, 2), (3, 5), (1, 3)]
    assert found.query_starts.tolist() == [0, 2, 5, 6] and found.key_starts.tolist() == [0, 2, 7, 10]
    assert found.key_places.tolist() == [0, 1, 0, 1, 2, 3, 4, 0, 1, 5]
    assert found.key_places[found.first_places].tolist() == list(range(6))
    assert found.key_places[found.copy_places].tolist() == [0, 1, 0, 1]
    assert pack(0, [3, 1]).list_sequences() == [(3, 3), (1, 1)]


@pytest.mark.parametrize("window", [None, 1, 3, 9])
def test_torchs_kernels_attend_as_plain_products_do(window):
    torch.manual_seed(0)
    query, key, value = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 7, 8), torch.randn(2, 2, 7, 8)
    expected = _causal(query, key, value, window, None)
    torch.testing.assert_close(attend_without_scores(query, key, value, 1.0, window), expected)


def test_a_model_is_packed_only_where_the_kernel_runs_and_otherwise_the_next_way_is_taken(
    monkeypatch, caplog
):
    model = make_model()
    assert not can_pack(model)  # no GPU
    monkeypatch.setattr("stages.finetune.speedups.can_pack", lambda _: True)
    assert speed_up_training(model, EXAMPLES, PAD)[0] and is_packed(model)
    broken = make_model()

    def refuse(*_, **__):
        raise RuntimeError("FlashAttention only supports other GPUs")

    monkeypatch.setattr("stages.finetune.kernels.packed._attend_one_by_one", refuse)
    assert speed_up_training(broken, EXAMPLES, PAD)[0] and not is_packed(broken)
    assert "FlashAttention only supports other GPUs" in caplog.text
    assert broken.config._attn_implementation != PACKED


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_of_an_output_layer_in_parts_is_that_of_the_whole(dtype):
    torch.manual_seed(0)
    weight, bias = torch.randn(50, 8, dtype=dtype), torch.randn(50, dtype=dtype)
    states, targets = torch.randn(300, 8, dtype=dtype, requires_grad=True), torch.randint(50, (300,))
    logits = torch.nn.functional.linear(states, weight, bias)
    expected = torch.nn.functional.cross_entropy(logits.float(), targets, reduction="sum") / 7
    (wanted,) = torch.autograd.grad(expected, states)
    for rows in (7, 128, 1000):
        loss = sum_linear_cross_entropy(states, weight, bias, targets, rows) / 7
        (found,) = torch.autograd.grad(loss, states)
        rounding = {} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.02}
        torch.testing.assert_close(loss, expected, **rounding)
        torch.testing.assert_close(found, wanted, **rounding)
        with torch.no_grad():
            torch.testing.assert_close(
                sum_linear_cross_entropy(states, weight, bias, targets, rows) / 7, loss.detach()
            )


def test_only_an_output_layer_whose_results_are_the_logits_is_computed_in_parts():
    plain = make_model().requires_grad_(requires_grad=False)
    batch = lay_out(EXAMPLES, PAD, share_prefix=False)
    whole = sum_answer_loss(plain, batch)
    assert chunk_head(plain, batch) and find_chunked_head(plain) is not None
    torch.testing.assert_close(sum_answer_loss(plain, batch), whole)
    assert batch.answer_logits(plain).shape[1] == 258  # logits again, for everybody else
    unchunk_head(plain)
    assert find_chunked_head(plain) is None
    assert not chunk_head(make_model(), batch)  # its weights are trained
    capped = build_model(build_config("gemma2", 50)).requires_grad_(requires_grad=False)
    assert not chunk_head(capped, batch) and find_chunked_head(capped) is None


def step(model, batch):
    model.zero_grad()
    loss = sum_answer_loss(model, batch)
    loss.backward()
    return loss.detach(), gradients(model)


@pytest.mark.parametrize("way", ["shared", "packed", "padded"])
def test_layers_that_are_computed_twice_give_the_same_bytes_and_keep_less(tmp_path, monkeypatch, way):
    monkeypatch.setattr("stages.finetune.speedups.can_pack", lambda _: way == "packed")
    model = build_adapter(save_model(tmp_path, num_hidden_layers=6), make_recipe()).train()
    shares = way != "padded" and speed_up_training(model, LONG, PAD)[0]
    batch = lay_out(LONG, PAD, shares, packed=way == "packed")
    plan = MemoryPlan(model, LONG, PAD, shares)
    with LiveBytes() as plain_bytes:
        plain = step(model, batch)
    checkpoint_layers(model)
    with LiveBytes() as bytes_twice:
        twice = step(model, batch)
    torch.testing.assert_close(twice, plain, rtol=0, atol=0)
    assert bytes_twice.peak < 0.5 * plain_bytes.peak
    kept = plan._count_kept(batch)
    # A step's gradients come on top, which are as large as a layer: the estimate has them for one layer.
    assert 0.8 * bytes_twice.peak < kept.count(checkpointing=True) < 2 * bytes_twice.peak
    assert kept.count(checkpointing=False) == pytest.approx(plain_bytes.peak, rel=0.35)


def test_layers_are_computed_twice_where_it_is_wanted_or_the_memory_asks_for_it():
    model = make_model()
    assert decide_checkpointing(model, wanted=True, fits=lambda: True)
    assert decide_checkpointing(model, wanted="auto", fits=lambda: False)
    assert not decide_checkpointing(model, wanted="auto", fits=lambda: True)
    assert not decide_checkpointing(model, wanted=False, fits=lambda: False)
    without = torch.nn.Linear(2, 2)
    assert not decide_checkpointing(without, wanted="auto", fits=lambda: False)
    with pytest.raises(InputError, match="Linear has no layers"):
        decide_checkpointing(without, wanted=True, fits=lambda: True)


@pytest.mark.parametrize(("method", "again"), [("prefix_tuning", False), ("prompt_tuning", True)])
def test_a_learned_prefix_is_read_by_no_layer_that_is_computed_twice(tmp_path, method, again):
    recipe = make_recipe(method=method, num_virtual_tokens=3)
    model = build_adapter(save_model(tmp_path), recipe).train()
    batch = lay_out(LONG, PAD, share_prefix=False)
    plain = step(model, batch)
    assert decide_checkpointing(model, wanted="auto", fits=lambda: False) is again
    checkpoint_layers(model)
    torch.testing.assert_close(step(model, batch), plain, rtol=0, atol=0)


def test_logits_in_place_are_still_those_of_the_cross_entropy():
    logits, targets = torch.randn(5, 7), torch.randint(7, (5,))
    expected = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
    torch.testing.assert_close(sum_cross_entropy(logits, targets), expected)
