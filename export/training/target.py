"""A small Llama target trained from nothing on text: the demo's target. About 12 M parameters. Letters: B windows, T
positions, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from dovetail.export.training import corpus as corpora
from dovetail.export.training.corpus import Corpus
from dovetail.export.training.loop import Pace, Windows, fast_dtype, train
from dovetail.export.training.muon import Muon

CONTEXT_LENGTH = 2048
# Until this part of the stage: batches of so many windows of so many tokens. Short windows are quicker; the last ones
# teach the whole context.
WINDOW_PLAN = ((0.35, 16, 256), (0.65, 8, 512), (1.0, 2, 2048))
MUON_LR, MUON_WEIGHT_DECAY, ADAMW_LR = 0.02, 0.1, 3e-3


@dataclasses.dataclass(frozen=True, slots=True)
class TargetReport:
    """What the model card says of the target. Bits per byte are of the whole held-out text in windows of `window`
    tokens.
    """

    minutes: float
    warm_start_minutes: float
    steps: int
    window: int
    held_out_loss: float
    held_out_bits_per_byte: float
    train_tokens: int
    held_out_tokens: int
    bytes_per_token: float


def target_config(vocab_size: int) -> LlamaConfig:
    """The demo's architecture: hidden 384, 6 layers, 6 heads, 2 key/value heads, context 2,048."""
    return LlamaConfig(
        hidden_size=384,
        num_hidden_layers=6,
        intermediate_size=1024,
        num_attention_heads=6,
        num_key_value_heads=2,
        vocab_size=vocab_size,
        max_position_embeddings=CONTEXT_LENGTH,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=0,
        rms_norm_eps=1e-5,
    )


class TargetTask:
    """Next-token prediction, as `training.Task`."""

    name = "target"

    def __init__(
        self,
        model: LlamaForCausalLM,
        train_ids: NDArray[np.int32],
        held_out_ids: NDArray[np.int32],
        bytes_per_token: float,
        seed: int,
    ) -> None:
        self.model: nn.Module = model
        self._windows = Windows(train_ids, seed)
        self._held_out_ids = held_out_ids
        self._bytes_per_token = bytes_per_token
        self._dtype = fast_dtype()
        named = list(model.named_parameters())
        matrices = [p for n, p in named if p.ndim == 2 and "embed" not in n and "lm_head" not in n]
        others = [p for n, p in named if not (p.ndim == 2 and "embed" not in n and "lm_head" not in n)]
        self.optimizers: list[torch.optim.Optimizer] = [
            Muon(matrices, MUON_LR, weight_decay=MUON_WEIGHT_DECAY, iteration_dtype=self._dtype),
            torch.optim.AdamW(others, ADAMW_LR, betas=(0.9, 0.95), weight_decay=0.0),
        ]

    def loss(self, fraction: float) -> Tensor:
        count, length = next((b, t) for until, b, t in WINDOW_PLAN if fraction < until or until == 1.0)
        _, windows = self._windows.next(count, length)
        return self._nats(windows)

    def _nats(self, windows: NDArray[np.int64]) -> Tensor:
        ids = torch.from_numpy(windows)  # [B, T + 1]
        with torch.autocast("cpu", self._dtype, enabled=self._dtype != torch.float32):
            logits = self.model(input_ids=ids[:, :-1], use_cache=False).logits  # [B, T, V]
        return nn.functional.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten())

    def held_out(self, window: int = 512, max_windows: int = 100) -> dict[str, float]:
        """Mean nats a token and bits a byte over windows spread evenly over the held-out stream, without overlap."""
        available = (len(self._held_out_ids) - 1) // window
        num_windows = min(available, max_windows)
        starts = np.arange(num_windows) * available // num_windows * window
        windows = self._held_out_ids[starts[:, None] + np.arange(window + 1)].astype(np.int64)
        per_call = max(1, 4096 // window)
        total = sum(
            self._nats(part).item() * len(part) for part in np.split(windows, range(per_call, num_windows, per_call))
        )
        loss = total / num_windows
        return {"held_out_loss": loss, "bits_per_byte": loss / math.log(2) / self._bytes_per_token}

    def state_dict(self) -> dict[str, Any]:
        return {"windows": self._windows.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._windows.load_state_dict(state["windows"])


def train_target(
    corpus: Corpus,
    work: Path,
    *,
    minutes: float,
    seed: int,
    warm_start: Path | None = None,
    warm_start_minutes: float = 0.0,
) -> tuple[Path, TargetReport]:
    """Train (or go on training) the demo's target; returns its checkpoint folder, `work/target`, and the report.

    `warm_start` gives the first weights and the tokenizer, whose ids are kept; `warm_start_minutes` is what it was
    trained for before.
    """
    torch.manual_seed(seed)
    folder = work / "target"
    work.mkdir(parents=True, exist_ok=True)
    tokenizer = _tokenizer(corpus, work, warm_start)
    train_ids = corpora.encode(tokenizer, list(corpus.train.values()))
    held_out_ids = corpora.encode(tokenizer, list(corpus.held_out.values()))
    bytes_per_token = corpora.bytes_per_token(corpus.held_out.values(), len(held_out_ids))
    if warm_start is None:
        model = LlamaForCausalLM(target_config(tokenizer.get_vocab_size()))
    else:
        model = LlamaForCausalLM.from_pretrained(warm_start, dtype=torch.float32, local_files_only=True)
    task = TargetTask(model, train_ids, held_out_ids, bytes_per_token, seed)
    history = train(task, Pace(minutes), work / "target-training.pt")
    model.eval()
    with torch.no_grad():
        final = task.held_out(window=CONTEXT_LENGTH, max_windows=len(held_out_ids))
    report = TargetReport(
        minutes=history[-1]["minutes"],
        warm_start_minutes=warm_start_minutes,
        steps=int(history[-1]["step"]),
        window=CONTEXT_LENGTH,
        held_out_loss=final["held_out_loss"],
        held_out_bits_per_byte=final["bits_per_byte"],
        train_tokens=len(train_ids),
        held_out_tokens=len(held_out_ids),
        bytes_per_token=bytes_per_token,
    )
    save_target(model, tokenizer, folder)
    (work / "target-report.json").write_text(json.dumps(dataclasses.asdict(report), indent=2) + "\n", encoding="utf-8")
    return folder, report


def _tokenizer(corpus: Corpus, work: Path, warm_start: Path | None) -> Tokenizer:
    path = work / "tokenizer.json"
    if not path.exists():
        if warm_start is not None:
            tokenizer = corpora.with_document_start(Tokenizer.from_file(str(warm_start / "tokenizer.json")))
        else:
            tokenizer = corpora.train_tokenizer(corpus.train.values())
        tokenizer.save(str(path))
    return Tokenizer.from_file(str(path))


def save_target(model: LlamaForCausalLM, tokenizer: Tokenizer, folder: Path) -> None:
    """A checkpoint folder that transformers, optimum-intel and `dovetail-export model` read."""
    model.save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": corpora.END_OF_TEXT,
        "eos_token": corpora.END_OF_TEXT,
        "model_max_length": model.config.max_position_embeddings,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
