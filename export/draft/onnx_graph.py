"""The draft as an ONNX graph (opset 23, standard operators): what the runtime calls once per level of a tree.

inputs   input_ids int64 [T] · position_ids int64 [T]
         features float16 [F, D] · feature_rows int64 [T]: pair t reads features[feature_rows[t]], so that features
         which the last call left on the device need not leave it
         tree_mask bool [T, M]: which of the last M cache rows a pair may attend to; all rows before them it may
         cache_rows int64 [T]: where this call's keys and values go
         logit_rows int64 [R] · num_children int64 [1]: K, at most what the manifest calls top_k
         key_cache.i, value_cache.i float32 [C, H * E] for each block i: the rows in use, this call's included
outputs  top_token_ids int32 [R, K] · top_log_probs float32 [R, K] descending · hidden_states float16 [R, D]
         ids are the target's; log-probabilities are over the tokens that the draft's LM head has
         new_key_cache.i, new_value_cache.i: the caches with this call's rows; bound to the inputs' memory they are
         written in place

A draft of kind `lm` has no `features`, `feature_rows` and `hidden_states`.

Letters: T pairs in a call, F feature rows, C cache rows, M cache rows under the mask, R rows wanted, K children, D
hidden size, H key/value heads, E head size, V vocabulary.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto

from dovetail.export.draft.config import DraftConfig
from dovetail.export.draft.graph_builder import OPSET, GraphBuilder, Value, WeightFormat
from dovetail.export.draft.kinds import KINDS
from dovetail.export.draft.shapes import num_parameters
from dovetail.export.draft.weights import DraftWeights, Tensors
from dovetail.export.sources.tensors import Matrix
from dovetail.runtime.artifact.manifest import DraftInfo
from dovetail.runtime.drafts.graph_contract import cache_names

TOP_K = 64  # children that a row can be asked for: a tree takes the first few, a sampled text's draw may be any of them
FLOAT16_MAX = float(np.finfo(np.float16).max)


def export_draft(draft: DraftWeights, path: Path, *, weight_format: WeightFormat = "int8") -> DraftInfo:
    """Write the draft's graph to `path`; weights over 1.5 GB go to `path.data` beside it."""
    config, graph, info = draft.config, GraphBuilder(weight_format), draft_info(draft, weight_format)
    width, fed = config.num_kv_heads * config.head_dim, info.reads_features
    ids = graph.input("input_ids", TensorProto.INT64, ["T"])
    h = None
    if fed:
        features = graph.input("features", TensorProto.FLOAT16, ["F", config.hidden_size])
        feature_rows = graph.input("feature_rows", TensorProto.INT64, ["T"])
        h = graph.op("Cast", graph.op("Gather", features, feature_rows, axis=0), to=TensorProto.FLOAT)
    positions = graph.input("position_ids", TensorProto.INT64, ["T"])
    tree_mask = graph.input("tree_mask", TensorProto.BOOL, ["T", "M"])
    cache_rows = graph.input("cache_rows", TensorProto.INT64, ["T"])
    logit_rows = graph.input("logit_rows", TensorProto.INT64, ["R"])
    num_children = graph.input("num_children", TensorProto.INT64, [1])
    caches = [graph.input(name, TensorProto.FLOAT, ["C", width]) for name in cache_names(info)]

    x, read = KINDS[config.kind].write_fusion(graph, draft, h, graph.embedding(ids, draft.embedding))
    x = graph.op("Unsqueeze", x, graph.integers(0))  # [1, T, D]
    read = None if read is None else graph.op("Unsqueeze", read, graph.integers(0))
    mask = _whole_mask(graph, tree_mask, caches[0])
    slots = graph.op("Unsqueeze", cache_rows, graph.integers(1))  # [T, 1]
    angles = graph.rotary_angles(positions, config.rope_frequencies, config.rope_scale)
    for i in range(config.num_layers):
        weights = draft.part(f"blocks.{i}.")
        x = _block(graph, config, weights, x, read, angles, mask, slots, caches[2 * i : 2 * i + 2])
        read = None

    rows = graph.op("Gather", graph.op("Squeeze", x, graph.integers(0)), logit_rows, axis=0)  # [R, D]
    normed = _normed(graph, config, draft.tensors.get("output_norm.weight"), rows)
    logits = graph.linear(normed, draft.lm_head)  # [R, V]
    log_probs = graph.op("LogSoftmax", logits, axis=-1)
    best, best_ids = graph.ops("TopK", 2, log_probs, num_children, axis=-1)
    if draft.head_tokens is not None:
        best_ids = graph.op("Gather", graph.constant(draft.head_tokens), best_ids, axis=0)
    graph.output(graph.op("Cast", best_ids, to=TensorProto.INT32), "top_token_ids", TensorProto.INT32, ["R", "K"])
    graph.output(best, "top_log_probs", TensorProto.FLOAT, ["R", "K"])
    if fed:
        # Fed its own features again and again, a draft may leave float16's range on a text unlike those it has seen.
        limits = (graph.constant(np.array(limit, np.float32)) for limit in (-FLOAT16_MAX, FLOAT16_MAX))
        features_out = graph.op("Cast", graph.op("Clip", rows, *limits), to=TensorProto.FLOAT16)
        graph.output(features_out, "hidden_states", TensorProto.FLOAT16, ["R", config.hidden_size])
    for name in cache_names(info):
        graph.declare_output(f"new_{name}", TensorProto.FLOAT, ["C", width])
    graph.save(path)
    check_graph(path, info)
    return info


def draft_info(draft: DraftWeights, weight_format: WeightFormat = "float32") -> DraftInfo:
    """What the runtime must know of the draft's graph with such weights."""
    config = draft.config
    return DraftInfo(
        kind=config.kind,
        hidden_size=config.hidden_size,
        vocab_size=config.vocab_size,
        num_layers=config.num_layers,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        top_k=min(TOP_K, len(draft.lm_head)),
        parameters=num_parameters(draft),
        precision=weight_format,
        head_size=None if draft.head_tokens is None else len(draft.head_tokens),
    )


def _whole_mask(graph: GraphBuilder, tree_mask: Value, cache: Value) -> Value:
    """[T, C]: true for all rows before the tree's, the tree's mask behind them."""
    pairs, under = (graph.op("Shape", tree_mask, start=axis, end=axis + 1) for axis in (0, 1))
    before = graph.op("Sub", graph.op("Shape", cache, start=0, end=1), under)
    seen = graph.op("Expand", graph.constant(np.array([[True]])), graph.op("Concat", pairs, before, axis=0))
    return graph.op("Concat", seen, tree_mask, axis=1)


def _normed(graph: GraphBuilder, config: DraftConfig, weight: Matrix | None, x: Value) -> Value:
    """`x` normed where there is a norm."""
    return x if weight is None else graph.rms_norm(x, weight, config.rms_norm_eps)


def _block(
    graph: GraphBuilder,
    config: DraftConfig,
    weights: Tensors,
    x: Value,
    read: Value | None,
    angles: tuple[Value, Value],
    mask: Value,
    slots: Value,
    caches: list[Value],
) -> Value:
    """A block on `x` [1, T, D], whose attention reads `read` (None: the normed x). Its rows go into `caches` at
    `slots`.
    """
    # In 4 bits the demo draft's blocks would lose a seventh of its first choices, head and fusion a seventieth.
    linear = functools.partial(graph.linear, sensitive=True)
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    y = _normed(graph, config, weights.get("input_norm.weight"), x) if read is None else read
    bias = np.concatenate([weights[f"{part}_proj.bias"] for part in "qkv"]) if config.qkv_bias else None
    y = linear(y, *(weights[f"{part}_proj.weight"] for part in "qkv"), bias=bias)
    q, k, v = graph.split(y, queries, keys, keys)
    q = _normed_heads(graph, config, weights.get("q_norm.weight"), q, config.num_heads)
    k = _normed_heads(graph, config, weights.get("k_norm.weight"), k, config.num_kv_heads)
    k = graph.rotate(k, angles, config.num_kv_heads)
    cached = []
    for cache, new in zip(caches, (k, v), strict=True):
        row = graph.op("Squeeze", new, graph.integers(0))
        whole = graph.named_op("ScatterND", f"new_{cache}", cache, slots, row)
        cached.append(graph.op("Unsqueeze", whole, graph.integers(0)))
    heads = {"q_num_heads": config.num_heads, "kv_num_heads": config.num_kv_heads}
    attended = graph.op("Attention", graph.rotate(q, angles, config.num_heads), *cached, mask, **heads)
    x = graph.op("Add", x, linear(attended, weights["o_proj.weight"]))
    y = graph.rms_norm(x, weights["mlp_norm.weight"], config.rms_norm_eps)
    y = linear(y, weights["gate_proj.weight"], weights["up_proj.weight"])
    gate, up = graph.split(y, config.intermediate_size, config.intermediate_size)
    return graph.op("Add", x, linear(graph.op("Mul", graph.silu(gate), up), weights["down_proj.weight"]))


def _normed_heads(graph: GraphBuilder, config: DraftConfig, weight: Matrix | None, x: Value, num_heads: int) -> Value:
    """`x` [1, T, heads * E] with every head normed on its own, where the kind of block does so."""
    if weight is None:
        return x
    heads = graph.op("Reshape", x, graph.integers(1, -1, num_heads, config.head_dim))
    normed = graph.rms_norm(heads, weight, config.rms_norm_eps)
    return graph.op("Reshape", normed, graph.integers(1, -1, num_heads * config.head_dim))


def check_graph(path: Path, info: DraftInfo) -> None:
    """Assert the contract: opset, standard operators only, names in order."""
    model = onnx.load(path, load_external_data=False)
    assert [(o.domain, o.version) for o in model.opset_import] == [("", OPSET)], f"opsets {model.opset_import}"
    assert not model.functions, f"functions {[f.name for f in model.functions]}"
    assert {node.domain for node in model.graph.node} <= {""}, "operators beyond the standard"
    caches, fed = cache_names(info), info.reads_features
    pairs = ["input_ids", *(["features", "feature_rows"] if fed else [])]
    pairs += ["position_ids", "tree_mask", "cache_rows", "logit_rows", "num_children"]
    answers = ["top_token_ids", "top_log_probs", *(["hidden_states"] if fed else [])]
    assert [i.name for i in model.graph.input] == pairs + caches, [i.name for i in model.graph.input]
    assert [o.name for o in model.graph.output] == answers + [f"new_{name}" for name in caches]


def example_call(info: DraftInfo, length: int, past: int, seed: int = 0) -> dict[str, NDArray[Any]]:
    """Random inputs of a causal call: `length` pairs behind `past` cached ones, every second row wanted, and as many
    children as there may be.
    """
    rng = np.random.default_rng(seed)
    call: dict[str, NDArray[Any]] = {
        "input_ids": rng.integers(0, info.vocab_size, length),
        "position_ids": np.arange(past, past + length),
        "tree_mask": np.tri(length, dtype=np.bool_),
        "cache_rows": np.arange(past, past + length),
        "logit_rows": np.arange(length - 1, -1, -2)[::-1].copy(),
        "num_children": np.array([info.top_k]),
    }
    if info.reads_features:
        features = rng.standard_normal((length, info.hidden_size)).astype(np.float16)
        call |= {"features": features, "feature_rows": np.arange(length)}
    for name in cache_names(info):
        call[name] = rng.standard_normal((past + length, info.num_kv_heads * info.head_dim), dtype=np.float32)
    return call
