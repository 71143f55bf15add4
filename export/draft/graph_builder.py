"""Building ONNX graphs of a transformer's parts: standard operators, named weights, linear layers of 4, 8 or 16 bits.

Activations are float32. Weights of 4 and 8 bits are the standard's blockwise `DequantizeLinear` in front of a `MatMul`,
which ONNX Runtime fuses to a product of small integers (see `runtime/drafts/onnxruntime_graph.py`) and OpenVINO to a
compressed layer; any other engine computes the same from the same file. `int4` means 4 bits where they do little harm:
embeddings and sensitive layers keep 8. 16-bit weights are cast to float32, once, when the graph is loaded.
Attention, rotary embedding and norms are the standard's own operators: an engine has kernels for them or takes them
apart.

Letters: T rows, C cache rows, I inputs and O outputs of a layer, A heads, H key/value heads, E head size.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import ml_dtypes
import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from dovetail.export.sources.tensors import Matrix

OPSET = 23
IR_VERSION = 10  # the oldest that opset 23 may have: the CUDA 12 line of ONNX Runtime reads it, too
# Weights that share a scale: the first that divides a layer's inputs.
BLOCK_SIZES = {"int8": (128, 64, 32, 16), "int4": (32, 16)}
_FOUR_BIT_STEPS = (-8.0, -7.6, -7.2, -6.8, 7.0, 7.4, 7.8)  # what a block's largest weight may become before rounding
MAX_INLINE_BYTES = 1_500_000_000  # one protobuf file ends at 2 GB

WeightFormat = Literal["int8", "int4", "float16", "float32"]
Value = str
"""The name of a tensor in the graph."""


def quantize_blocks(
    weight: NDArray[np.float32], weight_format: Literal["int8", "int4"] = "int8"
) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """`weight` [I, O] as whole numbers [I, O] (-8 to 7 for int4) and scales [blocks, O], rounded to nearest. Blocks are
    equally long: OpenVINO reads no others.
    """
    inputs, outputs = weight.shape
    size = next((size for size in BLOCK_SIZES[weight_format] if inputs % size == 0), inputs)
    blocked = weight.reshape(-1, size, outputs)
    scales = np.abs(blocked).max(axis=1) / 127 if weight_format == "int8" else _four_bit_scales(blocked)
    scales[scales == 0] = 1
    low, high = (-127, 127) if weight_format == "int8" else (-8, 7)
    codes = np.rint(blocked / scales[:, None]).clip(low, high)
    return codes.astype(np.int8).reshape(inputs, outputs), scales


def _four_bit_scales(blocked: NDArray[np.float32]) -> NDArray[np.float32]:
    """Of [blocks, size, O], the scales [blocks, O] with the least squared error of a few that bring each block's
    largest weight near one end of the range.
    """
    peak = np.take_along_axis(blocked, np.abs(blocked).argmax(axis=1)[:, None], axis=1)[:, 0]  # [blocks, O], signed
    best, least = np.ones_like(peak), np.full_like(peak, np.inf)
    for step in _FOUR_BIT_STEPS:
        scales = np.where(peak == 0, 1, peak / np.float32(step))
        error = np.square(np.rint(blocked / scales[:, None]).clip(-8, 7) * scales[:, None] - blocked).sum(axis=1)
        best, least = np.where(error < least, scales, best), np.minimum(error, least)
    return best


class GraphBuilder:
    """Collects nodes and weights; `save` checks and writes the model."""

    def __init__(self, weight_format: WeightFormat) -> None:
        self._format = weight_format
        self._nodes: list[onnx.NodeProto] = []
        self._weights: list[onnx.TensorProto] = []
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []

    def input(self, name: str, dtype: int, shape: list[str | int]) -> Value:
        """Declare an input; dimensions with names are free."""
        self._inputs.append(helper.make_tensor_value_info(name, dtype, shape))
        return name

    def output(self, value: Value, name: str, dtype: int, shape: list[str | int]) -> None:
        """Declare `value` as the output `name`."""
        self.declare_output(self.named_op("Identity", name, value), dtype, shape)

    def op(self, kind: str, *inputs: Value, **attributes: Any) -> Value:
        """A node with one output."""
        return self.ops(kind, 1, *inputs, **attributes)[0]

    def ops(self, kind: str, num_outputs: int, *inputs: Value, **attributes: Any) -> list[Value]:
        """A node with several outputs."""
        name = f"{kind.lower()}_{len(self._nodes)}"
        outputs = [name] if num_outputs == 1 else [f"{name}.{i}" for i in range(num_outputs)]
        self._nodes.append(helper.make_node(kind, list(inputs), outputs, name=name, **attributes))
        return outputs

    def named_op(self, kind: str, name: Value, *inputs: Value) -> Value:
        """A node whose one output is called `name`: an output of the graph that other nodes read, too."""
        self._nodes.append(helper.make_node(kind, list(inputs), [name], name=name))
        return name

    def declare_output(self, name: Value, dtype: int, shape: list[str | int]) -> None:
        """Make the tensor `name` an output."""
        self._outputs.append(helper.make_tensor_value_info(name, dtype, shape))

    def constant(self, array: NDArray[Any]) -> Value:
        """A stored tensor."""
        name = f"constant_{len(self._weights)}"
        self._weights.append(numpy_helper.from_array(array, name))
        return name

    def integers(self, *values: int) -> Value:
        """A stored list of numbers, such as a shape."""
        return self.constant(np.array(values, np.int64))

    def linear(self, x: Value, *weights: Matrix, bias: Matrix | None = None, sensitive: bool = False) -> Value:
        """`x` times the transposed `weights` (each [O, I]), side by side, plus `bias`: [T, I] -> [T, sum of O].

        `sensitive` layers never have fewer than 8 bits.
        """
        weight = np.concatenate(weights).T  # [I, O]
        y = self.op("MatMul", x, self._matrix(np.ascontiguousarray(weight), sensitive))
        return y if bias is None else self.op("Add", y, self.constant(bias))

    def _matrix(self, weight: Matrix, sensitive: bool) -> Value:
        if self._format in ("float16", "float32"):
            return self._stored(weight)
        narrow = self._format == "int4" and not sensitive
        codes, scales = quantize_blocks(weight, "int4" if narrow else "int8")
        size = len(codes) // len(scales)
        stored = self.constant(codes.astype(ml_dtypes.int4) if narrow else codes)
        return self.op("DequantizeLinear", stored, self.constant(scales), axis=0, block_size=size)

    def _stored(self, weight: Matrix) -> Value:
        """A float32 view of a weight that is stored as the format says."""
        if self._format == "float32":
            return self.constant(weight)
        return self.op("Cast", self.constant(weight.astype(np.float16)), to=TensorProto.FLOAT)

    def embedding(self, ids: Value, rows: Matrix) -> Value:
        """Those of `rows` [V, D] that `ids` [T] name, one scale a row where weights have 8 bits or fewer."""
        if self._format not in BLOCK_SIZES:
            return self.op("Gather", self._stored(rows), ids, axis=0)
        scales = np.abs(rows).max(axis=1, keepdims=True) / 127
        scales[scales == 0] = 1
        codes = self.op("Gather", self.constant(np.rint(rows / scales).astype(np.int8)), ids, axis=0)
        return self.op(
            "Mul",
            self.op("Cast", codes, to=TensorProto.FLOAT),
            self.op("Gather", self.constant(scales.astype(np.float32)), ids, axis=0),
        )

    def rms_norm(self, x: Value, weight: Matrix, eps: float) -> Value:
        """Over the last axis."""
        return self.op("RMSNormalization", x, self.constant(weight), axis=-1, epsilon=float(eps))

    def silu(self, x: Value) -> Value:
        """x sigmoid(x)."""
        return self.op("Mul", x, self.op("Sigmoid", x))

    def split(self, x: Value, *sizes: int) -> list[Value]:
        """Along the last axis."""
        return self.ops("Split", len(sizes), x, self.integers(*sizes), axis=-1)

    def rotary_angles(self, positions: Value, frequencies: tuple[float, ...], scale: float) -> tuple[Value, Value]:
        """Cosine and sine [1, T, E / 2] for `positions` [T]; `frequencies` in radians a position."""
        column = self.op("Unsqueeze", self.op("Cast", positions, to=TensorProto.FLOAT), self.integers(1))
        angles = self.op("Mul", column, self.constant(np.array([frequencies], np.float32)))
        pair = [self.op("Unsqueeze", self.op(kind, angles), self.integers(0)) for kind in ("Cos", "Sin")]
        if scale != 1:
            pair = [self.op("Mul", value, self.constant(np.array(scale, np.float32))) for value in pair]
        return pair[0], pair[1]

    def rotate(self, x: Value, angles: tuple[Value, Value], num_heads: int) -> Value:
        """Rotary embedding of `x` [1, T, heads * E] in Llama's half-split layout."""
        return self.op("RotaryEmbedding", x, *angles, num_heads=num_heads)

    def save(self, path: Path) -> None:
        """Check the model and write it to `path`; weights over 1.5 GB go to `path.data` beside it."""
        graph = helper.make_graph(self._nodes, "draft", self._inputs, self._outputs, self._weights)
        opset = helper.make_opsetid("", OPSET)
        model = helper.make_model(graph, opset_imports=[opset], ir_version=IR_VERSION, producer_name="dovetail")
        external = sum(len(weight.raw_data) for weight in self._weights) > MAX_INLINE_BYTES
        onnx.save(model, path, save_as_external_data=external, location=f"{path.name}.data")
        onnx.checker.check_model(path)
