"""The bytes of a GGUF file: a header of named values, a table of tensors, and their numbers, which are mapped.

The file is a stranger's: every count and every length is held against what is left of it before anything is made of
them, so that a damaged file costs no more than its size. The `gguf` package's own reader trusts them, and needs eleven
seconds for a vocabulary of 262,144 tokens, of which it makes an array each.

    magic "GGUF", version, number of tensors, number of values
    values   name, type, value                   strings are their length and UTF-8, arrays their type, length, elements
    tensors  name, sizes (the last axis first), type, offset
    numbers  from the next multiple of `general.alignment` on
"""

from __future__ import annotations

import dataclasses
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from dovetail.export.sources.tensors import Matrix
from dovetail.runtime.errors import UserError

_VERSIONS = (2, 3)  # of the format; 1 had other counts and is gone since 2023
_MAX_VALUES, _MAX_TENSORS, _MAX_STRINGS = 1 << 14, 1 << 16, 1 << 21  # real files: 50, 2000, 800,000
_MAX_NAME, _MAX_AXES = 1 << 16, 4
_STRING, _ARRAY, _BOOL = 8, 9, 7
_NUMBERS: Mapping[int, str] = {
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    _BOOL: "|b1",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
_PLAIN: Mapping[str, Any] = {"F32": np.float32, "F16": np.float16, "F64": np.float64, "BF16": ml_dtypes.bfloat16}
_BLOCKS = (  # of weights: what the gguf package makes numbers of
    *("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "TQ1_0", "TQ2_0", "MXFP4"),
    *("IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ1_S", "IQ1_M", "IQ4_NL", "IQ4_XS"),
)


@dataclasses.dataclass(frozen=True, slots=True)
class GgufTensor:
    """`shape` as numpy has it, the last axis last. `raw`: numbers in that shape, or bytes [R, bytes a row] of a block
    type. `kind`: how they are stored, such as `Q4_1`.
    """

    name: str
    shape: tuple[int, ...]
    kind: str
    raw: NDArray[Any]

    def to_float(self, raw: NDArray[Any]) -> Matrix:
        """(A part of) `raw` as float32."""
        if self.kind in _PLAIN:
            return raw.astype(np.float32)
        return gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[self.kind])


@dataclasses.dataclass(frozen=True, slots=True)
class GgufFile:
    """One file, taken apart. `values`: numbers, texts and flags; arrays as numpy arrays, those of texts as lists."""

    path: Path
    values: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]


def read_gguf_file(path: Path) -> GgufFile:
    """The file `path`. Raises `UserError` for anything but a whole GGUF file of tensors that we can read."""
    try:
        data: NDArray[np.uint8] = np.memmap(path, np.uint8, "r")
    except (OSError, ValueError) as error:  # an empty file can't be mapped
        raise UserError(f"expected a GGUF file, got {path}: {error}; copy it again") from None
    return _Reader(path, data).file()


class _Reader:
    """Goes through the file once. `place`: how far it is."""

    def __init__(self, path: Path, data: NDArray[np.uint8]) -> None:
        self.path, self.data, self.place = path, data, 0
        self.bytes = data.data
        self.strings = 0

    def file(self) -> GgufFile:
        """All of it."""
        if self.take(4) != b"GGUF":
            raise UserError(f"expected a GGUF file, got {self.path}, which does not begin as one; choose another file")
        version = self.number("<I")
        if version not in _VERSIONS:
            kind = "the byte order of other machines" if version & 0xFFFF == 0 else f"version {version}"
            raise UserError(f"expected GGUF version 2 or 3, got {kind} in {self.path}; convert the model again")
        num_tensors, num_values = self.number("<Q"), self.number("<Q")
        if num_tensors > _MAX_TENSORS or num_values > _MAX_VALUES:
            raise self.damaged(f"{num_tensors} tensors and {num_values} values")
        values: dict[str, Any] = {}
        for _ in range(num_values):
            name = self.text(_MAX_NAME)
            if name in values:
                raise self.damaged(f"{name[:80]!r} twice")
            values[name] = self.value(self.number("<I"))
        tensors = [self.tensor_entry() for _ in range(num_tensors)]
        alignment = values.get("general.alignment", 32)
        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1) or alignment > 1 << 20:
            raise self.damaged(f"general.alignment {str(alignment)[:80]}")
        return GgufFile(self.path, values, self.tensors(tensors, -(-self.place // alignment) * alignment))

    def damaged(self, got: str) -> UserError:
        """What is raised where the file says something impossible."""
        return UserError(f"expected a whole GGUF file, got {got} in {self.path}; copy it again")

    def take(self, size: int) -> bytes:
        """The next `size` bytes."""
        if size > len(self.data) - self.place:
            raise self.damaged(f"its end after {len(self.data)} bytes")
        self.place += size
        return bytes(self.bytes[self.place - size : self.place])

    def number(self, form: str) -> Any:
        """The next number, of a type by struct's letters."""
        (number,) = struct.unpack(form, self.take(struct.calcsize(form)))
        return number

    def text(self, limit: int | None = None) -> str:
        """The next string."""
        size = self.number("<Q")
        if limit is not None and size > limit:
            raise self.damaged(f"a name of {size} bytes")
        try:
            return self.take(size).decode("utf-8")
        except UnicodeDecodeError:
            raise self.damaged("text that is not UTF-8") from None

    def value(self, kind: int) -> Any:
        """The next value, of the file's type `kind`."""
        if kind == _STRING:
            return self.text()
        if kind in _NUMBERS:
            return np.frombuffer(self.take(np.dtype(_NUMBERS[kind]).itemsize), _NUMBERS[kind])[0].item()
        if kind != _ARRAY:
            raise self.damaged(f"a value of the unknown type {kind}")
        kind, count = self.number("<I"), self.number("<Q")
        if kind in _NUMBERS:
            return np.frombuffer(self.take(count * np.dtype(_NUMBERS[kind]).itemsize), _NUMBERS[kind])
        self.strings += count
        if kind != _STRING or self.strings > _MAX_STRINGS or 8 * count > len(self.data) - self.place:
            raise self.damaged(f"an array of {count} values of type {kind}")
        return self.texts(count)

    def texts(self, count: int) -> list[str]:
        """The next `count` strings: `text`, for a million of them."""
        texts, place, end = [], self.place, len(self.data)
        for _ in range(count):
            if place + 8 > end:
                raise self.damaged(f"its end after {end} bytes")
            (size,) = struct.unpack_from("<Q", self.bytes, place)
            place += 8 + size
            if place > end:
                raise self.damaged(f"its end after {end} bytes")
            try:
                texts.append(str(self.bytes[place - size : place], "utf-8"))
            except UnicodeDecodeError:
                raise self.damaged("text that is not UTF-8") from None
        self.place = place
        return texts

    def tensor_entry(self) -> tuple[str, tuple[int, ...], str, int]:
        """Name, shape, type and offset of the next tensor."""
        name, axes = self.text(_MAX_NAME), self.number("<I")
        if not 1 <= axes <= _MAX_AXES:
            raise self.damaged(f"{axes} axes of {name[:80]!r}")
        shape = tuple(reversed([self.number("<Q") for _ in range(axes)]))
        number, offset = self.number("<I"), self.number("<Q")
        try:
            kind = gguf.GGMLQuantizationType(number).name
        except ValueError:
            raise UserError(
                f"expected tensors of the types that the gguf package knows, got type {number} for {name[:80]!r} in "
                f"{self.path}; convert the model to another type"
            ) from None
        return name, shape, kind, offset

    def tensors(self, entries: list[tuple[str, tuple[int, ...], str, int]], begin: int) -> dict[str, GgufTensor]:
        """The tensors, their numbers mapped from `begin` on."""
        tensors: dict[str, GgufTensor] = {}
        end = begin
        for name, shape, kind, offset in sorted(entries, key=lambda entry: entry[3]):
            if name in tensors:
                raise self.damaged(f"the tensor {name[:80]!r} twice")
            row_bytes = self.row_bytes(name, shape, kind)
            place, size = begin + offset, row_bytes * math.prod(shape[:-1])
            if place < end or size == 0:
                raise self.damaged(f"no place of its own for the tensor {name[:80]!r}")
            end = place + size
            if end > len(self.data):
                raise self.damaged(f"its end after {len(self.data)} bytes, within {name[:80]!r}")
            raw: NDArray[Any] = self.data[place:end]
            plain = kind in _PLAIN  # at any address
            raw = np.ndarray(shape, _PLAIN[kind], raw.data) if plain else raw.reshape(-1, row_bytes)
            tensors[name] = GgufTensor(name, shape, kind, raw)
        return tensors

    def row_bytes(self, name: str, shape: tuple[int, ...], kind: str) -> int:
        """What a row of the last axis takes."""
        if kind in _PLAIN:
            return shape[-1] * int(np.dtype(_PLAIN[kind]).itemsize)
        if kind not in _BLOCKS:
            raise UserError(
                f"expected weights in floating point or in blocks, got {kind} for {name[:80]!r} in {self.path}; "
                f"convert the model to another type"
            )
        block, block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
        if shape[-1] % block:
            raise self.damaged(f"rows of {shape[-1]} for {name[:80]!r}, which are no blocks of {block}")
        return shape[-1] // int(block) * int(block_bytes)
