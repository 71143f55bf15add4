"""Weights in safetensors files, mapped: bfloat16, float16, float32, float64, and float8 with the scales beside it.

The library reads each header first, which holds it against the file's size; the numbers are then views of the file.
"""

from __future__ import annotations

import dataclasses
import json
import math
import struct
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from dovetail.export.sources.tensors import Matrix, StoredTensor
from dovetail.runtime.artifact.strict_json import printable, shown
from dovetail.runtime.errors import UserError

_TYPES: Mapping[str, Any] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
_SCALE_BLOCK = 128
_MAX_NAME, _MAX_AXES, _MAX_NUMBERS = 200, 8, 1 << 48  # of a tensor; one without numbers may have any shape
_SCALES = ("_scale_inv", "_scale")  # of float8: DeepSeek's (one a block of rows and columns), compressed-tensors'


def read_safetensors(paths: Sequence[Path]) -> dict[str, StoredTensor]:
    """The tensors of all `paths` by name. Raises `UserError` for damaged files, for types that are not read, and for a
    tensor that two files hold.
    """
    tensors: dict[str, StoredTensor] = {}
    for path in paths:
        for name, tensor in _tensors_of(path).items():
            if name in tensors:
                raise UserError(
                    f"expected each tensor once, got {name} in {path.name} and before; copy the folder again"
                )
            tensors[name] = tensor
    return _with_scales(tensors)


def _tensors_of(path: Path) -> dict[str, StoredTensor]:
    try:
        with safe_open(path, "numpy") as file:
            names = set(file.keys())
        with path.open("rb") as opened:
            (length,) = struct.unpack("<Q", opened.read(8))
            header = json.loads(opened.read(length))
        size = path.stat().st_size
        data = np.memmap(path, np.uint8, "r") if size else np.empty(0, np.uint8)
    except (SafetensorError, OSError, ValueError, struct.error) as error:
        first = printable((str(error).strip() or type(error).__name__).splitlines()[0])
        raise UserError(f"expected whole weights in {path}, got: {first:.120}; copy the file again") from None
    tensors = {}
    for name in filter(names.__contains__, header):
        if not name.isprintable() or len(name) > _MAX_NAME:
            raise UserError(f"expected names of tensors in {path}, got {shown(name)}; copy the file again")
        kind, shape = header[name]["dtype"], tuple(header[name]["shape"])
        if kind not in _TYPES:
            raise UserError(f"expected weights of {', '.join(_TYPES)}, got {name} of {kind} in {path}; convert them")
        if len(shape) > _MAX_AXES or math.prod(max(size, 1) for size in shape) > _MAX_NUMBERS:
            raise UserError(
                f"expected tensors of up to {_MAX_AXES} axes in {path}, got {shown(shape)}; copy the file again"
            )
        begin, end = (8 + length + offset for offset in header[name]["data_offsets"])
        raw = _view(data[begin:end], np.dtype(_TYPES[kind]), shape)
        tensors[name] = StoredTensor(name, shape, kind, raw, _to_float)
    return tensors


def _view(data: NDArray[np.uint8], kind: np.dtype[Any], shape: tuple[int, ...]) -> NDArray[Any]:
    """numpy reads numbers at odd addresses, too: a header may have any length."""
    return np.ndarray(shape, kind, data.data) if data.size else np.empty(shape, kind)


def _to_float(raw: NDArray[Any], start: int) -> Matrix:
    return raw.astype(np.float32)


def _with_scales(tensors: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
    """The tensors without the scales of float8 ones, which multiply what is read of those."""
    scales = {name + end: name for name, tensor in tensors.items() if tensor.kind.startswith("F8") for end in _SCALES}
    found = {scales[name]: tensors[name] for name in scales if name in tensors}
    for name, tensor in tensors.items():
        if found and tensor.kind.startswith("F8") and name not in found:  # without any they are plain numbers
            raise UserError(
                f"expected a scale beside the float8 weights {name}, got none; give the original checkpoint"
            )
    return {
        name: dataclasses.replace(tensor, to_float=_scaled(found[name], tensor.shape)) if name in found else tensor
        for name, tensor in tensors.items()
        if name not in scales
    }


def _scaled(stored: StoredTensor, shape: tuple[int, ...]) -> Callable[[NDArray[Any], int], Matrix]:
    """Makes float8 numbers of `shape` [R, I] floats times their scale: one in all, one a row, or one a block of 128 by
    128, the last of which may be cut short.
    """
    scale = stored.read()
    factors = scale.reshape(*scale.shape, *[1] * (len(shape) - scale.ndim))
    blocks = tuple(-(-size // _SCALE_BLOCK) for size in shape)
    counts = [count in (1, size, whole) for count, size, whole in zip(factors.shape, shape, blocks, strict=False)]
    if factors.ndim != len(shape) or not all(counts):
        raise UserError(
            f"expected scales for weights of shape {list(shape)}, got {stored.name} of shape {list(stored.shape)}; "
            f"give the original checkpoint"
        )

    def to_float(raw: NDArray[Any], start: int) -> Matrix:
        values: Matrix = raw.astype(np.float32)
        own = factors
        for axis, (size, first) in enumerate(zip(raw.shape, (start, *[0] * raw.ndim), strict=False)):
            if own.shape[axis] not in (1, shape[axis]):
                places = np.arange(first, first + size) // _SCALE_BLOCK
            else:
                places = np.arange(first, first + size) if own.shape[axis] > 1 else np.array([0])
            own = own.take(places, axis)
        return values * own

    return to_float
