"""A checkpoint's folder as a source: config, tokenizer, settings, and its weights mapped. Nothing is fetched; no code
of a checkpoint is run.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dovetail.export.sources import settings
from dovetail.export.sources.base import Source
from dovetail.export.sources.safetensors_file import read_safetensors
from dovetail.export.sources.tensors import StoredTensor
from dovetail.runtime.artifact.strict_json import printable, shown
from dovetail.runtime.errors import UserError

_PACKED = (".qweight", ".weight_packed")  # GPTQ, AWQ; compressed-tensors
_METHODS = ("fp8", "fbgemm_fp8", "compressed-tensors")  # may be float8 with a scale, which is read
_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"


def read_checkpoint(folder: Path, allow_pickle: bool = False) -> Source:
    """The source in `folder`: a causal language model's config.json, a tokenizer.json and weights in floating point:
    safetensors, or with `allow_pickle` pytorch_model.bin.

    Raises `UserError` where it is not that.
    """
    if not folder.is_dir():
        raise UserError(
            f"expected a checkpoint folder, got {folder}, which is not one; download the checkpoint and give its folder"
        )
    if not (folder / "config.json").is_file():
        raise UserError(
            f"expected a checkpoint folder with config.json, got {folder} without it; give the folder that "
            f"save_pretrained wrote"
        )
    config = settings.read_object(folder / "config.json")
    _check_config(config, folder)
    tensors = _read_weights(folder, allow_pickle)
    return Source(
        path=folder,
        layout="checkpoint",
        config=config,
        tensors=tensors,
        tokenizer=settings.read_tokenizer(folder),
        generation_config=settings.read_generation_config(folder, config),
        special_tokens=settings.read_special_tokens(folder),
        chat_templates=settings.read_chat_templates(folder),
        allow_pickle=allow_pickle,
    )


def weight_files(folder: Path, allow_pickle: bool = False) -> list[Path]:
    """The files with the weights in `folder`, as transformers chooses them: `model.safetensors`, or else those that the
    index names, or else all safetensors; with `allow_pickle` `pytorch_model*.bin` where there are none of those.

    Raises `UserError` for a folder without weights, and where a file that the index names is missing.
    """
    if (folder / _SINGLE).is_file():
        return [folder / _SINGLE]
    if (folder / _INDEX).is_file():
        places = settings.read_object(folder / _INDEX).get("weight_map")
        if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
            raise UserError(f"expected an index of weights in {folder / _INDEX}, got no weight_map; copy it again")
        names = sorted(set(places.values()))
        missing = [name for name in names if "/" in name or not (folder / name).is_file()]
        if missing:
            raise UserError(f"expected {shown(missing[0])} in {folder}, got none; copy the checkpoint again")
        return [folder / name for name in names]
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


def _read_weights(folder: Path, allow_pickle: bool) -> Mapping[str, StoredTensor]:
    paths = weight_files(folder, allow_pickle)
    if paths[0].suffix != ".safetensors":
        return {}
    tensors = read_safetensors(paths)
    packed = [name for name in tensors if name.endswith(_PACKED)]
    if packed:  # whatever config.json says: GPTQ's first tools kept their settings in a file of their own
        raise _quantised(f"with {packed[0]}", folder)
    return tensors


def _check_config(config: Mapping[str, Any], folder: Path) -> None:
    named = config.get("architectures") or []
    is_causal = isinstance(named, list) and any(isinstance(a, str) and a.endswith("ForCausalLM") for a in named)
    if not is_causal and (named or not isinstance(config.get("model_type"), str)):  # none named: model_type decides
        raise UserError(
            f"expected a causal language model (…ForCausalLM), got architectures {shown(named)} in {folder}; choose a "
            f"text-generation checkpoint"
        )
    if config.get("is_encoder_decoder"):
        raise UserError(f"expected a decoder-only model, got an encoder-decoder in {folder}; choose another checkpoint")
    settings.check_attention(config, folder)
    quantised = config.get("quantization_config")
    if quantised:
        method = quantised.get("quant_method", "unknown") if isinstance(quantised, dict) else "unknown"
        if method not in _METHODS:
            raise _quantised(f"quantised by {printable(str(method))[:40]}", folder)
    if config.get("auto_map") and not config.get("model_type"):
        raise UserError(
            f"expected a model that transformers knows, got custom code in {folder}; choose another, code of "
            f"checkpoints is not run"
        )


def _quantised(how: str, folder: Path) -> UserError:
    return UserError(
        f"expected weights in floating point, got a checkpoint {how} in {folder}; export the original one, "
        f"`weight_format` compresses it"
    )
