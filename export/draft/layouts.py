"""Draft folders -> `DraftModel`: what `dovetail-export draft` writes, the layouts that drafts are published in, and any
small causal language model with the target's tokenizer.

| kind | layout | told by |
| --- | --- | --- |
| `dgf` `eagle` `eagle3` | ours | `kind` in config.json |
| `dgf` | the paper's: `W_1`, `W_2`, `W_z`, `input_layernorm`, `layers.*` | `W_1` |
| `eagle` | EAGLE-1 and 2: `fc` over [e; h], with or without bias, `layers.*` | `fc` twice as wide as high |
| `eagle3` | the official one and SpecForge's: `fc` over three layers, `midlayer.*` | `midlayer` |
| `eagle3` | speculators': `layers.0.*` with `hidden_norm`, sizes in `transformer_layer_config` | `hidden_norm` |
| `lm` | Hugging Face's, of Llama, Mistral, Qwen 2 or 3 | architectures ...ForCausalLM, `lm_head` or tied |

Letters: V the target's vocabulary, N tokens of the draft's LM head, D hidden size.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from dovetail.export.draft.config import (
    DraftConfig,
    check_fits,
    config_for,
    default_feature_layers,
    read_config,
    vocabulary_sha256,
)
from dovetail.export.draft.model import DraftModel, load_draft
from dovetail.export.sources.tensors import read_tensors
from dovetail.runtime.errors import UserError

Weights = dict[str, Tensor]

LM_FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
SAME_EMBEDDING = 0.5  # mean cosine with the target's rows; another vocabulary's would be near 0
_BLOCK_NAMES = {
    "input_layernorm": "input_norm",
    "post_attention_layernorm": "mlp_norm",
    "self_attn.q_proj": "q_proj",
    "self_attn.k_proj": "k_proj",
    "self_attn.v_proj": "v_proj",
    "self_attn.q_norm": "q_norm",
    "self_attn.k_norm": "k_norm",
    "self_attn.o_proj": "o_proj",
    "mlp.gate_proj": "gate_proj",
    "mlp.up_proj": "up_proj",
    "mlp.down_proj": "down_proj",
}
_FIRST_BLOCK_NAMES = {"hidden_norm": "fusion.feature_norm", "input_layernorm": "fusion.token_norm"}
_FUSION_NAMES = {"W_1": "fusion.w1", "W_2": "fusion.w2", "W_z": "fusion.wz", "input_layernorm": "fusion.norm"}
_FOREIGN_FLAGS = ("fc_norm", "norm_before_fc", "norm_output")  # of speculators' EAGLE-3
_REPEATED = re.compile(r"(?:.*\.)?rotary_emb\.inv_freq$|verifier_|t2d$")  # the target's, or made from the config


@dataclasses.dataclass(frozen=True, slots=True)
class Target:
    """What a draft is held against: the target's weights and config, and the folder with its tokenizer."""

    folder: Path
    config: Any
    embedding: Tensor  # [V, D]
    lm_head: Tensor  # [V, D]

    @property
    def tokenizer(self) -> Tokenizer:
        """The target's."""
        return Tokenizer.from_file(str(self.folder / "tokenizer.json"))


def read_draft(folder: Path, target: Target, *, allow_pickle: bool = False) -> DraftModel:
    """Read a draft folder of any layout for `target`, in float32.

    Raises `UserError` if it is none, lacks tensors or has ones of other shapes, or is not for this target: another
    hidden size, another vocabulary.
    """
    document = _document(folder)
    check_tokenizer(folder, target.tokenizer)
    if "kind" in document:
        check_draft(folder, target.folder)
        draft = load_draft(folder, target.embedding, target.lm_head)
        if draft.head_tokens is not None:
            _check_tokens(draft.head_tokens, len(target.embedding), folder)
    else:
        tensors = read_tensors(folder, allow_pickle=allow_pickle)
        weights = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
        kept = {name: tensor for name, tensor in weights.items() if not _REPEATED.match(name)}
        said = weights.get("t2d")  # which of the target's tokens the head has
        if said is not None and said.shape != target.embedding.shape[:1]:
            raise _unexpected("t2d", said.shape, target.embedding.shape[:1], folder)
        draft = _published(folder, document, kept, target)
    return draft.float().eval()


def check_draft(folder: Path, source: Path) -> None:
    """Raise `UserError` early, without reading weights, if the draft folder can't be for the checkpoint `source`."""
    document = _document(folder)
    tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
    check_tokenizer(folder, tokenizer)
    if "kind" in document:
        config = json.loads((source / "config.json").read_text(encoding="utf-8"))
        ours = read_config(folder)
        check_fits(ours, config["vocab_size"], config["hidden_size"])
        if ours.vocabulary_sha256 not in (None, vocabulary_sha256(tokenizer)):
            raise UserError(
                f"expected a draft trained with the tokenizer of {source}, got {folder}, trained with another of the "
                f"same size; train a draft for this target"
            )


def check_tokenizer(folder: Path, expected: Tokenizer) -> None:
    """Raise `UserError` if there is a tokenizer beside the draft that gives tokens other ids than the target's."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        return
    try:
        ours = Tokenizer.from_file(str(path)).get_vocab()
    except Exception as error:  # tokenizers raises nothing more precise
        raise UserError(f"expected a tokenizer in {path}, got: {error!s:.100}; copy the draft again") from None
    theirs = expected.get_vocab()
    if ours != theirs:
        token = min(set(ours.items()) ^ set(theirs.items()), key=lambda item: item[1])[0]
        raise UserError(
            f"expected the target's tokenizer beside the draft, got another in {folder} (the token {token!r:.40} is "
            f"{ours.get(token, 'unknown')} there, {theirs.get(token, 'unknown')} in the target's); choose a draft made "
            f"for this target"
        )


def _document(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(
            f"expected a draft folder with config.json, got {folder} without it; train a draft with "
            f"dovetail-export draft, or download one"
        )
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        assert isinstance(document, dict)
    except (ValueError, AssertionError):
        raise UserError(f"expected {path} to be a JSON object, got something else; copy the draft again") from None
    return document


def _published(folder: Path, document: dict[str, Any], weights: Weights, target: Target) -> DraftModel:
    names = {name.removesuffix(".weight") for name in weights}
    fc = weights.get("fc.weight")
    if "W_1" in names:
        return _paper(folder, document, weights, target)
    if fc is not None and any(name.startswith("midlayer.") or name.endswith(".hidden_norm") for name in names):
        return _eagle3(folder, document, weights, target)
    if fc is not None and "layers.0.mlp.gate_proj" in names:
        return _eagle(folder, document, weights, target)
    if any(str(a).endswith("ForCausalLM") for a in document.get("architectures") or []) and "embed_tokens" in names:
        return _language_model(folder, document, weights, target)
    some = ", ".join(sorted(names)[:4])
    raise UserError(
        f"expected a draft of kind dgf, eagle, eagle3 or a causal language model, got a folder {folder} with the "
        f"tensors {some} ...; docs/drafts.md lists the layouts"
    )


def _paper(folder: Path, document: dict[str, Any], weights: Weights, target: Target) -> DraftModel:
    config = _config(folder, document, weights, target, "dgf")
    _drop_targets_own(weights, target, folder)
    named = {
        (f"{_FUSION_NAMES[name]}.weight" if (name := key.removesuffix(".weight")) in _FUSION_NAMES else key): tensor
        for key, tensor in weights.items()
    }
    return _filled(DraftModel(config, target.embedding, target.lm_head), _with_blocks(named), folder)


def _eagle(folder: Path, document: dict[str, Any], weights: Weights, target: Target) -> DraftModel:
    config = _config(folder, document, weights, target, "eagle", fusion_bias="fc.bias" in weights)
    _drop_targets_own(weights, target, folder)
    named = {key.replace("fc.", "fusion.fc.", 1) if key.startswith("fc.") else key: t for key, t in weights.items()}
    return _filled(DraftModel(config, target.embedding, target.lm_head), _with_blocks(named), folder)


def _eagle3(folder: Path, document: dict[str, Any], weights: Weights, target: Target) -> DraftModel:
    flags = [flag for flag in _FOREIGN_FLAGS if document.get(flag)] if "transformer_layer_config" in document else []
    foreign = [name for name in weights if name.startswith(("fc_norm", "input_norm"))] + flags
    if foreign:
        raise UserError(
            f"expected an EAGLE-3 draft as in its paper, got one with {foreign[0]} in {folder}, which is not "
            f"supported; choose another draft"
        )
    config = _config(
        folder,
        document,
        weights,
        target,
        "eagle3",
        feature_layers=_feature_layers(folder, document, target.config.num_hidden_layers),
        norm_before_residual=bool(document.get("norm_before_residual", False)),
    )
    embedding = weights.pop("embed_tokens.weight", target.embedding).float()
    _check_embedding(embedding, target, folder)
    lm_head, head_tokens = _reduced_head(weights, target, folder)
    named: Weights = {}
    for key, tensor in weights.items():
        name, _, end = key.replace("midlayer.", "layers.0.", 1).rpartition(".")
        inner = name.removeprefix("layers.0.")
        if name != inner and inner in _FIRST_BLOCK_NAMES:
            name = _FIRST_BLOCK_NAMES[inner]
        named[f"{ {'fc': 'projection', 'norm': 'output_norm'}.get(name, name) }.{end}"] = tensor
    return _filled(DraftModel(config, embedding, lm_head.float(), head_tokens), _with_blocks(named), folder)


def _reduced_head(weights: Weights, target: Target, folder: Path) -> tuple[Tensor, Tensor | None]:
    """(LM head, the target's tokens of its rows or None for all); taken out of `weights`."""
    lm_head = weights.pop("lm_head.weight", target.lm_head)
    offsets = weights.pop("d2t", None)  # of the token in the target's vocabulary from the row's number
    if len(lm_head) == len(target.embedding):
        return lm_head, None
    if offsets is None:
        raise _unexpected("lm_head.weight", lm_head.shape, target.lm_head.shape, folder)
    if offsets.shape != lm_head.shape[:1]:
        raise _unexpected("d2t", offsets.shape, lm_head.shape[:1], folder)
    tokens = torch.arange(len(offsets)) + offsets.long()
    _check_tokens(tokens, len(target.embedding), folder)
    return lm_head, tokens


def _language_model(folder: Path, document: dict[str, Any], weights: Weights, target: Target) -> DraftModel:
    family = document.get("model_type")
    if family not in LM_FAMILIES:
        raise UserError(
            f"expected a draft of the families {', '.join(LM_FAMILIES)}, got {family!r} in {folder}; choose another one"
        )
    if document.get("sliding_window") and document.get("use_sliding_window", True):
        raise UserError(
            f"expected a draft that attends to the whole context, got a sliding window of {document['sliding_window']} "
            f"in {folder}; choose another one"
        )
    if not (folder / "tokenizer.json").is_file():
        raise UserError(
            f"expected tokenizer.json beside the draft, to compare with the target's, got {folder} without it; save "
            f"the fast tokenizer there"
        )
    config = _config(folder, document, weights, target, "lm")
    vocab_size = len(target.embedding)
    embedding = weights.pop("embed_tokens.weight").float()
    lm_head = weights.pop("lm_head.weight", embedding).float()
    rows = min(len(embedding), vocab_size)  # the same tokens, padded to other sizes
    head_tokens = None if len(lm_head) == vocab_size else torch.arange(rows)
    padded = torch.nn.functional.pad(embedding[:rows], (0, 0, 0, vocab_size - rows))
    named = {f"output_{key}" if key.startswith("norm.") else key: tensor for key, tensor in weights.items()}
    return _filled(DraftModel(config, padded, lm_head[:rows], head_tokens), _with_blocks(named), folder)


def _config(
    folder: Path, document: dict[str, Any], weights: Weights, target: Target, kind: str, **more: Any
) -> DraftConfig:
    """From a published config.json. Raises `UserError` where sizes are missing or are not the target's."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig, LlamaConfig

    sizes = dict(document.get("transformer_layer_config", document))
    family = sizes.pop("model_type", "llama")
    try:
        known = family in LM_FAMILIES
        like = AutoConfig.for_model(family, **sizes) if known else LlamaConfig(**sizes)
        numbers = {int(found[1]) for name in weights if (found := re.match(r"layers\.(\d+)\.", name))}
        config = config_for(
            like,
            max(numbers, default=0) + 1,
            kind,
            qkv_bias=any(name.endswith("q_proj.bias") for name in weights),
            qk_norm=any(name.endswith("q_norm.weight") for name in weights),
            **more,
        )
    except (KeyError, TypeError, AttributeError, ValueError, StrictDataclassError) as error:
        raise UserError(
            f"expected the sizes of a Llama in {folder}/config.json, got {str(error).splitlines()[0]:.100}; copy the "
            f"draft again"
        ) from None
    if kind == "lm":
        return dataclasses.replace(config, vocab_size=len(target.embedding))
    config = dataclasses.replace(config, vocab_size=sizes.get("vocab_size", len(target.embedding)))
    for size in (config.hidden_size, document.get("target_hidden_size") or config.hidden_size):
        check_fits(dataclasses.replace(config, hidden_size=size), *target.embedding.shape)
    return config


def _feature_layers(folder: Path, document: Mapping[str, Any], num_layers: int) -> tuple[int, ...]:
    """The layers whose inputs are read. speculators' config numbers inputs, SpecForge's outputs; without numbers they
    are the published code's.
    """
    given = document.get("eagle_aux_hidden_state_layer_ids")
    if given is None:
        outputs = (document.get("eagle_config") or {}).get("eagle_aux_hidden_state_layer_ids")
        given = default_feature_layers(num_layers) if outputs is None else [layer + 1 for layer in outputs]
    if not all(type(layer) is int and 0 <= layer < num_layers for layer in given):
        raise UserError(
            f"expected layers from 0 to {num_layers - 1} of the target for the draft's features, got {list(given)} in "
            f"{folder}/config.json; choose a draft made for this target"
        )
    return tuple(given)


def _with_blocks(weights: Weights) -> Weights:
    """The same with the blocks' tensors by our names."""
    named = {}
    for key, tensor in weights.items():
        name, _, end = key.rpartition(".")
        found = re.fullmatch(r"layers\.(\d+)\.(.+)", name)
        if found:
            name = f"blocks.{found[1]}.{_BLOCK_NAMES.get(found[2], found[2])}"
        named[f"{name}.{end}" if name else end] = tensor
    return named


def _drop_targets_own(weights: Weights, target: Target, folder: Path) -> None:
    """Some published drafts repeat the target's embedding or head."""
    embedding = weights.pop("embed_tokens.weight", None)
    if embedding is not None:
        _check_embedding(embedding.float(), target, folder)
    weights.pop("lm_head.weight", None)


def _check_embedding(embedding: Tensor, target: Target, folder: Path) -> None:
    """A published draft repeats the embedding it was trained on: the target's, or it is for another model."""
    if embedding.shape != target.embedding.shape:
        raise _unexpected("embed_tokens.weight", embedding.shape, target.embedding.shape, folder)
    likeness = float(torch.nn.functional.cosine_similarity(embedding, target.embedding, dim=-1).mean())
    if not likeness > SAME_EMBEDDING:
        raise UserError(
            f"expected the target's embedding in {folder}, got another (mean cosine {likeness:.2f}); choose a draft "
            f"made for this target and this vocabulary"
        )


def _check_tokens(tokens: Tensor, vocab_size: int, folder: Path) -> None:
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= vocab_size or len(torch.unique(tokens)) < len(tokens):
        raise UserError(
            f"expected d2t to name different tokens from 0 to {vocab_size - 1}, got {low} to {high} in {folder}; "
            f"choose a draft made for this target"
        )


def _unexpected(name: str, got: Any, expected: Any, folder: Path) -> UserError:
    return UserError(
        f"expected {name} of shape {tuple(expected)}, got {tuple(got)} in {folder}; choose a draft made for this target"
    )


def _filled(draft: DraftModel, weights: Weights, folder: Path) -> DraftModel:
    """`draft` with these weights. Raises `UserError` for missing ones, other shapes, and ones that nothing reads."""
    wanted = draft.state_dict()
    missing, strange = sorted(set(wanted) - set(weights)), sorted(set(weights) - set(wanted))
    if missing or strange:
        what = f"no tensor for {missing[0]}" if missing else f"the tensor {strange[0]}, which nothing reads"
        raise UserError(
            f"expected the weights of a draft of kind {draft.config.kind}, got {what} in {folder}; copy the draft "
            f"again, or choose another one"
        )
    for name, tensor in weights.items():
        if tensor.shape != wanted[name].shape:
            raise _unexpected(name, tensor.shape, wanted[name].shape, folder)
    draft.load_state_dict({name: tensor.to(wanted[name].dtype) for name, tensor in weights.items()})
    return draft
