"""The checkpoint folder that is exported: what it must hold, and its torch model. Nothing is fetched; no code of a
checkpoint is run.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dovetail.export.quiet import quiet_torch
from dovetail.export.sources.tensors import tensor_files, weight_files
from dovetail.runtime.errors import UserError

_PACKED = (".qweight", ".weight_packed", ".weight_scale", ".weight_scale_inv")  # GPTQ, AWQ; compressed-tensors; FP8


def check_checkpoint(source: Path, allow_pickle: bool = False) -> None:
    """Raise `UserError` unless `source` is a folder with a causal language model's config, a tokenizer.json and weights
    in floating point: safetensors, or with `allow_pickle` pytorch_model.bin.
    """
    if not source.is_dir():
        raise UserError(
            f"expected a checkpoint folder, got {source}, which is not one; download the checkpoint and give its folder"
        )
    if not (source / "config.json").is_file():
        raise UserError(
            f"expected a checkpoint folder with config.json, got {source} without it; give the folder that "
            f"save_pretrained wrote"
        )
    try:
        config = json.loads((source / "config.json").read_text(encoding="utf-8"))
        architectures = config.get("architectures") or []
    except (ValueError, AttributeError) as error:
        raise UserError(
            f"expected {source}/config.json to be a JSON object, got {error}; copy the checkpoint again"
        ) from None
    _check_config(config, architectures, source)
    check_tokenizer(source)
    if weight_files(source, allow_pickle)[0].suffix != ".safetensors":
        return
    packed = [name for name in tensor_files(source) if name.endswith(_PACKED)]
    if packed:  # whatever config.json says: GPTQ's first tools kept their settings in a file of their own
        raise _quantised(f"with {packed[0]}", source)
    _check_shards(source)


def _check_config(config: Mapping[str, Any], architectures: Sequence[Any], source: Path) -> None:
    if not any(str(a).endswith("ForCausalLM") for a in architectures):
        named = ", ".join(map(str, architectures)) or "none"
        raise UserError(
            f"expected a causal language model (…ForCausalLM), got architectures {named} in {source}; choose a "
            f"text-generation checkpoint"
        )
    if config.get("is_encoder_decoder"):
        raise UserError(f"expected a decoder-only model, got an encoder-decoder in {source}; choose another checkpoint")
    if config.get("attn_logit_softcapping"):
        raise UserError(
            f"expected attention without a cap on its logits, got attn_logit_softcapping "
            f"{config['attn_logit_softcapping']} in {source}, which OpenVINO's paged attention does not carry; choose "
            f"another model"
        )
    quantised = config.get("quantization_config")
    if quantised:
        method = quantised.get("quant_method", "unknown") if isinstance(quantised, dict) else "unknown"
        raise _quantised(f"quantised by {method}", source)
    if config.get("auto_map") and not config.get("model_type"):
        raise UserError(
            f"expected a model that transformers knows, got custom code in {source}; code of checkpoints is not run"
        )


def _quantised(how: str, source: Path) -> UserError:
    return UserError(
        f"expected weights in floating point, got a checkpoint {how} in {source}; export the original one, "
        f"`weight_format` compresses it"
    )


def check_tokenizer(source: Path) -> None:
    """Raise `UserError` unless a tokenizer.json is in the folder."""
    if not (source / "tokenizer.json").is_file():
        raise UserError(
            f"expected tokenizer.json in {source}, got none; save the fast tokenizer there "
            f"(AutoTokenizer.save_pretrained)"
        )


def _check_shards(source: Path) -> None:
    index = source / "model.safetensors.index.json"
    if index.is_file():
        try:
            named = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise UserError(f"expected an index of weights in {index}, got: {error}; copy it again") from None
        missing = sorted(name for name in map(str, named) if not (source / name).is_file())
        if missing:
            raise UserError(f"expected {missing[0]} in {source}, got none; copy the checkpoint again")


def read_sizes(source: Path) -> tuple[int, int]:
    """(vocabulary, hidden size) of a checkpoint that was checked."""
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    sizes = config.get("vocab_size"), config.get("hidden_size")
    if not all(isinstance(size, int) for size in sizes):
        raise UserError(
            f"expected vocab_size and hidden_size in {source}/config.json, got {sizes}; choose another checkpoint"
        )
    return sizes


def load_torch(source: Path, *, as_stored: bool = False, allow_pickle: bool = False) -> Any:
    """The checkpoint as a torch model on the CPU, in eval mode, that computes in float32. `as_stored` keeps the weights
    in the checkpoint's own type, and converts each module's only while it runs: half the memory, more time.

    Raises `UserError` where tensors are missing or have other shapes than the config says.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    check_checkpoint(source, allow_pickle)
    with quiet_torch():
        try:
            config = AutoConfig.from_pretrained(source, local_files_only=True, trust_remote_code=False)
            model: Any
            model, loaded = AutoModelForCausalLM.from_pretrained(
                source,
                dtype="auto" if as_stored else torch.float32,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=not allow_pickle or None,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are reported, and refused below
            )
        except (OSError, ValueError, RuntimeError) as error:
            first = str(error).strip().splitlines()[0]
            raise UserError(f"expected {source} to load in transformers, got: {first}; repair the checkpoint") from None
    if getattr(config, "max_position_embeddings", None) is None:
        raise UserError(
            f"expected a transformer with attention over a context, got {config.model_type} in {source}; choose "
            f"another checkpoint"
        )
    for name, got, wanted in sorted(loaded["mismatched_keys"], key=str):
        raise UserError(
            f"expected {name} of shape {list(wanted)} in {source}, got {list(got)}; copy the checkpoint again"
        )
    missing = sorted(map(str, loaded["missing_keys"]))
    if missing:
        raise UserError(
            f"expected all weights in {source}, got none for {missing[0]} ({len(missing)} in all); copy the checkpoint "
            f"again"
        )
    if as_stored:
        _convert_while_used(model)
    return model.eval()


def _convert_while_used(model: Any) -> None:
    """Modules that hold weights of another type than float32 get float32 ones while they run."""

    def convert(module: Any, _: Any) -> None:
        module.stored = {name: weight.data for name, weight in module.named_parameters(recurse=False)}
        for weight in module.parameters(recurse=False):
            weight.data = weight.data.float()

    def restore(module: Any, *_: Any) -> None:
        for name, data in module.stored.items():
            getattr(module, name).data = data
        del module.stored

    import torch

    for module in model.modules():
        if any(weight.dtype != torch.float32 for weight in module.parameters(recurse=False)):
            module.register_forward_pre_hook(convert)
            module.register_forward_hook(restore)


def body_and_head(model: Any) -> tuple[Any, Any, Any]:
    """(the stack that ends in the final norm, the embedding weight [V, D], the LM head weight [V, D]) of a Llama-family
    model.
    """
    body, head = getattr(model, "model", None), model.get_output_embeddings()
    if body is None or head is None or getattr(head, "bias", None) is not None:
        name = type(model).__name__
        raise UserError(
            f"expected a Llama-family model (model, lm_head without bias), got {name}; this architecture has no draft "
            f"yet"
        )
    return body, model.get_input_embeddings().weight.detach().float(), head.weight.detach().float()
