"""A decoder as an OpenVINO graph over paged keys and values.

The tokens of a step are one row, sequence after sequence; attention finds the past of each sequence in the
blocks of one pool (PagedAttention, Kwon et al. 2023). The graph is built by hand instead of converted, so
that logits are computed only where needed, and only numpy and the runtime are required.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from services.engines.paged.packed import GROUP, OFFSET, Packed, concatenate
from services.engines.paged.weights import DecoderShape, Rotation, Weights

STEP_INPUTS = ("past_lens", "subsequence_begins", "block_indices", "block_indices_begins")


def build_graph(weights: Weights) -> Any:
    """Build the `openvino.Model`: token ids of a step in, logits of the rows `wanted` out.

    Inputs: input_ids, position_ids [tokens]; those of PagedAttention; wanted [logit rows];
    key_cache.N, value_cache.N. Output: logits, float32 [logit rows, 1, vocabulary].
    """
    import openvino as ov
    from openvino import opset13 as op

    shape, tensors = weights.shape, weights.tensors
    ids, positions, wanted = (
        _parameter(name, [-1], ov.Type.i64) for name in ("input_ids", "position_ids", "wanted")
    )
    paging = [_parameter(name, [-1], ov.Type.i32) for name in STEP_INPUTS]
    longest = _parameter("max_context_len", [], ov.Type.i32)
    caches = []
    # [tokens, 1, hidden]: the plugin's fusions know activations with three axes.
    x = _embed(tensors["token_embd.weight"], op.unsqueeze(ids, _int(1)))
    x = _scale(x, shape.embedding_scale)
    turns = {
        rotation: _turn(positions, rotation, shape, tensors.get("rope_freqs.weight"))
        for rotation in set(shape.rotations)
        if rotation is not None
    }
    for layer, rotation in enumerate(shape.rotations):
        cache = [_parameter(f"{kind}_cache.{layer}", [-1, -1, -1, -1], None) for kind in ("key", "value")]
        caches += cache
        block = {
            name.removeprefix(f"blk.{layer}.").removesuffix(".weight"): array
            for name, array in tensors.items()
            if name.startswith(f"blk.{layer}.")
        }

        def norm(x: Any, name: str, block: dict[str, Any] = block) -> Any:
            return _norm(x, block[name], shape) if name in block else x

        turn = None if rotation is None else turns[rotation]
        mixed = _attention(norm(x, "attn_norm"), block, shape, turn, [*cache, *paging], longest)
        x = op.add(x, _scale(norm(mixed, "post_attention_norm"), shape.residual_scale))
        fed = _feed_forward(norm(x, "ffn_norm"), block, shape)
        x = op.add(x, _scale(norm(fed, "post_ffw_norm"), shape.residual_scale))
    states = op.gather(_norm(x, tensors["output_norm.weight"], shape), wanted, _int(0))
    # An output layer that is the embedding is one tensor of the file, quantized once.
    head = _matrix(tensors.get("output.weight", tensors["token_embd.weight"]))
    logits = op.matmul(_scale(states, 1 / shape.logit_divisor), head, transpose_a=False, transpose_b=True)
    out = op.result(logits)  # directly: the plugin would round anything in between to bfloat16
    out.output(0).set_names({"logits"})
    hidden = op.result(states)
    hidden.output(0).set_names({"hidden"})
    return ov.Model([out, hidden], [ids, positions, *paging, longest, wanted, *caches], "paged decoder")


def _parameter(name: str, dims: list[int], kind: Any) -> Any:
    import openvino as ov
    from openvino import opset13 as op

    # The plugin fills in the element type and the block size of the caches.
    node = op.parameter(ov.PartialShape(dims), kind or ov.Type.dynamic, name=name)
    node.output(0).set_names({name})
    return node


def _int(value: int) -> Any:
    from openvino import opset13 as op

    return op.constant(np.array(value, dtype=np.int64))


def _ints(values: list[int]) -> Any:
    from openvino import opset13 as op

    return op.constant(np.array(values, dtype=np.int64))


def _matrix(matrix: Any) -> Any:
    """Return a weight in its stored precision; the plugin may convert it."""
    import openvino as ov
    from openvino import opset13 as op

    if isinstance(matrix, Packed):
        return _packed_matrix(matrix)
    node = op.constant(matrix, shared_memory=True)
    return node if matrix.dtype == np.float32 else op.convert(node, ov.Type.f32)


def _packed_matrix(matrix: Packed) -> Any:
    """Return a quantized weight in the pattern that the plugin computes with as it is.

    It reads a half or a quarter of the memory of float16. Numbers of 4 bits are without sign: OpenVINO's own
    compression of weights writes them so, as the plugin's products are faster then (nncf, pull request 2218).
    """
    import openvino as ov
    from openvino import opset13 as op

    if matrix.bits == 8:
        numbers = op.convert(op.constant(matrix.numbers, shared_memory=True), ov.Type.f16)
    else:
        shape = ov.Shape([len(matrix), matrix.columns // GROUP, GROUP])
        # A copy: a tensor over an array keeps none of it alive, and a joined one has no other owner.
        stored = op.constant(ov.Tensor(matrix.numbers, shape, ov.Type.u4), shared_memory=False)
        offset = op.constant(ov.Tensor(np.array([OFFSET], np.uint8), ov.Shape([1, 1, 1]), ov.Type.u4))
        numbers = op.subtract(op.convert(stored, ov.Type.f16), op.convert(offset, ov.Type.f16))
    scaled = op.multiply(numbers, op.constant(matrix.scales, shared_memory=True))
    whole = op.reshape(scaled, _ints([len(matrix), matrix.columns]), special_zero=False)
    return op.convert(whole, ov.Type.f32)


def _embed(matrix: Any, ids: Any) -> Any:
    """Return the rows of the embedding, float32 [*ids, hidden]; of a packed one only they are unpacked."""
    import openvino as ov
    from openvino import opset13 as op

    if not isinstance(matrix, Packed):
        return op.gather(_matrix(matrix), ids, _int(0))
    if matrix.bits == 4:
        return op.gather(_matrix(matrix.unpack().astype(np.float16)), ids, _int(0))
    numbers, scales = (
        op.convert(op.gather(op.constant(part, shared_memory=True), ids, _int(0)), ov.Type.f32)
        for part in (matrix.numbers, matrix.scales)
    )
    return op.reshape(op.multiply(numbers, scales), _ints([0, 0, matrix.columns]), special_zero=True)


def _scale(x: Any, factor: float) -> Any:
    from openvino import opset13 as op

    return x if factor == 1.0 else op.multiply(x, op.constant(np.full((1, 1, 1), factor, np.float32)))


def _linear(x: Any, block: dict[str, Any], name: str) -> Any:
    from openvino import opset13 as op

    product = op.matmul(x, _matrix(block[name]), False, True)
    bias = block.get(f"{name}.bias")
    return product if bias is None else op.add(product, _row(bias))


def _row(array: NDArray[Any]) -> Any:
    """Return a vector of numbers, one for each column of activations."""
    from openvino import opset13 as op

    return op.constant(array.astype(np.float32).reshape(1, 1, -1))


def _norm(x: Any, scale: NDArray[Any], shape: DecoderShape, axes: int = 3) -> Any:
    """Root-mean-square normalization (Zhang and Sennrich 2019), in the pattern that the plugin fuses."""
    from openvino import opset13 as op

    one = np.ones((1,) * axes, np.float32)
    square = op.power(x, op.constant(one * 2))
    mean = op.reduce_mean(square, _ints([-1]), keep_dims=True)
    root = op.sqrt(op.add(mean, op.constant(one * np.float32(shape.norm_epsilon))))
    scaled = op.multiply(op.divide(op.constant(one), root), x)
    return op.multiply(scaled, op.constant(scale.astype(np.float32).reshape(*one.shape[1:], -1)))


def _turn(
    positions: Any, rotation: Rotation, shape: DecoderShape, divisors: NDArray[Any] | None
) -> tuple[Any, Any]:
    """Return cosine and sine of the rotary embedding (Su et al. 2021), [tokens, 1, 1, head_dim]."""
    import openvino as ov
    from openvino import opset13 as op

    turns = rotation.base ** -(np.arange(0, shape.head_dim, 2, dtype=np.float64) / shape.head_dim)
    turns /= rotation.divisor if divisors is None else divisors
    row = op.convert(op.unsqueeze(op.unsqueeze(positions, _int(1)), _int(1)), ov.Type.f32)
    frequencies = op.constant(turns.astype(np.float32).reshape(1, -1, 1))
    count = op.gather(op.shape_of(positions), _ints([0]), _int(0))
    spread = op.broadcast(
        frequencies, op.concat([count, _ints([1]), _ints([1])], 0), broadcast_spec="BIDIRECTIONAL"
    )
    angles = op.transpose(op.matmul(spread, row, False, False), _ints([0, 2, 1]))
    both = op.concat([angles, angles], -1)
    return op.unsqueeze(op.cos(both), _int(1)), op.unsqueeze(op.sin(both), _int(1))


def _rotated(x: Any, turns: tuple[Any, Any], half: int) -> Any:
    from openvino import opset13 as op

    end, last = _ints([np.iinfo(np.int64).max]), _ints([3])
    second = op.slice(x, _ints([half]), end, _ints([1]), last)
    first = op.slice(x, _ints([0]), _ints([half]), _ints([1]), last)
    turned = op.concat([op.multiply(second, op.constant(np.full((1, 1, 1, 1), -1, np.float32))), first], -1)
    return op.add(op.multiply(x, turns[0]), op.multiply(turned, turns[1]))


def _split(x: Any, axis: int, lengths: list[int]) -> list[Any]:
    from openvino import opset13 as op

    outputs: list[Any] = op.variadic_split(x, _int(axis), _ints(lengths)).outputs()
    return outputs


def _attention(
    x: Any,
    block: dict[str, Any],
    shape: DecoderShape,
    turn: tuple[Any, Any] | None,
    paging: list[Any],
    longest: Any,
) -> Any:
    from openvino import opset13 as op

    heads, kv_heads, dim = shape.heads, shape.kv_heads, shape.head_dim

    def by_head(rows: Any, count: int) -> Any:
        return op.transpose(op.reshape(rows, _ints([0, 0, count, dim]), True), _ints([0, 2, 1, 3]))

    def flat(rows: Any) -> Any:
        return op.reshape(op.transpose(rows, _ints([0, 2, 1, 3])), _ints([0, -1]), True)

    # One product and one rotation for queries and keys: each node costs a few microseconds per step.
    if "attn_qkv" not in block:
        block = block | _join(block, ("attn_q", "attn_k", "attn_v"), "attn_qkv")
    turning, value = _split(_linear(x, block, "attn_qkv"), 2, [(heads + kv_heads) * dim, kv_heads * dim])
    by_heads = by_head(_norm_all_heads(turning, block, shape), heads + kv_heads)
    if "attn_q_norm" in block and len(block["attn_q_norm"]) == dim:
        parts = _split(by_heads, 1, [heads, kv_heads])
        norms = (block["attn_q_norm"], block["attn_k_norm"])
        by_heads = op.concat([_norm(p, n, shape, 4) for p, n in zip(parts, norms, strict=True)], 1)
    if turn is not None:
        by_heads = _rotated(by_heads, turn, dim // 2)
    query, key = _split(flat(by_heads), 1, [heads * dim, kv_heads * dim])
    mixed = _paged_attention([query, key, flat(by_head(value, kv_heads)), *paging], longest, shape)
    return _linear(op.reshape(mixed, _ints([-1, 1, heads * dim]), False), block, "attn_output")


def _norm_all_heads(x: Any, block: dict[str, Any], shape: DecoderShape) -> Any:
    """Return queries and keys, each normalized over all heads together where the weights are as wide."""
    from openvino import opset13 as op

    if "attn_q_norm" not in block or len(block["attn_q_norm"]) == shape.head_dim:
        return x
    norms = [block["attn_q_norm"], block["attn_k_norm"]]
    parts = _split(x, 2, [len(norm) for norm in norms])
    return op.concat([_norm(p, n, shape) for p, n in zip(parts, norms, strict=True)], 2)


def _join(block: dict[str, Any], names: Sequence[str], joined: str) -> dict[str, Any]:
    """Return one linear layer that computes several of the same input."""
    layer = {joined: concatenate([block[name] for name in names])}
    if any(f"{name}.bias" in block for name in names):
        zeros = (np.zeros(len(block[name]), np.float32) for name in names)
        biases = [block.get(f"{name}.bias", zero) for name, zero in zip(names, zeros, strict=True)]
        layer[f"{joined}.bias"] = np.concatenate(biases)
    return layer


def _paged_attention(inputs: list[Any], longest: Any, shape: DecoderShape) -> Any:
    """Return the plugin's attention; the inputs after `longest` are for features that are not used.

    The inputs are those of OpenVINO 2026.4, as in the result of its `paged_attention_transformation`.
    """
    from openvino import Node
    from openvino import opset13 as op
    from openvino._pyopenvino.op import _PagedAttentionExtension

    def empty(kind: type, shape: tuple[int, ...] = (0,)) -> Any:
        return op.constant(np.empty(shape, kind))

    def zero() -> Any:
        return op.constant(np.array(0, np.int32))

    i32, f32 = np.int32, np.float32
    # Unlike elsewhere, a node is not accepted in place of its output.
    inputs = [value.output(0) if isinstance(value, Node) else value for value in inputs]
    rest = [op.constant(np.array(shape.attention_scale, f32)), zero(), empty(f32), longest]
    rest += [empty(i32), empty(i32), empty(i32), empty(f32), empty(f32), zero(), zero()]
    rest += [empty(f32, (0, 0, 0, 0)), zero(), empty(i32), empty(i32), empty(i32), empty(i32)]
    rest += [empty(np.uint8), empty(i32)]
    node = _PagedAttentionExtension(inputs + [node.output(0) for node in rest])
    for kind in ("k", "v"):
        node.rt_info[f"num_{kind}_heads"] = shape.kv_heads
        node.rt_info[f"{kind}_head_size"] = shape.head_dim
    return node.output(0)


def _feed_forward(x: Any, block: dict[str, Any], shape: DecoderShape) -> Any:
    from openvino import opset13 as op

    up = _linear(x, block, "ffn_up")
    if "ffn_gate" in block:
        gate = _linear(x, block, "ffn_gate")
    else:  # one matrix has both
        gate, up = _split(up, 2, [len(block["ffn_up"]) // 2] * 2)
    active = op.gelu(gate, "tanh") if shape.gelu else op.swish(gate)
    return _linear(op.multiply(active, up), block, "ffn_down")
