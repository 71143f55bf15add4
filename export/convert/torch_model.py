"""A checkpoint as a torch model, and what a draft is made of in one. No code of a checkpoint is run.

Letters: B sequences, T tokens, D hidden size, L feature layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dovetail.export.quiet import quiet_torch
from dovetail.export.sources.checkpoint import read_checkpoint
from dovetail.runtime.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor


def load_torch(source: Path, *, as_stored: bool = False, allow_pickle: bool = False) -> Any:
    """The checkpoint as a torch model on the CPU, in eval mode, that computes in float32. `as_stored` keeps the weights
    in the checkpoint's own type, and converts each module's only while it runs: half the memory, more time.

    Raises `UserError` where tensors are missing or have other shapes than the config says.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    read_checkpoint(source, allow_pickle)
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


def target_features(model: Any, ids: Tensor, layers: Sequence[int]) -> Tensor:
    """ids [B, T] -> the inputs of `layers` side by side and the last hidden state, after the final norm: [B, T,
    (L + 1) * D] float32. `model` is a transformers model.
    """
    import torch

    with torch.no_grad():
        out = body_and_head(model)[0](input_ids=ids, use_cache=False, output_hidden_states=bool(layers))
    inputs = [out.hidden_states[layer] for layer in layers]  # entry i is what layer i reads
    return torch.cat([*inputs, out.last_hidden_state], dim=-1).float()
