"""Training a draft for any target: on the target's features, unrolled over the draft's own guesses.

The loss per depth is SmoothL1 on the feature plus a weight times the cross-entropy against the target's soft output
(Dovetail, arXiv 2412.18934, section 3.2; the weight is 0.1 there; EAGLE, arXiv 2401.15077, trains alike). EAGLE-3
(arXiv 2503.01840, section 3.1) has the cross-entropy alone, so that its own features may become what they like. At
depth d the draft is fed its own features d - 1 times, as at run time (HASS, arXiv 2408.15766; EAGLE-3's training-time
test): that is what keeps deep branches good.

Letters: M tokens of the material, B windows, T pairs in a window, D hidden size, V vocabulary, N tokens of the draft's
LM head, L feature layers, K tokens expected.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional

from dovetail.export.artifact.atomic_file import replacing
from dovetail.export.artifact.source_models import source_model
from dovetail.export.draft.config import block_sizes, vocabulary_sha256
from dovetail.export.draft.kinds import KINDS, TRAINED_KINDS
from dovetail.export.draft.vocabulary import check_size, most_frequent
from dovetail.export.sources.base import Source
from dovetail.export.sources.tensors import Matrix
from dovetail.export.target.compression import Compression
from dovetail.export.target.native.decoder import Decoder
from dovetail.export.training.answering_target import open_target
from dovetail.export.training.cross_entropy import soft_cross_entropy
from dovetail.export.training.draft_card import draft_card
from dovetail.export.training.draft_model import Cache, DraftModel, join, save_draft
from dovetail.export.training.loop import Pace, Windows, fast_dtype, train
from dovetail.export.training.material import Split
from dovetail.export.training.muon import Muon
from dovetail.export.training.target_record import TargetRecord, by_runtime, by_source, record
from dovetail.runtime.errors import UserError

MUON_LR, MUON_WEIGHT_DECAY, ADAMW_LR, HEAD_LR = 0.03, 0.01, 3e-3, 1e-3
AGREEMENT_DEPTHS = 5


@dataclasses.dataclass(frozen=True, slots=True)
class DraftRecipe:
    """How a draft is trained. `soft_weight` is that of the cross-entropy, `noise` the half-width of the uniform noise
    on features; both are for kinds that imitate features. `vocab` tokens, the most frequent ones of what it is trained
    on, are in the draft's LM head (None: all): it neither learns nor says the others.
    """

    kind: str = "dgf"
    blocks: int = 2
    vocab: int | None = None
    minutes: float = 20.0
    seed: int = 0
    windows: int = 8
    window: int = 256
    unroll: int = 3
    soft_weight: float = 0.1
    depth_decay: float = 0.8
    noise: float = 0.1

    def __post_init__(self) -> None:
        if self.kind not in TRAINED_KINDS:
            raise UserError(f"expected `kind` {', '.join(TRAINED_KINDS)}, got {self.kind!r}; choose one of them")
        if min(self.windows, self.unroll, self.blocks) < 1 or self.window < 4 * self.unroll:
            raise UserError(
                f"expected windows of at least four times the unrolled depths, got {self.window} and {self.unroll}"
            )


@dataclasses.dataclass(frozen=True, slots=True)
class DraftReport:
    """What the model card says of the draft. `agreement[d - 1]`: share of held-out positions where the draft, fed its
    own features for d - 1 levels, has the target's most likely token first. `held_out_smooth_l1`: None for a kind that
    does not imitate features.
    """

    minutes: float
    steps: int
    parameters: int
    held_out_smooth_l1: float | None
    agreement: tuple[float, ...]


def unrolled_mask(length: int, depth: int) -> Tensor:
    """[T, depth * T] bool: what pair p may attend to in the `depth`-th call, behind the calls before it (True = may
    attend).

    Pair p sees pairs up to p - depth + 1 with the target's features, the next one with features predicted once, and so
    on up to itself.
    """
    row, column = torch.arange(length)[:, None], torch.arange(length)[None]
    parts = [column <= row - depth + 1]
    parts += [column == row - depth + d for d in range(2, depth + 1)]
    return torch.cat(parts, dim=1)


def unroll(draft: DraftModel, ids: Tensor, features: Tensor, depths: int) -> list[Tensor]:
    """The predicted features per depth, each [B, T, D]; rows below d - 1 of depth d mean nothing.

    ids [B, T]: the token of position p + 1 for pair p; features [B, T, L * D or D]: the target's of position p, not yet
    projected.
    """
    features = draft.project(features)
    length = ids.shape[1]
    positions = torch.arange(length)
    caches: list[Cache] = []
    predicted: list[Tensor] = []
    for depth in range(1, depths + 1):
        fed = features if depth == 1 else torch.cat([features[:, :1], predicted[-1][:, :-1]], dim=1)
        mask = None if depth == 1 else unrolled_mask(length, depth)
        out, new = draft(ids, fed, positions, mask, join(caches) if caches else None)
        caches.append(new)
        predicted.append(out)
    return predicted


@dataclasses.dataclass(frozen=True, slots=True)
class _Batch:
    """Windows of a record: what pairs are fed and what is expected of them."""

    tokens: Tensor  # [B, T] int64: of pair p the token of position p + 1
    fed: Tensor  # [B, T, L * D or D] the target's features of position p
    following: Tensor  # [B, T, D] its last hidden state at position p + 1
    expected: Tensor  # [B, T, K] int64: rows of the draft's head for what it expects there
    chances: Tensor  # [B, T, K] 0 for tokens that the head lacks
    weights: Tensor  # [B, T]


class DraftTask:
    """Imitating the target's features and outputs, or its outputs alone, as `training.Task`."""

    name = "draft"

    def __init__(self, draft: DraftModel, recipe: DraftRecipe, training: TargetRecord, held_out: TargetRecord) -> None:
        self.draft, self._recipe = draft, recipe
        self._training, self._checked = training, held_out
        self._imitates = draft.kind.imitates_features
        assert draft.kind.unroll_from is not None, f"training a draft of kind {draft.kind.name}"
        self._unroll_from = draft.kind.unroll_from
        self.model: nn.Module = draft
        self._windows = Windows(training.material.ids, recipe.seed)
        self._held_out_starts = _held_out_starts(len(held_out.material.ids), recipe)
        self._noise = torch.Generator().manual_seed(recipe.seed)
        self._dtype = fast_dtype()
        self._head_rows = _head_rows(draft)
        parameters = list(draft.parameters())
        matrices = [p for p in parameters if p.ndim == 2 and p is not draft.lm_head]
        self.optimizers: list[torch.optim.Optimizer] = [
            Muon(
                matrices,
                MUON_LR,
                weight_decay=MUON_WEIGHT_DECAY,
                iteration_dtype=self._dtype,
            ),
            torch.optim.AdamW([p for p in parameters if p.ndim != 2], ADAMW_LR, betas=(0.9, 0.95), weight_decay=0.0),
        ]
        if isinstance(draft.lm_head, nn.Parameter):
            self.optimizers.append(torch.optim.AdamW([draft.lm_head], HEAD_LR, betas=(0.9, 0.95), weight_decay=0.0))

    def loss(self, fraction: float) -> Tensor:
        recipe = self._recipe
        starts, _ = self._windows.next(recipe.windows, recipe.window + 1)
        batch = self._batch(self._training, starts)
        fed = batch.fed
        if self._imitates:
            fed = fed + torch.rand(fed.shape, generator=self._noise).mul_(2).sub_(1).mul_(recipe.noise)
        depths = recipe.unroll if fraction >= self._unroll_from else 1
        losses = []
        with self._autocast():
            for depth, predicted in enumerate(unroll(self.draft, batch.tokens, fed, depths), 1):
                losses.append(recipe.depth_decay ** (depth - 1) * self._depth_loss(predicted, batch, depth - 1))
        return torch.stack(losses).sum() / sum(recipe.depth_decay**d for d in range(depths))

    def _depth_loss(self, predicted: Tensor, batch: _Batch, first: int) -> Tensor:
        """Over pairs from `first` on, which are those that mean something."""
        guess, weights = predicted[:, first:], batch.weights[:, first:]
        read = self.draft.output_norm(guess).flatten(0, 1)
        expected, chances = batch.expected[:, first:].flatten(0, 1), batch.chances[:, first:].flatten(0, 1)
        loss = soft_cross_entropy(read, self.draft.lm_head, expected, chances, weights.flatten())
        if self._imitates:
            distances = functional.smooth_l1_loss(guess.float(), batch.following[:, first:], reduction="none").mean(-1)
            loss = (distances * weights).sum() / weights.sum().clamp_min(1e-9) + self._recipe.soft_weight * loss
        return loss

    def _batch(self, record: TargetRecord, starts: NDArray[np.int64]) -> _Batch:
        size = self.draft.config.hidden_size
        rows = starts[:, None] + np.arange(self._recipe.window + 1)  # [B, T + 1]
        features = torch.from_numpy(record.features[rows].astype(np.float32))
        fed = features[:, :-1, :-size] if self.draft.config.feature_layers else features[:, :-1]
        rows = rows[:, 1:]
        expected = torch.from_numpy(record.expected[rows].astype(np.int64))
        chances = torch.from_numpy(record.chances[rows].astype(np.float32))
        if self._head_rows is not None:
            expected = self._head_rows[expected]
            chances = chances * (expected >= 0)
            expected = expected.clamp_min(0)
        return _Batch(
            tokens=torch.from_numpy(record.material.ids[rows].astype(np.int64)),
            fed=fed,
            following=features[:, 1:, -size:],
            expected=expected,
            chances=chances,
            weights=torch.from_numpy(record.material.weights[rows]),
        )

    def held_out(self) -> dict[str, float]:
        """Top-1 agreement with the target by depth, and of a kind that imitates features SmoothL1 at depth 1, on
        windows of held-out text: where the target itself speaks.
        """
        agree, smooth, counted = np.zeros(AGREEMENT_DEPTHS), 0.0, 0.0
        for begin in range(0, len(self._held_out_starts), self._recipe.windows):
            starts = self._held_out_starts[begin : begin + self._recipe.windows]
            batch = self._batch(self._checked, starts)
            rows = starts[:, None] + 1 + np.arange(self._recipe.window)
            favourites = torch.from_numpy(self._checked.expected[rows, 0].astype(np.int64))  # [B, T]
            speaks = batch.weights[:, AGREEMENT_DEPTHS - 1 :] == 1  # the same positions at every depth
            with self._autocast():
                predicted = unroll(self.draft, batch.tokens, batch.fed, AGREEMENT_DEPTHS)
                for d, guess in enumerate(predicted):
                    first = self.draft.logits(guess[:, AGREEMENT_DEPTHS - 1 :]).argmax(-1)
                    said = first if self.draft.head_tokens is None else self.draft.head_tokens[first]
                    agree[d] += (said == favourites[:, AGREEMENT_DEPTHS - 1 :])[speaks].sum().item()
            counted += speaks.sum().item()
            smooth += functional.smooth_l1_loss(predicted[0].float(), batch.following).item() * len(starts)
        figures = {f"agreement_{d + 1}": float(agree[d]) / max(1.0, counted) for d in range(AGREEMENT_DEPTHS)}
        return figures | ({"smooth_l1": smooth / len(self._held_out_starts)} if self._imitates else {})

    def _autocast(self) -> torch.autocast:
        return torch.autocast("cpu", self._dtype, enabled=self._dtype != torch.float32)

    def state_dict(self) -> dict[str, Any]:
        return {"windows": self._windows.state_dict(), "noise": self._noise.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._windows.load_state_dict(state["windows"])
        self._noise.set_state(state["noise"])


def _head_rows(draft: DraftModel) -> Tensor | None:
    """The row of the draft's LM head for every token, -1 where it has none. None: it has all.  # [V]"""
    if draft.head_tokens is None:
        return None
    rows = torch.full((draft.config.vocab_size,), -1)
    rows[draft.head_tokens] = torch.arange(len(draft.head_tokens))
    return rows


def _held_out_starts(available: int, recipe: DraftRecipe, most: int = 48) -> NDArray[np.int64]:
    length = recipe.window + 1
    windows = available // length
    if windows < 1:
        raise UserError(f"expected at least {length} tokens of held-out text, got {available}; give more text")
    return np.arange(min(most, windows)) * windows // min(most, windows) * length


def train_draft(source: Source, material: Split, out: Path, recipe: DraftRecipe, *, work: Path) -> DraftReport:
    """Train (or go on training) a draft for `source`; writes the draft folder `out`. `work` keeps its checkpoint and
    what the target makes of the material.
    """
    torch.manual_seed(recipe.seed)
    target, sizes = source_model(source, Compression("int8")), block_sizes(source)
    embedding, lm_head = target.embedding_and_head()
    tokenizer = Tokenizer.from_str(source.tokenizer)
    tokens = _head_tokens(recipe.vocab, material.train.frequencies(len(lm_head)), work / "head-tokens.json")
    draft = new_draft(embedding, lm_head, sizes, recipe, tokens, vocabulary_sha256(tokenizer))
    layers = draft.config.feature_layers
    width = (len(layers) + 1) * draft.config.hidden_size
    with contextlib.ExitStack() as opened:
        if layers:
            read = by_source(target, layers, lm_head)
        else:
            pipe = opened.enter_context(open_target(source, work, sequences=1))
            read = by_runtime(pipe.target)
        training = record(material.train, read, width, len(lm_head), work / "training", "reading the text")
        held_out = record(material.held_out, read, width, len(lm_head), work / "held-out", "reading held-out text")
    task = DraftTask(draft, recipe, training, held_out)
    history = train(task, Pace(recipe.minutes), work / "draft-training.pt")
    save_draft(draft, out, torch.float16)  # half the bytes, and finer than the 8 bits it is exported in
    report = report_of(history, draft)
    card = draft_card(source, draft, recipe, report, material)
    (out / "README.md").write_text(card, encoding="utf-8")
    (out / "report.json").write_text(json.dumps(dataclasses.asdict(report), indent=2) + "\n", encoding="utf-8")
    return report


def _head_tokens(vocab: int | None, frequencies: NDArray[np.float64], path: Path) -> list[int] | None:
    """The `vocab` most frequent tokens by `frequencies` [V], None: all. They are kept in the file `path`: a run that
    goes on keeps its tokens, though what it learns from may have grown.  # [N]
    """
    if vocab is None:
        return None
    check_size(vocab, len(frequencies), "vocab")
    if path.exists():
        saved: list[int] = json.loads(path.read_text(encoding="utf-8"))
        if len(saved) == vocab:
            return saved
    tokens: list[int] = most_frequent(frequencies, vocab).tolist()
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as beside:
        beside.write_text(json.dumps(tokens), encoding="utf-8")
    return tokens


def new_draft(
    embedding: Matrix, lm_head: Matrix, sizes: Decoder, recipe: DraftRecipe, tokens: list[int] | None, vocabulary: str
) -> DraftModel:
    """An untrained draft of the recipe's kind for a target with these matrices [V, D] and `sizes`, whose tokenizer has
    the digest `vocabulary`. Its LM head has rows for `tokens` [N], None: for all; one of its own begins as the
    target's.
    """
    kind, head, kept = KINDS[recipe.kind], torch.from_numpy(lm_head), None
    if tokens is not None:
        kept = torch.tensor(tokens)
        head = head[kept]
    size = len(head) if kind.own_head or kept is not None else None
    config = kind.config_for(sizes, recipe.blocks, head_size=size, vocabulary_sha256=vocabulary)
    return DraftModel(config, torch.from_numpy(embedding), head, kept)


def report_of(history: Sequence[dict[str, float]], draft: DraftModel) -> DraftReport:
    """The last held-out figures."""
    last = history[-1]
    return DraftReport(
        minutes=last["minutes"],
        steps=int(last["step"]),
        parameters=draft.num_parameters(),
        held_out_smooth_l1=last.get("smooth_l1"),
        agreement=tuple(last[f"agreement_{d + 1}"] for d in range(AGREEMENT_DEPTHS)),
    )
