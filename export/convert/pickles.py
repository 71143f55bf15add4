"""Weights in pickles, which torch alone reads: by its unpickler for weights, that runs no code."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from dovetail.runtime.errors import UserError


def read_pickles(paths: Sequence[Path]) -> dict[str, NDArray[Any]]:
    """The tensors of `pytorch_model*.bin` files by name; numbers that numpy lacks as float32. Raises `UserError` for
    damaged files, and where torch is missing.
    """
    try:
        import torch
    except ImportError:
        raise UserError(
            f"expected torch to read the pickle {paths[0]}, got none installed; pip install 'dovetail[convert]', or "
            f"convert it to safetensors"
        ) from None
    arrays: dict[str, NDArray[Any]] = {}
    for path in paths:
        try:
            tensors = torch.load(path, map_location="cpu", weights_only=True)
            arrays |= {n: (t.float() if t.is_floating_point() else t).numpy() for n, t in tensors.items()}
        except (OSError, RuntimeError, EOFError, AttributeError, pickle.UnpicklingError) as error:
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(f"expected whole weights in {path}, got: {first:.120}; copy the file again") from None
    return arrays
