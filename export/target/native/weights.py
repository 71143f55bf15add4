"""Where a native graph takes its weights from: the tensors of a source in float32, or stored in fewer bits.

Quantised numbers are written to a file while the graph is built and mapped from there, so that one matrix at a time is
in memory, however large the model is.

Letters: B sequences, T tokens, O outputs, I inputs, G groups of a row, S inputs of a group.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import ml_dtypes
import numpy as np
import openvino as ov
from numpy.typing import NDArray
from openvino import opset13 as op

from dovetail.export.sources.tensors import Matrix, StoredTensor
from dovetail.export.target.native.gguf_blocks import KEPT, read_blocks
from dovetail.export.target.native.graph import Role, integers
from dovetail.export.target.native.quantize import Quantized, joined, quantize
from dovetail.export.target.native.scheme import Rounding, Scheme

_INLINE_BYTES = 1 << 16  # smaller constants stay in memory


class FloatWeights:
    """In float32, as the source has them. Each matrix is in memory once the graph is built: for a part of a model."""

    def __init__(self, tensors: Mapping[str, StoredTensor]) -> None:
        self._tensors = tensors

    def table(self, name: str, role: Role) -> Any:
        return op.constant(self._tensors[name].read(), shared_memory=True)

    def products(self, y: Any, names: Sequence[str], role: Role) -> list[tuple[int, Any]]:
        return [(1, op.matmul(y, self.table(name, role), False, True)) for name in names]

    def vector(self, name: str) -> NDArray[np.float32]:
        return self._tensors[name].read()


class Constants:
    """Writes arrays to the file `path` and maps them from there; a context, which removes the file. A graph over its
    constants must not outlive it.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._file = path, path.open("w+b")
        self._mapped = list[NDArray[Any]]()  # OpenVINO does not hold them

    def __enter__(self) -> Constants:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        self._mapped.clear()
        self._path.unlink(missing_ok=True)

    def store(self, values: NDArray[Any], kind: Any = None) -> Any:
        """A constant of the graph with these numbers. `kind` u4 or i4: `values` [..., S] are packed, two in a byte."""
        shape = values.shape
        if values.dtype == ml_dtypes.bfloat16:
            values, kind = values.view(np.int16), ov.Type.bf16
        elif kind is not None:
            flat = values.reshape(-1, 2).view(np.uint8) & 15
            values = flat[:, 0] | (flat[:, 1] << 4)
        if values.nbytes >= _INLINE_BYTES:
            start = self._file.seek(0, 2)
            start += self._file.write(bytes(-start % 64))
            values.tofile(self._file)
            self._file.flush()
            values = np.memmap(self._path, values.dtype, "c", start, values.shape)  # private: read alone
        else:  # a safetensors file may hold it at an odd address
            values = np.require(values, requirements=["C", "A", "W"])
        self._mapped.append(values)
        if kind is not None:
            return op.constant(ov.Tensor(values, ov.Shape(shape), kind), shared_memory=True)
        return op.constant(values, shared_memory=True)


class StoredWeights:
    """As `scheme` says, each matrix in the form that suits what it does. `forms` counts the weights by what they became
    and `converted` those blocks of a GGUF that could not be kept.
    """

    def __init__(self, tensors: Mapping[str, StoredTensor], scheme: Scheme, constants: Constants) -> None:
        self._tensors, self._scheme, self._constants = tensors, scheme, constants
        self.forms: Counter[str] = Counter()
        self.converted: Counter[str] = Counter()

    def table(self, name: str, role: Role) -> Any:
        stored = self._stored(name, role, with_offsets=False)
        return self._value(stored) if isinstance(stored, Quantized) else self._float(stored)

    def products(self, y: Any, names: Sequence[str], role: Role) -> list[tuple[int, Any]]:
        matrices = [self._stored(name, role, with_offsets=True) for name in names]
        runs: list[list[Any]] = []
        for matrix in matrices:
            if runs and _layout(runs[-1][0]) == _layout(matrix):
                runs[-1].append(matrix)
            else:
                runs.append([matrix])
        return [(len(run), self._product(y, run)) for run in runs]

    def vector(self, name: str) -> NDArray[np.float32]:
        return self._tensors[name].read()

    def _product(self, y: Any, run: list[Any]) -> Any:
        if not isinstance(run[0], Quantized):
            return op.matmul(y, self._float(np.concatenate(run) if len(run) > 1 else run[0]), False, True)
        whole = joined(run)
        product = op.matmul(y, self._value(whole), False, True)
        if whole.offsets is None:
            return product
        # The offset of a group meets the sum of its inputs: [B, T, G] times [O, G].
        _, groups, size = whole.codes.shape
        sums = op.reduce_sum(op.reshape(y, integers(0, 0, groups, size), True), integers(-1), False)
        return op.add(product, op.matmul(sums, self._constants.store(whole.offsets), False, True))

    def _stored(self, name: str, role: Role, with_offsets: bool) -> Quantized | NDArray[Any]:
        tensor, rounding = self._tensors[name], self._scheme.rounding(role)
        if self._scheme.keeps_blocks and tensor.has_blocks:
            if tensor.kind in KEPT:
                kept = read_blocks(tensor.kind, tensor.blocks())
                if with_offsets or kept.offsets is None:
                    self.forms[tensor.kind] += kept.codes.size
                    return kept
            self.converted[tensor.kind] += int(np.prod(tensor.shape))
        elif self._scheme.keeps_blocks:
            rounding = Rounding("fp16" if tensor.kind in ("F16", "BF16") else "fp32")
        return self._rounded(tensor, rounding)

    def _rounded(self, tensor: StoredTensor, rounding: Rounding) -> Quantized | NDArray[Any]:
        self.forms[rounding.name] += int(np.prod(tensor.shape))
        if rounding.bits == 32:
            return tensor.read()
        if rounding.bits == 16:
            if tensor.kind == "BF16":  # has 16 bits already
                return tensor.raw if tensor.rows is None else tensor.raw[tensor.rows]
            return tensor.read().astype(np.float16)
        outputs, inputs = tensor.shape
        group = rounding.group(inputs)
        return quantize(
            tensor.read_rows, (outputs, inputs), bits=rounding.bits, symmetric=rounding.symmetric, group_size=group
        )

    def _value(self, stored: Quantized) -> Any:
        """The float32 matrix [O, I] that the engine makes of codes while it multiplies."""
        outputs, groups, size = stored.codes.shape
        signed = stored.codes.dtype == np.int8
        packed = (ov.Type.i4 if signed else ov.Type.u4) if stored.bits == 4 else None
        whole = stored.codes if groups > 1 else stored.codes.reshape(outputs, size)
        beside = (outputs, groups, 1) if groups > 1 else (outputs, 1)
        kind = "f16" if stored.scales.dtype == np.float16 else "f32"
        value = op.convert(self._constants.store(whole, packed), kind)
        if stored.zero_points is not None:
            value = op.subtract(value, op.convert(self._constants.store(stored.zero_points.reshape(beside)), kind))
        value = op.multiply(value, self._constants.store(stored.scales.reshape(beside)))
        if groups > 1:
            value = op.reshape(value, integers(outputs, groups * size), False)
        return op.convert(value, "f32") if kind == "f16" else value

    def _float(self, matrix: NDArray[Any]) -> Any:
        constant = self._constants.store(matrix)
        return constant if matrix.dtype == np.float32 else op.convert(constant, "f32")


def _layout(matrix: Quantized | Matrix) -> object:
    return matrix.layout if isinstance(matrix, Quantized) else matrix.dtype
