"""A `Decoder` as a graph of OpenVINO's operators: stateful, as optimum-intel's, so that OpenVINO GenAI runs it and the
runtime rewrites it to paged attention. Parts of it are graphs of their own, by which weights in float32 are read one
layer at a time (`reading.py`).

The rewriting goes by patterns: how a cache, its mask and a sliding window look here is what it looks for.

Letters: B sequences, T tokens, P tokens before them, D hidden size, A heads, H key/value heads, E head size, V
vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol

import numpy as np
import openvino as ov
from numpy.typing import NDArray
from openvino import opset13 as op
from openvino.op.util import Variable, VariableInfo

from dovetail.export.target.native.decoder import Decoder
from dovetail.export.target.native.rotary import Rotary
from dovetail.export.target.native.tensor_names import EMBEDDING, HEAD, PROJECTION
from dovetail.runtime.artifact.manifest import FEATURES_OUTPUT, LONG_POSITIONS

LOWEST = -65504.0  # float16's: what a hidden position is scored with
Role = Literal["embedding", "head", "attention", "output", "gate_up", "down", "projection"]
"""What a matrix does in the decoder: how sensitive it is to rounding depends on it."""
Mask = Any
Angles = tuple[Any, Any]
KeyValue = Callable[[int, Any, Any], tuple[Any, Any]]
"""Layer, new keys, new values [B, H, T, E] -> all keys and values that it attends to [B, H, P + T, E]."""


class Weights(Protocol):
    """Where the numbers come from, and how they are stored."""

    def table(self, name: str, role: Role) -> Any:
        """A matrix [V, D] whose rows are looked up, or that a LM head multiplies with."""
        ...

    def products(self, y: Any, names: Sequence[str], role: Role) -> list[tuple[int, Any]]:
        """y [B, T, I] times the transposed matrices `names` [O, I], those that are stored alike in one product: how
        many of them, and their outputs side by side.
        """
        ...

    def vector(self, name: str) -> NDArray[np.float32]:
        """A norm's weights or a bias."""
        ...


def integers(*values: int) -> Any:
    """A stored list of numbers."""
    return op.constant(np.array(values, np.int64))


def _index(value: int) -> Any:
    return op.constant(np.array(value, np.int64))


def _numbers(values: Any) -> Any:
    return op.constant(np.array(values, np.float32))


class Parts:
    """The parts of a decoder's graph, over its weights."""

    def __init__(self, decoder: Decoder, weights: Weights) -> None:
        self._decoder, self._weights = decoder, weights
        self._embedding: Any = None

    def embedding(self, ids: Any) -> Any:
        """ids [B, T] -> x [B, T, D]."""
        table = self._table()
        x = op.gather(table, op.convert(ids, "i32"), _index(0))
        return self._scaled(x, self._decoder.embedding_scale)

    def angles(self, rotary: Rotary, positions: Any) -> Angles:
        """Cosine and sine [B, 1, T, E] at `positions` [B, T], E the rotated part of a head."""
        if rotary.long_frequencies is None or rotary.border is None:
            half = self._turned(rotary.frequencies, positions)
        else:
            is_long, positions = self._beyond(rotary.border, positions)
            parts = (self._turned(f, positions) for f in (rotary.long_frequencies, rotary.frequencies))
            half = op.select(op.unsqueeze(is_long, _index(2)), *parts)
        whole = op.concat([half, half], -1)
        cosine, sine = (self._scaled(f(whole), rotary.scale) for f in (op.cos, op.sin))
        return op.unsqueeze(cosine, _index(1)), op.unsqueeze(sine, _index(1))

    def _turned(self, frequencies: Sequence[float], positions: Any) -> Any:
        """Angles [B, T, E / 2]."""
        rows = op.constant(np.array(frequencies, np.float32).reshape(1, -1, 1))
        columns = op.unsqueeze(op.convert(positions, "f32"), _index(1))  # [B, 1, T]
        return op.transpose(op.matmul(rows, columns, False, False), integers(0, 2, 1))

    def _beyond(self, border: int, positions: Any) -> tuple[Any, Any]:
        """Which rows [B, T] are of texts longer than `border`, and their positions. The runtime says so, by
        `LONG_POSITIONS` on top of them, and keeps both kinds apart in one pass. Where nobody does (OpenVINO GenAI), a
        position beyond the border makes all rows such, as in transformers.
        """
        mark = _index(LONG_POSITIONS)
        is_marked = op.greater_equal(positions, mark)
        farthest = op.reduce_max(op.select(is_marked, _index(0), positions), integers(0, 1), False)
        is_long = op.logical_or(is_marked, op.greater_equal(farthest, _index(border)))
        return is_long, op.select(is_marked, op.subtract(positions, mark), positions)

    def layer(self, number: int, x: Any, angles: Angles | None, mask: Mask, cache: KeyValue) -> Any:
        """x [B, T, D] -> x [B, T, D] behind layer `number`, whose attention hides what `mask` does."""
        decoder, name = self._decoder, f"model.layers.{number}."
        y = self._normed(x, name + "input_layernorm", decoder.pre_norms)
        attended = self._attention(number, y, angles, mask, cache)
        x = self._added(x, self._normed(attended, name + "post_attention_layernorm", decoder.post_norms))
        before = "pre_feedforward_layernorm" if decoder.pre_norms and decoder.post_norms else "post_attention_layernorm"
        read = self._feed_forward(name + "mlp.", self._normed(x, name + before, decoder.pre_norms))
        return self._added(x, self._normed(read, name + "post_feedforward_layernorm", decoder.post_norms))

    def final_norm(self, x: Any) -> Any:
        """What the LM head reads [B, T, D]."""
        return self._normed(x, "model.norm", True)

    def logits(self, x: Any) -> Any:
        """What the LM head makes of the normed x [B, T, D]: [B, T, V]."""
        decoder = self._decoder
        head = self._table() if decoder.tied else self._weights.table(HEAD, "head")
        y = self._scaled(op.matmul(x, head, False, True), 1 / decoder.logits_divisor)
        if decoder.logits_cap is None:
            return y
        cap = _numbers(decoder.logits_cap)
        return op.multiply(op.tanh(op.divide(y, cap)), cap)

    def _table(self) -> Any:
        if self._embedding is None:
            self._embedding = self._weights.table(EMBEDDING, "embedding")
        return self._embedding

    def _attention(self, number: int, y: Any, angles: Angles | None, mask: Mask, cache: KeyValue) -> Any:
        decoder, name = self._decoder, f"model.layers.{number}.self_attn."
        heads, kv_heads, size = decoder.num_heads, decoder.num_kv_heads, decoder.head_dim
        parts = ["qkv_proj"] if decoder.joined_weights else ["q_proj", "k_proj", "v_proj"]
        sizes = [heads * size, kv_heads * size, kv_heads * size]
        queries, keys, values = self._linear(y, [name + part for part in parts], sizes, "attention", decoder.qkv_bias)
        q = self._heads(queries, heads, name + "q_norm")
        k = self._heads(keys, kv_heads, name + "k_norm")
        v = self._heads(values, kv_heads, None)
        if angles is not None:
            q, k = (self._rotated(t, angles) for t in (q, k))
        k, v = (self._repeated(t) for t in cache(number, k, v))
        scale = _numbers(decoder.attention_scale)
        attended = op.scaled_dot_product_attention(q, k, v, mask, scale)  # [B, A, T, E]
        side_by_side = op.reshape(op.transpose(attended, integers(0, 2, 1, 3)), integers(0, 0, heads * size), True)
        return self._linear(side_by_side, [name + "o_proj"], [decoder.hidden_size], "output", decoder.output_bias)[0]

    def _heads(self, y: Any, count: int, norm: str | None) -> Any:
        """[B, T, count * E] -> [B, count, T, E], normed where the family does so."""
        if norm is not None and self._decoder.head_norms == "all":
            y = self._normed(y, norm, True)
        apart = op.reshape(y, integers(0, 0, count, self._decoder.head_dim), True)
        if norm is not None and self._decoder.head_norms == "each":
            apart = self._normed(apart, norm, True)
        return op.transpose(apart, integers(0, 2, 1, 3))

    def _rotated(self, t: Any, angles: Angles) -> Any:
        """Llama's half-split layout; the rest of a head that is rotated in part stands still."""
        size = angles[0].get_output_partial_shape(0)[3].get_length()
        kept = None
        if size < self._decoder.head_dim:
            both = op.variadic_split(t, _index(-1), integers(size, self._decoder.head_dim - size))
            t, kept = both.output(0), both.output(1)
        first, second = (_slice(t, start, stop) for start, stop in ((0, size // 2), (size // 2, size)))
        turned = op.concat([op.multiply(second, _numbers(-1.0)), first], -1)
        rotated = op.add(op.multiply(t, angles[0]), op.multiply(turned, angles[1]))
        return rotated if kept is None else op.concat([rotated, kept], -1)

    def _repeated(self, t: Any) -> Any:
        """[B, H, N, E] -> [B, A, N, E]: each key/value head serves several heads."""
        heads, kv_heads, size = self._decoder.num_heads, self._decoder.num_kv_heads, self._decoder.head_dim
        if heads == kv_heads:
            return t
        shape = op.shape_of(t)
        before, behind = (op.gather(shape, integers(*places), _index(0)) for places in ((0, 1), (2, 3)))
        wanted = op.concat([before, integers(heads // kv_heads), behind], 0)
        copies = op.broadcast(op.unsqueeze(t, _index(2)), wanted, "BIDIRECTIONAL")
        return op.reshape(copies, integers(0, heads, -1, size), True)

    def _feed_forward(self, name: str, y: Any) -> Any:
        decoder = self._decoder
        parts = ["gate_up_proj"] if decoder.joined_weights else ["gate_proj", "up_proj"]
        sizes = [decoder.intermediate_size] * 2
        gate, up = self._linear(y, [name + part for part in parts], sizes, "gate_up", decoder.mlp_bias)
        if decoder.activation == "silu":
            active = op.swish(gate)
        else:
            active = op.gelu(gate, "erf" if decoder.activation == "gelu" else "tanh")
        read = op.multiply(active, up)
        return self._linear(read, [name + "down_proj"], [decoder.hidden_size], "down", decoder.mlp_bias)[0]

    def _linear(self, y: Any, names: Sequence[str], sizes: Sequence[int], role: Role, bias: bool) -> list[Any]:
        """y times the matrices `names`, which make `sizes` outputs, plus their biases: a value for each size."""
        values, at = list[Any](), 0
        for count, unbiased in self._weights.products(y, [f"{name}.weight" for name in names], role):
            own = [self._weights.vector(f"{name}.bias") for name in names[at : at + count] if bias]
            product = op.add(unbiased, op.constant(np.concatenate(own).reshape(1, 1, -1))) if own else unbiased
            parts = list(sizes[at : at + count]) if len(names) == len(sizes) else list(sizes)
            at += count
            if len(parts) == 1:
                values.append(product)
            else:
                split = op.variadic_split(product, _index(-1), integers(*parts))
                values += [split.output(i) for i in range(len(parts))]
        return values

    def _normed(self, x: Any, name: str, is_there: bool) -> Any:
        """RMSNorm over the last axis, computed as the rewriting and the fusion expect it."""
        if not is_there:
            return x
        weight = self._weights.vector(f"{name}.weight") + np.float32(self._decoder.norm_offset)
        mean = op.reduce_mean(op.power(x, _numbers(2.0)), integers(-1), True)
        root = op.sqrt(op.add(mean, _numbers(self._decoder.rms_norm_eps)))
        return op.multiply(op.multiply(x, op.divide(_numbers(1.0), root)), op.constant(weight))

    def _added(self, x: Any, y: Any) -> Any:
        return op.add(x, self._scaled(y, self._decoder.residual_scale))

    def _scaled(self, x: Any, factor: float) -> Any:
        return x if factor == 1 else op.multiply(x, _numbers(factor))


def _slice(t: Any, start: int, stop: int) -> Any:
    return op.slice(t, integers(start), integers(stop), integers(1), integers(3))


def build(decoder: Decoder, weights: Weights, feature_layers: Sequence[int] = ()) -> ov.Model:
    """The whole decoder, with the results `logits` and `hidden_states`: what the LM head reads, or with
    `feature_layers` the inputs of these side by side times the matrix `PROJECTION` (EAGLE-3's `fc`), so that D numbers
    a token cross to the draft, not one set a layer. The node `layers.N.input` is what layer N reads.
    """
    inputs = [
        _parameter("input_ids", [-1, -1], np.int64),
        _parameter("attention_mask", [-1, -1], np.int64),
        _parameter("position_ids", [-1, -1], np.int64),
        _parameter("beam_idx", [-1], np.int32),
    ]
    ids, padding, positions, beams = inputs
    parts, caches = Parts(decoder, weights), _Caches(decoder, ids, beams)
    x = parts.embedding(ids)
    angles = {
        rotary: parts.angles(rotary, positions) for rotary in {layer.rotary for layer in decoder.layers} if rotary
    }
    masks, streams = dict[int | None, Mask](), list[Any]()
    for number, layer in enumerate(decoder.layers):
        if layer.window not in masks:
            masks[layer.window] = caches.mask(ids, padding, layer.window)
        x.set_friendly_name(f"layers.{number}.input")
        streams.append(x)
        x = parts.layer(
            number, x, None if layer.rotary is None else angles[layer.rotary], masks[layer.window], caches.extended
        )
    features = parts.final_norm(x)
    logits = _result("logits", parts.logits(features))
    if feature_layers:
        side_by_side = op.concat([streams[number] for number in feature_layers], -1)
        features = weights.products(side_by_side, [PROJECTION], "projection")[0][1]
    results = [logits, _result(FEATURES_OUTPUT, features)]
    return ov.Model(results, caches.assigned, inputs, "decoder")


class _Caches:
    """Keys and values of each layer as state, and the masks over them."""

    def __init__(self, decoder: Decoder, ids: Any, beams: Any) -> None:
        self._kv_heads, self._size, self._beams = decoder.num_kv_heads, decoder.head_dim, beams
        batch = op.gather(op.shape_of(ids), integers(0), _index(0))
        self._empty = op.concat([batch, integers(self._kv_heads), integers(0), integers(self._size)], 0)
        self._first: Any = None  # of the states: how long they are is known by it
        self.assigned: list[Any] = []
        self._begin(0)

    def _begin(self, number: int) -> None:
        self._past = [self._state(number, kind) for kind in ("key", "value")]
        if self._first is None:
            self._first = self._past[0][0]

    def _state(self, number: int, kind: str) -> tuple[Any, Any]:
        info = VariableInfo()
        info.data_shape = ov.PartialShape([-1, self._kv_heads, -1, self._size])
        info.data_type = ov.Type.f32
        info.variable_id = f"past_key_values.{number}.{kind}present.{number}.{kind}"
        variable = Variable(info)
        read = ov.opset6.read_value(op.broadcast(_numbers(0.0), self._empty), variable)
        return op.gather(read, self._beams, _index(0)), variable

    def extended(self, number: int, keys: Any, values: Any) -> tuple[Any, Any]:
        """A `KeyValue`."""
        if number > 0:
            self._begin(number)
        whole = []
        for (past, variable), new in zip(self._past, (keys, values), strict=True):
            whole.append(op.concat([past, new], 2))
            self.assigned.append(op.assign(whole[-1], variable))
        return whole[0], whole[1]

    def mask(self, ids: Any, padding: Any, window: int | None) -> Mask:
        """[B, 1, T, P + T], to be added to scores: causal, within `window`, without the padded."""
        past = op.gather(op.shape_of(self._first), _index(2), _index(0))
        total = op.add(past, op.gather(op.shape_of(ids), _index(1), _index(0)))
        columns = _leading(op.range(_index(0), total, _index(1), "i64"), 0, 1, 2)  # [1, 1, 1, P + T]
        rows = _leading(op.range(past, total, _index(1), "i64"), 0, 1, 3)  # [1, 1, T, 1]
        seen = op.less_equal(columns, rows)
        if window is not None:
            near = op.greater(columns, op.add(rows, op.constant(np.full((1, 1, 1, 1), -window, np.int64))))
            seen = op.bitwise_and(op.bitwise_and(op.constant(np.array(True)), near), seen)
        real = _leading(op.convert(padding, "boolean"), 1, 2)  # [B, 1, 1, P + T]
        visible = op.bitwise_and(op.bitwise_and(op.constant(np.array(True)), seen), real)
        length, batch = (op.gather(op.shape_of(ids), integers(axis), _index(0)) for axis in (1, 0))
        shape = op.concat([batch, integers(1), length, op.unsqueeze(total, _index(0))], 0)
        return op.select(op.broadcast(visible, shape, "BIDIRECTIONAL"), _numbers(0.0), _numbers(LOWEST))


def _leading(value: Any, *axes: int) -> Any:
    for axis in axes:
        value = op.unsqueeze(value, _index(axis))
    return value


def _parameter(name: str, shape: list[int], kind: type[np.signedinteger[Any]]) -> Any:
    """Its friendly name counts, too: the rewriting goes by it."""
    parameter = op.parameter(shape, kind)
    parameter.set_friendly_name(name)
    parameter.output(0).get_tensor().set_names({name})
    return parameter


def _result(name: str, value: Any) -> Any:
    value.output(0).get_tensor().set_names({name})
    return op.result(value, name=name)
