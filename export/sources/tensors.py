"""The tensors of a folder of weights: safetensors, or pickles where they were asked for by name."""

from __future__ import annotations

import pickle
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from dovetail.runtime.errors import UserError


def read_tensors(folder: Path, *, allow_pickle: bool = False) -> dict[str, Tensor]:
    """All tensors in the `.safetensors` files of `folder` by name. `allow_pickle` reads `pytorch_model*.bin` where
    there are none, by torch's unpickler for weights alone.

    Raises `UserError` for a folder without weights, and for damaged ones.
    """
    paths, pickles = sorted(folder.glob("*.safetensors")), sorted(folder.glob("pytorch_model*.bin"))
    if not paths and pickles and not allow_pickle:
        raise UserError(
            f"expected safetensors weights in {folder}, got the pickle {pickles[0].name}, which may run code; convert "
            f"it, or give `allow_pickle` if you trust its maker"
        )
    if not paths and not pickles:
        raise UserError(f"expected safetensors weights in {folder}, got none; copy or download the folder again")
    tensors: dict[str, Tensor] = {}
    for path in paths or pickles:
        try:
            tensors |= load_file(path) if paths else torch.load(path, map_location="cpu", weights_only=True)
        except (SafetensorError, OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(f"expected whole weights in {path}, got: {first:.120}; copy the file again") from None
    return tensors
