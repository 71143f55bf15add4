"""A trained Llama, and its draft, written in a bigger model's shape: the same function at the big one's cost.

Made and checked layer by layer, so that the memory is bounded by the source and the biggest layer. Every matrix is fed
real text on its way to the disk, as it is stored, and the logits at the end are held against the source's.

Letters: B windows, T tokens in a window, D hidden size, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional
from transformers import LlamaConfig, LlamaModel

from dovetail.export.artifact.atomic_folder import appearing, check_goal
from dovetail.export.convert.torch_model import body_and_head, load_torch
from dovetail.export.draft.config import DraftConfig, check_fits, config_for, read_config
from dovetail.export.inflate.enlarged_weights import CONSTANT_LEVEL, Enlargement, Weights
from dovetail.export.quiet import quiet_torch
from dovetail.export.sources.base import Source
from dovetail.export.sources.checkpoint import read_checkpoint
from dovetail.export.sources.llama_shapes import INFLATION_NOTE, SHAPES, Shape, find_shape, holding, read_shape
from dovetail.export.target.native.families import read_decoder
from dovetail.export.training.corpus import held_out_samples
from dovetail.export.training.draft_model import DraftModel, load_draft, save_draft
from dovetail.runtime.errors import UserError
from dovetail.runtime.hardware.cpu import available_memory
from dovetail.runtime.terminal.console import notice
from dovetail.runtime.terminal.progress import ProgressLine, stage

DTYPES = {"float16": torch.float16, "float32": torch.float32}
WINDOWS, WINDOW = 4, 128  # text that every layer is fed
PADDED_MARGIN = 30.0  # nats by which every padded token stays below the likely ones
# The constant channel of the target's last hidden state, against its length: its square is lost in float32.
_TINY = 2.0**-13
_ROPE_TYPES = ("default", "linear", "llama3")  # their frequencies scale alike whatever the head size
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
)
_TARGET_NAMES = {
    "q_proj": "self_attn.q_proj",
    "k_proj": "self_attn.k_proj",
    "v_proj": "self_attn.v_proj",
    "o_proj": "self_attn.o_proj",
    "gate_proj": "mlp.gate_proj",
    "up_proj": "mlp.up_proj",
    "down_proj": "mlp.down_proj",
    "input_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
}


@dataclasses.dataclass(frozen=True, slots=True)
class Agreement:
    """A grown model beside its source on text: logits, and how far below the likely tokens (their logsumexp) the
    likeliest padded one stays, in nats; None without padded tokens.
    """

    tokens: int
    largest_logit: float
    largest_difference: float
    argmax_agreement: float
    padded_margin: float | None


@dataclasses.dataclass(frozen=True, slots=True)
class Inflation:
    """What was made of what; stored as `inflation.json` beside the weights. Text and acceptance are the source's, cost
    is the shape's.
    """

    source: str
    source_shape: Shape
    like: str
    shape: Shape
    dtype: str
    seed: int
    parameters: int
    target: Agreement
    draft_parameters: int | None = None
    draft: Agreement | None = None


def inflate(
    source: Path,
    like: str,
    out: Path,
    *,
    draft: Path | None = None,
    draft_out: Path | None = None,
    dtype: str = "float16",
    seed: int = 0,
    force: bool = False,
) -> Inflation:
    """Write the checkpoint `source` in the shape `like` (a name in `SHAPES`, or a folder with config.json) to `out`,
    and its `draft` to `draft_out`. A named shape with fewer layers or tokens than the source gets the source's, at the
    same weights a pass (`holding`); a folder's shape is taken as it is.

    With float32 the logits are the source's to float32 rounding, and so they are again when both are compressed to INT8
    (exactly the same 8-bit weights if head_dim is kept); float16 rounds the weights first. Raises `UserError`
    for what the caller can mend; nothing is written then.
    """
    checkpoint = read_checkpoint(source)
    small, shape = read_shape(source), find_shape(like)
    name = like if like in SHAPES else Path(like).absolute().name
    if like in SHAPES and (held := holding(shape, small)) != shape:
        notice(
            f"{like} with {held.num_layers} layers for {shape.num_layers}, {held.vocab_size} tokens for "
            f"{shape.vocab_size} and so {held.intermediate_size} feed-forward units for {shape.intermediate_size}: a "
            f"pass reads {held.pass_weights() / 1e6:.0f} M weights, {like}'s {shape.pass_weights() / 1e6:.0f} M"
        )
        shape, name = held, f"{like} in {held.num_layers} layers"
    enlargement = Enlargement(small, shape, seed)
    config = _config(source, small, shape, dtype)
    draft_config = None if draft is None else _draft_config(draft, checkpoint, config)
    goals = [goal for goal in (out, draft_out) if goal is not None]
    if len({goal.absolute() for goal in goals}) < len(goals):
        raise UserError(f"expected two folders, got {out} for both the target and the draft; choose another one for it")
    for goal in goals:
        check_goal(goal, force)
    blocks = 0 if draft_config is None else draft_config.num_layers
    _check_room(out, small, shape, blocks, DTYPES[dtype])
    model = load_torch(source)
    windows = _windows(source, min(WINDOW, config.max_position_embeddings))
    with ExitStack() as folders, stage(f"inflating to {name}") as line, torch.no_grad():
        folder = folders.enter_context(appearing(out, force))
        target = _GrownTarget(model, enlargement, config, dtype, windows)
        agreement = target.write(folder, line)
        for file in _TOKENIZER_FILES:
            if (source / file).is_file():
                shutil.copyfile(source / file, folder / file)
        report = Inflation(source.absolute().name, small, name, shape, dtype, seed, shape.parameters(), agreement)
        if draft is not None and draft_out is not None and draft_config is not None:
            line.update(0.95, "draft")
            draft_folder = folders.enter_context(appearing(draft_out, force))
            draft_agreement = _write_draft(draft, draft_config, draft_folder, target)
            report = dataclasses.replace(report, draft_parameters=shape.draft_parameters(blocks), draft=draft_agreement)
            _write_json(draft_folder / INFLATION_NOTE, dataclasses.asdict(report))
        _write_json(folder / INFLATION_NOTE, dataclasses.asdict(report))
        line.update(1.0, "done")
    return report


class _GrownTarget:
    """The target, made, checked and written layer by layer. Of the big model only the embedding and the head stay in
    memory, for the draft.
    """

    def __init__(self, model: Any, enlargement: Enlargement, config: Any, dtype: str, windows: Tensor) -> None:
        self.model, self.enlargement, self.dtype, self.windows = model, enlargement, DTYPES[dtype], windows
        self._config = config
        self._shards: dict[str, str] = {}
        self._bytes = 0

    def write(self, folder: Path, line: ProgressLine) -> Agreement:
        """Fill the checkpoint folder."""
        shape, layers = self.enlargement.shape, self.enlargement.shape.num_layers
        body, embedding, head = body_and_head(self.model)
        count = layers + 2
        self.embedding = self._store(folder, 0, {"model.embed_tokens.weight": self.enlargement.embedding(embedding)})[0]
        hidden = functional.embedding(self.windows, self.embedding)  # [B, T, D]
        stack = _OneLayer(self._config)
        for i in range(layers):
            hidden = self._layer(body, stack, i, hidden, folder)
            line.update((i + 1) / count, f"layer {i + 1} of {layers}")
        norm = self.enlargement.norm(body.norm.weight)
        if self.enlargement.pads_vocabulary:
            held = _normed(hidden, self._config.rms_norm_eps)[..., -1].min()
            norm[-1] = min(CONSTANT_LEVEL / float(held), float(torch.finfo(torch.float16).max))
        stored = {"model.norm.weight": norm, "lm_head.weight": self.enlargement.lm_head(head)}
        norm, self.lm_head = self._store(folder, layers + 1, stored)
        self.features = _normed(hidden, self._config.rms_norm_eps) * norm  # [B, T, D]
        self.source_features = body(input_ids=self.windows, use_cache=False).last_hidden_state  # [B, T, d]
        _write_json(
            folder / "model.safetensors.index.json",
            {
                "metadata": {"total_size": self._bytes, "total_parameters": shape.parameters()},
                "weight_map": self._shards,
            },
        )
        _write_json(folder / "config.json", self._config.to_dict())
        return _compare(self.source_features, head, self.features, self.lm_head)

    def _layer(self, body: Any, stack: _OneLayer, i: int, hidden: Tensor, folder: Path) -> Tensor:
        """Make and store layer i; returns its output."""
        trained = i < self.enlargement.source.num_layers
        old = body.layers[min(i, self.enlargement.source.num_layers - 1)].state_dict()
        ours = {name: old[f"{theirs}.weight"] for name, theirs in _TARGET_NAMES.items()}
        weights = self.enlargement.layer(ours, trained)
        if self.enlargement.pads_vocabulary and i == self.enlargement.shape.num_layers - 1:
            out, y = stack(weights, hidden)
            self.enlargement.add_constant(weights, y, _TINY * float(out.norm(dim=-1).min()), trained)
        names = [f"model.layers.{i}.{_TARGET_NAMES[name]}.weight" for name in weights]
        stored = self._store(folder, i + 1, dict(zip(names, weights.values(), strict=True)))
        return stack(dict(zip(weights, stored, strict=True)), hidden)[0]

    def _store(self, folder: Path, shard: int, weights: Weights) -> list[Tensor]:
        """Write one shard; returns its weights as they are stored, in float32."""
        rounded = {name: _rounded(name, weight, self.dtype) for name, weight in weights.items()}
        file = f"model-{shard + 1:05d}-of-{self.enlargement.shape.num_layers + 2:05d}.safetensors"
        save_file(rounded, folder / file, metadata={"format": "pt"})
        self._shards |= dict.fromkeys(rounded, file)
        self._bytes += sum(weight.nbytes for weight in rounded.values())
        return [weight.float() for weight in rounded.values()]


class _OneLayer:
    """Transformers' own decoder layer, of the big shape, with whatever weights it is called with."""

    def __init__(self, config: Any) -> None:
        settings = config.to_dict() | {"num_hidden_layers": 1, "vocab_size": 1, "dtype": "float32"}
        settings |= {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
        with quiet_torch():
            self._model: Any = LlamaModel(LlamaConfig(**settings)).eval()
        self._model.norm = torch.nn.Identity()
        self._read: list[Tensor] = []
        norm = self._model.layers[0].post_attention_layernorm
        norm.register_forward_hook(lambda module, inputs, output: self._read.append(output))

    def __call__(self, weights: Weights, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """[B, T, D] -> its output [B, T, D] and what its feed-forward part read [B * T, D]."""
        named = {f"{_TARGET_NAMES[name]}.weight": weight for name, weight in weights.items()}
        self._model.layers[0].load_state_dict(named, assign=True)
        self._read.clear()
        out: Tensor = self._model(inputs_embeds=hidden, use_cache=False).last_hidden_state
        return out, self._read[0].flatten(0, 1)


def _write_draft(draft: Path, config: DraftConfig, folder: Path, target: _GrownTarget) -> Agreement:
    """Grow, check and write the draft."""
    enlargement = target.enlargement
    _, embedding, head = body_and_head(target.model)
    old = load_draft(draft, embedding, head)
    own = old.head_tokens  # the same tokens in both
    big = DraftModel(config, target.embedding, target.lm_head if own is None else target.lm_head[own], own).eval()
    weights = {f"fusion.{name}": weight for name, weight in enlargement.fusion(_of(old, "fusion.")).items()}
    for i in range(config.num_layers):
        block = enlargement.layer(_of(old, f"blocks.{i}."))
        weights |= {f"blocks.{i}.{name}": weight for name, weight in block.items()}
    tokens, pairs = target.windows[:, 1:], torch.arange(target.windows.shape[1] - 1)

    def run() -> Tensor:
        rounded = {f"{name}.weight": _rounded(name, weight, target.dtype) for name, weight in weights.items()}
        big.load_state_dict(rounded | ({} if own is None else {"head_tokens": own}))
        out: Tensor = big(tokens, target.features[:, :-1], pairs)[0]
        return out

    if enlargement.pads_vocabulary:
        last, read = f"blocks.{config.num_layers - 1}.", list[Tensor]()
        hook = big.get_submodule(f"{last}mlp_norm").register_forward_hook(lambda m, x, y: read.append(y))
        run()
        hook.remove()
        block = {name.removeprefix(last): weight for name, weight in weights.items() if name.startswith(last)}
        # No norm comes after it: at once its size.
        enlargement.add_constant(block, read[0].flatten(0, 1), CONSTANT_LEVEL)
    agreement = _compare(old(tokens, target.source_features[:, :-1], pairs)[0], head, run(), target.lm_head)
    save_draft(big.to(target.dtype), folder)
    return agreement


def _of(draft: DraftModel, part: str) -> Weights:
    named = {name: weight for name, weight in draft.state_dict().items() if name.startswith(part)}
    return {name.removeprefix(part).removesuffix(".weight"): weight for name, weight in named.items()}


def _compare(features: Tensor, head: Tensor, big_features: Tensor, big_head: Tensor) -> Agreement:
    """Of logits, window by window. Raises `UserError` when padded tokens come near."""
    vocab_size = len(head)
    largest = difference = 0.0
    equal = tokens = 0
    margin: float | None = None
    for ours, theirs in zip(big_features, features, strict=True):
        expected, logits = functional.linear(theirs, head), functional.linear(ours, big_head)  # [T, V], [T, V']
        largest = max(largest, float(expected.abs().max()))
        difference = max(difference, float((logits[:, :vocab_size] - expected).abs().max()))
        equal += int((logits.argmax(-1) == expected.argmax(-1)).sum())
        tokens += len(logits)
        if len(big_head) > vocab_size:
            below = float((expected.logsumexp(-1) - logits[:, vocab_size:].amax(-1)).min())
            margin = below if margin is None else min(below, margin)
    assert difference < 0.05 * largest, f"the grown model's logits differ by {difference}, of {largest}"
    if margin is not None and margin < PADDED_MARGIN:
        raise UserError(
            f"expected padded tokens at least {PADDED_MARGIN:.0f} nats below the likely ones, got {margin:.1f} on "
            f"text; choose a shape with the source's vocabulary of {vocab_size}"
        )
    return Agreement(tokens, largest, difference, equal / tokens, margin)


def _normed(x: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


def _rounded(name: str, weight: Tensor, dtype: torch.dtype) -> Tensor:
    rounded = weight.to(dtype).contiguous()
    if not rounded.isfinite().all():
        raise UserError(f"expected weights that {dtype} holds, got too large ones in {name}; use `dtype` float32")
    return rounded


def _config(source: Path, small: Shape, shape: Shape, dtype: str) -> Any:
    """The big model's transformers config."""
    old: Any = LlamaConfig.from_pretrained(source, local_files_only=True)
    kind = old.rope_parameters.get("rope_type", "default")
    if shape.head_dim != small.head_dim and kind not in _ROPE_TYPES:
        raise UserError(
            f"expected rotary scaling of type {', '.join(_ROPE_TYPES)} to change head_dim, got {kind!r}, which depends "
            f"on it; choose a shape with head_dim {small.head_dim}"
        )
    sizes = {
        "hidden_size": shape.hidden_size,
        "num_hidden_layers": shape.num_layers,
        "intermediate_size": shape.intermediate_size,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "vocab_size": shape.vocab_size,
        "rms_norm_eps": old.rms_norm_eps * small.hidden_size / shape.hidden_size,
        "tie_word_embeddings": False,  # the embedding has zeros where the head may not
        "dtype": dtype,
    }
    return LlamaConfig(**old.to_dict() | sizes)


def _draft_config(draft: Path, source: Source, config: Any) -> DraftConfig:
    """The config of the draft for the big target, whose transformers `config` is given. Raises `UserError` if `draft`
    was not made for the `source`.
    """
    ours = read_config(draft)
    if ours.kind != "dgf":
        raise UserError(f"expected a draft of kind dgf, got {ours.kind} in {draft}; only that kind can be inflated")
    check_fits(ours, *source.sizes())
    kept: dict[str, Any] = {"head_size": ours.head_size, "vocabulary_sha256": ours.vocabulary_sha256}
    theirs = config_for(read_decoder(source), ours.num_layers, **kept)
    same = dataclasses.replace(ours, rope_frequencies=theirs.rope_frequencies) == theirs
    if not same or not np.allclose(ours.rope_frequencies, theirs.rope_frequencies, rtol=1e-6):
        raise UserError(
            f"expected a draft with the target's heads, widths and rotary frequencies, got another in {draft}; give "
            f"the draft that was trained for this target"
        )
    big = read_decoder(dataclasses.replace(source, config=config.to_dict()))
    return config_for(big, ours.num_layers, **kept)


def _windows(source: Path, window: int) -> Tensor:
    """The beginnings of held-out texts.  # [B, T] int64"""
    tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
    encoded = (tokenizer.encode(text[: 40 * window]).ids[:window] for text in held_out_samples())
    return torch.tensor(list(itertools.islice((ids for ids in encoded if len(ids) == window), WINDOWS)))


def _check_room(out: Path, small: Shape, shape: Shape, blocks: int, dtype: torch.dtype) -> None:
    """Raise `UserError` unless memory and disk suffice, by estimates on the safe side."""
    head, draft = shape.vocab_size * shape.hidden_size, shape.draft_parameters(blocks) if blocks else 0
    logits = 4 * WINDOW * shape.vocab_size
    # Float32: the source, the embedding, and of the biggest piece itself, its parts in the making and as it is stored.
    numbers = small.parameters() + head + 4 * max(head, shape.layer_parameters(), draft) + logits
    memory, disk = 4 * numbers + (1 << 29), dtype.itemsize * (shape.parameters() + draft)
    rooms = (("memory", memory, available_memory()), ("disk", disk, shutil.disk_usage(out.absolute().parent).free))
    for what, needed, free in rooms:
        if needed > free:
            raise UserError(
                f"expected {needed / 1e9:.1f} GB of {what} for {shape.parameters() / 1e9:.2f} B parameters, got "
                f"{free / 1e9:.1f} GB; free some or choose a smaller shape"
            )


def _write_json(path: Path, document: dict[str, Any]) -> None:
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
