"""The checkpoint folder that is exported: what it must hold, and its torch model. Nothing is fetched; no code of a
checkpoint is run.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dovetail.export.quiet import quiet_torch
from dovetail.runtime.errors import UserError
from safetensors import SafetensorError, safe_open


def check_checkpoint(source: Path) -> None:
    """Raise `UserError` unless `source` is a folder with a causal language model's config, a tokenizer.json and
    safetensors weights.
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
    if not any(str(a).endswith("ForCausalLM") for a in architectures):
        named = ", ".join(map(str, architectures)) or "none"
        raise UserError(
            f"expected a causal language model (…ForCausalLM), got architectures {named} in {source}; choose a "
            f"text-generation checkpoint"
        )
    if config.get("sliding_window") and config.get("use_sliding_window", True):
        raise UserError(
            f"expected attention over the whole context, got a sliding window of {config['sliding_window']} in "
            f"{source}: trees are verified wrongly once it bites; choose a checkpoint without one"
        )
    if config.get("auto_map") and not config.get("model_type"):
        raise UserError(
            f"expected a model that transformers knows, got custom code in {source}; code of checkpoints is not run"
        )
    if not (source / "tokenizer.json").is_file():
        raise UserError(
            f"expected tokenizer.json in {source}, got none; save the fast tokenizer there "
            f"(AutoTokenizer.save_pretrained)"
        )
    weights = sorted(source.glob("*.safetensors"))
    if not weights:
        raise UserError(f"expected safetensors weights in {source}, got none; save the model with save_pretrained")
    for path in weights:
        try:
            with safe_open(path, "numpy"):  # reads the header, and holds it against the size of the file
                pass
        except (SafetensorError, OSError) as error:
            raise UserError(f"expected whole weights in {path}, got: {error}; copy the checkpoint again") from None


def read_sizes(source: Path) -> tuple[int, int]:
    """(vocabulary, hidden size) of a checkpoint that was checked."""
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    sizes = config.get("vocab_size"), config.get("hidden_size")
    if not all(isinstance(size, int) for size in sizes):
        raise UserError(
            f"expected vocab_size and hidden_size in {source}/config.json, got {sizes}; choose another checkpoint"
        )
    return sizes


def load_torch(source: Path) -> Any:
    """The checkpoint as a float32 torch model on the CPU, in eval mode."""
    import torch
    from transformers import AutoModelForCausalLM

    check_checkpoint(source)
    with quiet_torch():
        try:
            model: Any = AutoModelForCausalLM.from_pretrained(
                source, dtype=torch.float32, local_files_only=True, trust_remote_code=False, use_safetensors=True
            )
        except (OSError, ValueError, RuntimeError) as error:
            first = str(error).strip().splitlines()[0]
            raise UserError(f"expected {source} to load in transformers, got: {first}; repair the checkpoint") from None
    return model.eval()


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
    return body, model.get_input_embeddings().weight.detach(), head.weight.detach()
