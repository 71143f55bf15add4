"""The weights in a folder: safetensors, or pickles where they were asked for by name. Which there are is told by the
files' headers, without torch.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dovetail.runtime.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor


def weight_files(folder: Path, allow_pickle: bool = False) -> list[Path]:
    """The `.safetensors` files of `folder`, or with `allow_pickle` its `pytorch_model*.bin` where it has none of those.
    Raises `UserError` for a folder without weights.
    """
    paths, pickles = sorted(folder.glob("*.safetensors")), sorted(folder.glob("pytorch_model*.bin"))
    if not paths and pickles and not allow_pickle:
        raise UserError(
            f"expected safetensors weights in {folder}, got the pickle {pickles[0].name}, which may run code; convert "
            f"it, or give `allow_pickle` if you trust its maker"
        )
    if not paths and not pickles:
        raise UserError(
            f"expected safetensors weights in {folder}, got none; copy or download the folder again, or save the model "
            f"with save_pretrained"
        )
    return paths or pickles


def tensor_files(folder: Path) -> dict[str, Path]:
    """Tensor name -> the safetensors file that holds it. Raises `UserError` for damaged files."""
    places: dict[str, Path] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with _opened(path, "numpy") as file:  # reads the header, and holds it against the size of the file
            places.update(dict.fromkeys(file.keys(), path))
    return places


def tensor_shape(path: Path, name: str) -> list[int]:
    """Of one tensor of a safetensors file."""
    with _opened(path, "numpy") as file:
        return list(file.get_slice(name).get_shape())


def read_tensor(path: Path, name: str) -> Tensor:
    """One tensor of a safetensors file."""
    with _opened(path, "pt") as file:  # torch reads bfloat16, numpy does not
        tensor: Tensor = file.get_tensor(name)
    return tensor


def read_tensors(folder: Path, *, allow_pickle: bool = False) -> dict[str, Tensor]:
    """All tensors of `folder` by name. `allow_pickle` reads pickles where there is nothing else, by torch's unpickler
    for weights alone.

    Raises `UserError` for a folder without weights, and for damaged ones.
    """
    import torch
    from safetensors.torch import load_file

    tensors: dict[str, Tensor] = {}
    for path in weight_files(folder, allow_pickle):
        with _whole(path):
            if path.suffix == ".safetensors":
                tensors |= load_file(path)
            else:
                tensors |= torch.load(path, map_location="cpu", weights_only=True)
    return tensors


@contextmanager
def _opened(path: Path, framework: str) -> Iterator[Any]:
    from safetensors import safe_open

    with _whole(path), safe_open(path, framework) as file:
        yield file


@contextmanager
def _whole(path: Path) -> Iterator[None]:
    """What a library says of a file that is damaged, as one line."""
    from safetensors import SafetensorError

    try:
        yield
    except (SafetensorError, OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"expected whole weights in {path}, got: {first:.120}; copy the file again") from None
