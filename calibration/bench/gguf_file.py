"""What llama.cpp runs: which formats of weights stand beside an artifact's, and what a GGUF file says of itself."""

from __future__ import annotations

import dataclasses
import functools
import os
from pathlib import Path

from dovetail.runtime.errors import UserError

# The formats of llama.cpp's weights that are as large as an artifact's, by its weight format. `keep` is a GGUF's own.
FORMATS_BESIDE = {
    "int8": ("Q8_0",),
    "int8_asym": ("Q8_0",),
    "int4": ("Q4_0", "Q4_K_M"),
    "fp16": ("F16",),
    "fp32": ("F16",),
}
BYTES_PER_WEIGHT = {"F16": 2.0, "Q8_0": 34 / 32, "Q4_0": 0.7, "Q4_K_M": 0.8}  # of 4 bits with an embedding in 6 to 8


@dataclasses.dataclass(frozen=True, slots=True)
class GgufFile:
    """`file_type`: what its maker calls it, such as Q4_K_M; some of its matrices may be of another type."""

    file_type: str
    vocab_size: int
    hidden_size: int
    num_weights: int
    num_bytes: dict[str, int]

    @property
    def summary(self) -> str:
        """Its format, with the mean over all its tensors."""
        bits = 8 * sum(self.num_bytes.values()) / self.num_weights
        return f"GGUF {self.file_type}, {bits:.1f} bits a weight"

    @property
    def bytes_per_pass(self) -> int:
        """Its tensors without an embedding table that is only looked up."""
        looked_up = self.num_bytes["token_embd.weight"] if "output.weight" in self.num_bytes else 0
        return sum(self.num_bytes.values()) - looked_up


@functools.cache
def read_gguf(path: Path) -> GgufFile:
    """The tables of a GGUF file. Raises `UserError` where it is none, or the package that reads it is missing."""
    try:
        from gguf import GGUFReader, LlamaFileType
    except ImportError:
        raise UserError("expected the package gguf, got none; pip install 'dovetail[bench]'") from None
    try:
        reader = GGUFReader(os.fspath(path))
        field = reader.get_field("general.file_type")
        file_type = "" if field is None else LlamaFileType(field.contents()).name
        tensors = {tensor.name: tensor for tensor in reader.tensors}
        hidden_size, vocab_size = map(int, tensors["token_embd.weight"].shape)  # an adapter, or a projector, has none
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(f"expected a GGUF file of a model, got {path}: {error!r:.200}; copy it again") from None
    return GgufFile(
        file_type.removeprefix("MOSTLY_").removeprefix("ALL_"),
        vocab_size,
        hidden_size,
        sum(int(tensor.n_elements) for tensor in tensors.values()),
        {name: int(tensor.n_bytes) for name, tensor in tensors.items()},
    )
