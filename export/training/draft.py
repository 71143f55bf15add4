"""Training a draft for any Llama-family target: on the target's features, unrolled over the draft's own guesses.

The loss per depth is SmoothL1 on the feature plus a weight times the cross-entropy against the target's soft output
(Dovetail, arXiv 2412.18934, section 3.2; the weight is 0.1 there; EAGLE, arXiv 2401.15077, trains alike). EAGLE-3
(arXiv 2503.01840, section 3.1) has the cross-entropy alone, so that its own features may become what they like. At
depth d the draft is fed its own features d - 1 times, as at run time (HASS, arXiv 2408.15766; EAGLE-3's training-time
test): that is what keeps deep branches good.

Letters: N tokens, B windows, T pairs in a window, D hidden size, V tokens of the LM head, L feature layers.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional

from dovetail.export.convert.torch_model import body_and_head, load_torch, target_features
from dovetail.export.draft.config import block_sizes, vocabulary_sha256
from dovetail.export.draft.kinds import KINDS, TRAINED_KINDS
from dovetail.export.draft.vocabulary import check_size, most_frequent
from dovetail.export.sources.checkpoint import read_checkpoint
from dovetail.export.target.native.decoder import Decoder
from dovetail.export.training import corpus as corpora
from dovetail.export.training.corpus import Corpus
from dovetail.export.training.draft_model import Cache, DraftModel, join, save_draft
from dovetail.export.training.loop import Pace, Windows, fast_dtype, train
from dovetail.export.training.muon import Muon
from dovetail.runtime.errors import UserError
from dovetail.runtime.terminal.progress import stage

MUON_LR, MUON_WEIGHT_DECAY, ADAMW_LR, HEAD_LR = 0.03, 0.01, 3e-3, 1e-3
AGREEMENT_DEPTHS = 5

# Token windows [B, T + 1] and their starts in the stream -> what the target computes at them, [B, T + 1, (L + 1) * D]
# float32: the inputs of the feature layers side by side, and last the last hidden state, after the final norm.
FeatureSource = Callable[[NDArray[np.int64], Tensor], Tensor]


@dataclasses.dataclass(frozen=True, slots=True)
class DraftRecipe:
    """How a draft is trained. `soft_weight` is that of the cross-entropy, `noise` the half-width of the uniform noise
    on features; both are for kinds that imitate features. `vocab` tokens, the most frequent ones, are in an `eagle3`
    draft's own LM head (None: all).
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
        if self.vocab is not None and not KINDS[self.kind].own_head:
            others = " or ".join(name for name in TRAINED_KINDS if KINDS[name].own_head)
            raise UserError(
                f"expected `vocab` with `kind` {others}, whose LM head is its own, got {self.kind}; give "
                f"dovetail-export model `draft_vocab` instead"
            )
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


def soft_cross_entropy(logits: Tensor, guess: Tensor, expected: Tensor) -> Tensor:
    """Mean over positions of -sum(p * log q), where q is the softmax of `logits` [..., V] = `guess` [..., D] W^T (what
    the LM head W reads) and `expected` = p W [..., D].

    Because sum(p * logits) = guess . (p W), the [.., V] distribution p is needed only once, not in every depth's
    forward and backward pass.
    """
    return (torch.logsumexp(logits.float(), -1) - (guess.float() * expected).sum(-1)).mean()


class DraftTask:
    """Imitating the target's features and outputs, or its outputs alone, as `training.Task`."""

    name = "draft"

    def __init__(
        self,
        draft: DraftModel,
        target_head: Tensor,
        recipe: DraftRecipe,
        train_ids: NDArray[np.int32],
        held_out_ids: NDArray[np.int32],
        features: FeatureSource,
        held_out_features: FeatureSource,
    ) -> None:
        self.draft, self._recipe = draft, recipe
        self._whole_head = target_head  # [target's vocabulary, D]
        self._target_head = target_head if draft.head_tokens is None else target_head[draft.head_tokens]  # [V, D]
        self._imitates = draft.kind.imitates_features
        assert draft.kind.unroll_from is not None, f"training a draft of kind {draft.kind.name}"
        self._unroll_from = draft.kind.unroll_from
        self.model: nn.Module = draft
        self._windows = Windows(train_ids, recipe.seed)
        self._noise = torch.Generator().manual_seed(recipe.seed)
        self._features, self._held_out_features = features, held_out_features
        self._dtype = fast_dtype()
        self._held_out = _held_out_windows(held_out_ids, recipe)
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
        starts, windows = self._windows.next(recipe.windows, recipe.window + 1)
        ids = torch.from_numpy(windows)[:, : recipe.window + 1]  # [B, T + 1]
        with torch.no_grad():
            fed, last = self._split(self._features(starts, ids))
            if self._imitates:
                fed = fed + torch.rand(fed.shape, generator=self._noise).mul_(2).sub_(1).mul_(recipe.noise)
        with self._autocast():
            expected = self._expected_rows(last)  # [B, T, D]
            depths = recipe.unroll if fraction >= self._unroll_from else 1
            losses = []
            for depth, predicted in enumerate(unroll(self.draft, ids[:, 1:], fed, depths), 1):
                guess = predicted[:, depth - 1 :]
                read = self.draft.output_norm(guess)
                loss = soft_cross_entropy(functional.linear(read, self.draft.lm_head), read, expected[:, depth - 1 :])
                if self._imitates:
                    loss = functional.smooth_l1_loss(guess.float(), last[:, depth - 1 :]) + recipe.soft_weight * loss
                losses.append(recipe.depth_decay ** (depth - 1) * loss)
        return torch.stack(losses).sum() / sum(recipe.depth_decay**d for d in range(depths))

    def _split(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """What pairs are fed [B, T, L * D or D], and the last hidden state [B, T, D] that each should lead to."""
        last = features[..., -self.draft.config.hidden_size :]
        taps = features[..., : -self.draft.config.hidden_size] if self.draft.config.feature_layers else last
        return taps[:, :-1], last[:, 1:]

    def _expected_rows(self, last: Tensor) -> Tensor:
        """The draft's LM head's rows averaged by the target's own distribution p: p W. [B, T, D] float32."""
        with torch.no_grad():
            p = torch.softmax(functional.linear(last, self._target_head).float(), -1)
        return (p @ self.draft.lm_head).float()  # a head of the draft's own is trained through this, too

    def held_out(self) -> dict[str, float]:
        """Top-1 agreement with the target by depth, and of a kind that imitates features SmoothL1 at depth 1, on
        windows of held-out text.
        """
        starts, windows = self._held_out
        agree, smooth, calls = np.zeros(AGREEMENT_DEPTHS), 0.0, 0
        for begin in range(0, len(windows), self._recipe.windows):
            ids = torch.from_numpy(windows[begin : begin + self._recipe.windows])
            fed, last = self._split(self._held_out_features(starts[begin : begin + self._recipe.windows], ids))
            with self._autocast():
                choices = functional.linear(last, self._whole_head).argmax(-1)  # [B, T]
                predicted = unroll(self.draft, ids[:, 1:], fed, AGREEMENT_DEPTHS)
                for d, guess in enumerate(predicted):
                    first = self.draft.logits(guess).argmax(-1)
                    same = (first if self.draft.head_tokens is None else self.draft.head_tokens[first]) == choices
                    agree[d] += (
                        same[:, AGREEMENT_DEPTHS - 1 :].float().mean().item()
                    )  # the same positions at every depth
            smooth += functional.smooth_l1_loss(predicted[0].float(), last).item()
            calls += 1
        figures = {f"agreement_{d + 1}": float(agree[d]) / calls for d in range(AGREEMENT_DEPTHS)}
        return figures | ({"smooth_l1": smooth / calls} if self._imitates else {})

    def _autocast(self) -> torch.autocast:
        return torch.autocast("cpu", self._dtype, enabled=self._dtype != torch.float32)

    def state_dict(self) -> dict[str, Any]:
        return {"windows": self._windows.state_dict(), "noise": self._noise.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._windows.load_state_dict(state["windows"])
        self._noise.set_state(state["noise"])


def _held_out_windows(
    ids: NDArray[np.int32], recipe: DraftRecipe, most: int = 48
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    length = recipe.window + 1
    available = len(ids) // length
    if available < 1:
        raise UserError(f"expected at least {length} tokens of held-out text, got {len(ids)}; give more text")
    starts = np.arange(min(most, available)) * available // min(most, available) * length
    return starts, ids[starts[:, None] + np.arange(length)].astype(np.int64)


def on_the_fly(target: Any, layers: Sequence[int] = ()) -> FeatureSource:
    """The target run on every window as it comes; `layers` are the feature layers."""
    dtype = fast_dtype()

    def features(starts: NDArray[np.int64], ids: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            return target_features(target, ids, layers)

    return features


def cached(
    target: Any, ids: NDArray[np.int32], path: Path, layers: Sequence[int] = (), window: int = 512
) -> FeatureSource:
    """The target run once over the whole stream, its features kept in `path` as float16 [N, (L + 1) * D]; an unfinished
    file is gone on with.

    A feature has between 0 and `window` - 1 tokens of context, as it fell.
    """
    _body, embedding, _ = body_and_head(target)
    shape, marker = (len(ids), (len(layers) + 1) * embedding.shape[1]), path.with_suffix(".done")
    path.parent.mkdir(parents=True, exist_ok=True)
    wanted_bytes = shape[0] * shape[1] * 2
    begin = int(marker.read_text()) if marker.exists() and path.exists() and path.stat().st_size == wanted_bytes else 0
    try:
        store = np.memmap(path, np.float16, "r+" if begin else "w+", shape=shape)
        source = on_the_fly(target, layers)
        with stage("features") as bar:
            for start in range(begin, len(ids), window):
                part = torch.from_numpy(ids[start : start + window].astype(np.int64))
                store[start : start + window] = source(np.array([start]), part[None])[0].half().numpy()
                if start // window % 64 == 63:
                    store.flush()
                    marker.write_text(str(start + window))
                bar.update((start + window) / len(ids), f"{start + window} tokens")
        store.flush()
        marker.write_text(str(len(ids)))
    except OSError as error:
        raise UserError(
            f"expected {wanted_bytes} bytes for the features in {path}, got: {error.strerror}; free some space"
        ) from None

    def features(starts: NDArray[np.int64], ids: Tensor) -> Tensor:
        rows = np.asarray(starts)[:, None] + np.arange(ids.shape[1])
        return torch.from_numpy(store[rows].astype(np.float32))

    return features


def train_draft(
    source: Path,
    corpus: Corpus,
    out: Path,
    recipe: DraftRecipe,
    *,
    work: Path,
    feature_cache: Path | None = None,
) -> DraftReport:
    """Train (or go on training) a draft for the checkpoint `source`; writes the draft folder `out`, keeps its
    checkpoint in `work`.
    """
    torch.manual_seed(recipe.seed)
    target = load_torch(source).requires_grad_(False)
    _, _, lm_head = body_and_head(target)
    checkpoint = read_checkpoint(source)
    tokenizer = Tokenizer.from_str(checkpoint.tokenizer)
    train_ids, held_out_ids = (
        corpora.encode(tokenizer, list(part.values())) for part in (corpus.train, corpus.held_out)
    )
    draft = new_draft(target, block_sizes(checkpoint), recipe, train_ids, vocabulary_sha256(tokenizer))
    layers = draft.config.feature_layers
    live = on_the_fly(target, layers)
    source_of_features = live if feature_cache is None else cached(target, train_ids, feature_cache, layers)
    task = DraftTask(draft, lm_head, recipe, train_ids, held_out_ids, source_of_features, live)
    history = train(task, Pace(recipe.minutes), work / "draft-training.pt")
    save_draft(draft, out)
    report = report_of(history, draft)
    (out / "report.json").write_text(json.dumps(dataclasses.asdict(report), indent=2) + "\n", encoding="utf-8")
    return report


def new_draft(
    target: Any, sizes: Decoder, recipe: DraftRecipe, train_ids: NDArray[np.int32], vocabulary: str
) -> DraftModel:
    """An untrained draft of the recipe's kind for the torch model `target`, which has these `sizes`; its tokenizer has
    the digest `vocabulary`.

    A head of its own begins as the target's rows for the most frequent tokens of `train_ids`.
    """
    _, embedding, lm_head = body_and_head(target)
    kind = KINDS[recipe.kind]
    if not kind.own_head:
        config = kind.config_for(sizes, recipe.blocks, vocabulary_sha256=vocabulary)
        return DraftModel(config, embedding, lm_head)
    tokens = None
    if recipe.vocab is not None:
        check_size(recipe.vocab, len(lm_head), "vocab")
        tokens = torch.from_numpy(most_frequent(np.bincount(train_ids, minlength=len(lm_head)), recipe.vocab))
        lm_head = lm_head[tokens]
    more = {"head_size": len(lm_head), "vocabulary_sha256": vocabulary}
    return DraftModel(kind.config_for(sizes, recipe.blocks, **more), embedding, lm_head, tokens)


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
