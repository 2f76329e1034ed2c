"""A Llama as an OpenVINO graph over paged keys and values.

The tokens of a step are one row, sequence after sequence; attention finds the past of each sequence in the
blocks of one pool (PagedAttention, Kwon et al. 2023). The graph is built by hand instead of converted, so
that logits are computed only where needed, and only numpy and the runtime are required.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from services.engines.paged.weights import LlamaShape, Weights

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
    embedding = _matrix(tensors["token_embd.weight"])
    # [tokens, 1, hidden]: the plugin's fusions know activations with three axes.
    x = op.gather(embedding, op.unsqueeze(ids, _int(1)), _int(0))
    turns = _rotations(positions, shape)
    for layer in range(shape.layers):
        cache = [_parameter(f"{kind}_cache.{layer}", [-1, -1, -1, -1], None) for kind in ("key", "value")]
        caches += cache
        block = {
            name.removeprefix(f"blk.{layer}.").removesuffix(".weight"): array
            for name, array in tensors.items()
            if name.startswith(f"blk.{layer}.")
        }
        normed = _norm(x, block["attn_norm"], shape)
        x = op.add(x, _attention(normed, block, shape, turns, [*cache, *paging], longest))
        x = op.add(x, _feed_forward(_norm(x, block["ffn_norm"], shape), block))
    states = op.gather(_norm(x, tensors["output_norm.weight"], shape), wanted, _int(0))
    head = _matrix(tensors["output.weight"]) if "output.weight" in tensors else embedding
    logits = op.matmul(states, head, transpose_a=False, transpose_b=True)
    out = op.result(logits)  # directly: the plugin would round anything in between to bfloat16
    out.output(0).set_names({"logits"})
    hidden = op.result(states)
    hidden.output(0).set_names({"hidden"})
    return ov.Model([out, hidden], [ids, positions, *paging, longest, wanted, *caches], "paged llama")


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


def _matrix(array: NDArray[Any]) -> Any:
    """Return a weight in its stored precision; the plugin may convert it."""
    import openvino as ov
    from openvino import opset13 as op

    node = op.constant(array, shared_memory=True)
    return node if array.dtype == np.float32 else op.convert(node, ov.Type.f32)


def _norm(x: Any, scale: NDArray[Any], shape: LlamaShape) -> Any:
    """Root-mean-square normalization (Zhang and Sennrich 2019), in the pattern that the plugin fuses."""
    from openvino import opset13 as op

    one = np.ones((1, 1, 1), np.float32)
    square = op.power(x, op.constant(one * 2))
    mean = op.reduce_mean(square, _ints([-1]), keep_dims=True)
    root = op.sqrt(op.add(mean, op.constant(one * np.float32(shape.norm_epsilon))))
    scaled = op.multiply(op.divide(op.constant(one), root), x)
    return op.multiply(scaled, op.constant(scale.astype(np.float32).reshape(1, 1, -1)))


def _rotations(positions: Any, shape: LlamaShape) -> tuple[Any, Any]:
    """Return cosine and sine of the rotary embedding (Su et al. 2021), [tokens, 1, 1, head_dim]."""
    import openvino as ov
    from openvino import opset13 as op

    turns = shape.rope_base ** -(np.arange(0, shape.head_dim, 2, dtype=np.float64) / shape.head_dim)
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
    block: dict[str, NDArray[Any]],
    shape: LlamaShape,
    turns: tuple[Any, Any],
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
    product = _matrix(np.concatenate([block["attn_q"], block["attn_k"], block["attn_v"]]))
    turning, value = _split(op.matmul(x, product, False, True), 2, [(heads + kv_heads) * dim, kv_heads * dim])
    turned = flat(_rotated(by_head(turning, heads + kv_heads), turns, dim // 2))
    query, key = _split(turned, 1, [heads * dim, kv_heads * dim])
    mixed = _paged_attention([query, key, flat(by_head(value, kv_heads)), *paging], longest, shape)
    return op.matmul(
        op.reshape(mixed, _ints([-1, 1, heads * dim]), False), _matrix(block["attn_output"]), False, True
    )


def _paged_attention(inputs: list[Any], longest: Any, shape: LlamaShape) -> Any:
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
    rest = [op.constant(np.array(shape.head_dim**-0.5, f32)), zero(), empty(f32), longest]
    rest += [empty(i32), empty(i32), empty(i32), empty(f32), empty(f32), zero(), zero()]
    rest += [empty(f32, (0, 0, 0, 0)), zero(), empty(i32), empty(i32), empty(i32), empty(i32)]
    rest += [empty(np.uint8), empty(i32)]
    node = _PagedAttentionExtension(inputs + [node.output(0) for node in rest])
    for kind in ("k", "v"):
        node.rt_info[f"num_{kind}_heads"] = shape.kv_heads
        node.rt_info[f"{kind}_head_size"] = shape.head_dim
    return node.output(0)


def _feed_forward(x: Any, block: dict[str, NDArray[Any]]) -> Any:
    from openvino import opset13 as op

    gate = op.swish(op.matmul(x, _matrix(block["ffn_gate"]), False, True))
    up = op.matmul(x, _matrix(block["ffn_up"]), False, True)
    return op.matmul(op.multiply(gate, up), _matrix(block["ffn_down"]), False, True)
