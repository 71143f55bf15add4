"""A second target, slow and obvious: a Llama in float64 numpy, whose sequences are lists of tokens.

Where the OpenVINO engine keeps keys and values, moves rows and copies pages, this one runs its model over the whole
text of every node, and a page of its cache is one token that nobody shares. What a pass gave is spoilt by the next, as
the protocol allows: who keeps a view of it, reads NaN.

Letters: B texts, T tokens of the longest, N nodes of a tree, R of them whose logits are wanted, V vocabulary, D hidden
size, H heads, K key/value heads, d size of a head.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from dovetail.runtime.artifact.manifest import TargetInfo
from dovetail.runtime.errors import CacheFullError
from dovetail.runtime.targets.base import Acceptance, Numerics, Step, StepOutput, TargetEngine
from dovetail.runtime.trees.tree import Float32s, Tree

Float64s = npt.NDArray[np.float64]

_MOST_ROWS = 20_000  # that an engine remembers


@dataclasses.dataclass(frozen=True, slots=True)
class LlamaSizes:
    """The sizes of a Llama. The defaults suit traces of hundreds of passes."""

    vocab_size: int = 32
    hidden_size: int = 16
    mlp_size: int = 16
    num_layers: int = 2
    num_heads: int = 2
    num_kv_heads: int = 1
    head_dim: int = 8
    context_length: int = 4096
    epsilon: float = 1e-6
    rope_theta: float = 10_000.0

    def __post_init__(self) -> None:
        assert self.num_heads % self.num_kv_heads == 0
        assert self.head_dim % 2 == 0


class Llama:
    """Llama (Touvron et al. 2023, arXiv 2302.13971, section 2.2) with grouped queries, over whole texts."""

    def __init__(self, sizes: LlamaSizes, weights: Mapping[str, npt.NDArray[np.floating]]) -> None:
        """`weights` have the names and shapes of transformers. Without `lm_head.weight` the head is the embedding."""
        self.sizes = sizes
        self.weights = {name: weight.astype(np.float64) for name, weight in weights.items()}

    @classmethod
    def from_checkpoint(cls, folder: Path) -> Llama:
        """Read a folder that transformers wrote, its weights in one file."""
        from safetensors.numpy import load_file

        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        rope = config["rope_parameters"]
        assert (config["model_type"], rope["rope_type"], config["hidden_act"]) == ("llama", "default", "silu")
        sizes = LlamaSizes(
            vocab_size=config["vocab_size"],
            hidden_size=config["hidden_size"],
            mlp_size=config["intermediate_size"],
            num_layers=config["num_hidden_layers"],
            num_heads=config["num_attention_heads"],
            num_kv_heads=config["num_key_value_heads"],
            head_dim=config["head_dim"],
            context_length=config["max_position_embeddings"],
            epsilon=config["rms_norm_eps"],
            rope_theta=rope["rope_theta"],
        )
        return cls(sizes, load_file(folder / "model.safetensors"))

    @classmethod
    def random(cls, sizes: LlamaSizes, seed: int) -> Llama:
        """Weights wide enough that the logits are far from flat; the head is the embedding."""
        rng = np.random.default_rng(seed)

        def matrix(rows: int, columns: int) -> Float64s:
            return rng.normal(0.0, 2 / np.sqrt(columns), (rows, columns))

        hidden, queries = sizes.hidden_size, sizes.num_heads * sizes.head_dim
        weights = {"model.embed_tokens.weight": matrix(sizes.vocab_size, hidden), "model.norm.weight": np.ones(hidden)}
        for i in range(sizes.num_layers):
            layer = {
                "input_layernorm": np.ones(hidden),
                "self_attn.q_proj": matrix(queries, hidden),
                "self_attn.k_proj": matrix(sizes.num_kv_heads * sizes.head_dim, hidden),
                "self_attn.v_proj": matrix(sizes.num_kv_heads * sizes.head_dim, hidden),
                "self_attn.o_proj": matrix(hidden, queries),
                "post_attention_layernorm": np.ones(hidden),
                "mlp.gate_proj": matrix(sizes.mlp_size, hidden),
                "mlp.up_proj": matrix(sizes.mlp_size, hidden),
                "mlp.down_proj": matrix(hidden, sizes.mlp_size),
            }
            weights |= {f"model.layers.{i}.{name}.weight": weight for name, weight in layer.items()}
        return cls(sizes, weights)

    def features(self, texts: Sequence[Sequence[int]]) -> Float64s:
        """[B, T, D] last hidden state after the final norm; behind a text's end, nonsense."""
        tokens = np.zeros((len(texts), max(map(len, texts))), np.int64)  # padded where no token of the text looks
        for row, text in zip(tokens, texts, strict=True):
            row[: len(text)] = text
        assert tokens.min() >= 0
        x = self.weights["model.embed_tokens.weight"][tokens]  # [B, T, D]
        for i in range(self.sizes.num_layers):
            x = x + self._attention(f"model.layers.{i}", self._norm(f"model.layers.{i}.input_layernorm", x))
            x = x + self._mlp(f"model.layers.{i}.mlp", self._norm(f"model.layers.{i}.post_attention_layernorm", x))
        return self._norm("model.norm", x)

    def logits(self, features: Float64s) -> Float64s:
        """[..., V] of features [..., D]."""
        head = self.weights.get("lm_head.weight", self.weights["model.embed_tokens.weight"])
        return features @ head.T

    def _norm(self, name: str, x: Float64s) -> Float64s:
        normed: Float64s = x / np.sqrt((x * x).mean(-1, keepdims=True) + self.sizes.epsilon)
        return normed * self.weights[f"{name}.weight"]

    def _mlp(self, name: str, x: Float64s) -> Float64s:
        gate, up, down = (self.weights[f"{name}.{part}_proj.weight"] for part in ("gate", "up", "down"))
        gated = x @ gate.T
        inner: Float64s = gated / (1 + np.exp(-gated)) * (x @ up.T)
        return inner @ down.T

    def _attention(self, name: str, x: Float64s) -> Float64s:
        batch, length, _ = x.shape
        group, size = self.sizes.num_heads // self.sizes.num_kv_heads, self.sizes.head_dim

        def heads(part: str) -> Float64s:
            flat = x @ self.weights[f"{name}.self_attn.{part}_proj.weight"].T
            return flat.reshape(batch, length, -1, size).swapaxes(1, 2)

        q = self._rotated(heads("q"))  # [B, H, T, d]
        k = self._rotated(heads("k")).repeat(group, 1)  # [B, K, T, d] -> [B, H, T, d]
        v = heads("v").repeat(group, 1)
        future = np.triu(np.full((length, length), -np.inf), 1)  # which nobody sees
        scores = q @ k.swapaxes(2, 3) / np.sqrt(size) + future  # [B, H, T, T]
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = weights / weights.sum(-1, keepdims=True) @ v
        joined: Float64s = mixed.swapaxes(1, 2).reshape(batch, length, -1)
        return joined @ self.weights[f"{name}.self_attn.o_proj.weight"].T

    def _rotated(self, x: Float64s) -> Float64s:
        """Rotary position embedding (Su et al. 2021, arXiv 2104.09864) of [B, H, T, d]; pairs are d / 2 apart."""
        half = self.sizes.head_dim // 2
        angles = np.outer(np.arange(x.shape[2]), self.sizes.rope_theta ** (-np.arange(half) / half))  # [T, d / 2]
        a, b = x[..., :half], x[..., half:]
        cos, sin = np.cos(angles), np.sin(angles)
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


class NumpyTarget:
    """See `TargetEngine`. `free` counts tokens one by one."""

    numerics: Numerics = "exact"
    acceptance: Acceptance = "confirmed"
    window: int | None = None

    def __init__(self, llama: Llama, *, capacity: int) -> None:
        sizes = llama.sizes
        self.info = TargetInfo(
            architecture="llama",
            hidden_size=sizes.hidden_size,
            num_layers=sizes.num_layers,
            vocab_size=sizes.vocab_size,
            context_length=sizes.context_length,
            parameters=sum(weight.size for weight in llama.weights.values()),
            weight_format="fp32",
        )
        self.capacity = capacity
        self.free = capacity
        self._llama = llama
        self._rows: dict[tuple[int, ...], tuple[Float32s, Float32s]] = {}  # text -> its last [V], [D]
        self._lent: list[StepOutput] = []

    @classmethod
    def from_checkpoint(cls, folder: Path, *, capacity: int) -> NumpyTarget:
        """The Llama in a folder that transformers wrote."""
        return cls(Llama.from_checkpoint(folder), capacity=capacity)

    @classmethod
    def random(cls, seed: int = 0, *, vocab_size: int = 32, capacity: int = 4096) -> NumpyTarget:
        """A random Llama, small enough for traces of hundreds of passes."""
        return cls(Llama.random(LlamaSizes(vocab_size=vocab_size), seed), capacity=capacity)

    def sequence(self) -> NumpySequence:
        """See `TargetEngine`."""
        return NumpySequence(self)

    def forward(self, steps: Sequence[Step], rows: int = 0) -> list[StepOutput]:
        """See `TargetEngine`."""
        for out in self._lent:
            out.logits.fill(np.nan)
            out.features.fill(np.nan)
        assert len({id(step.sequence) for step in steps}) == len(steps), "a sequence twice in a pass"
        for step in steps:
            assert isinstance(step.sequence, NumpySequence), "a sequence of another engine"
            step.sequence.feed(step.tree)
        if len(self._rows) > _MOST_ROWS:
            self._rows.clear()
        self._lent = [self._output(step) for step in steps]
        return self._lent

    def abandon(self) -> None:
        """See `TargetEngine`. Its passes are short."""

    def close(self) -> None:
        """See `TargetEngine`."""
        del self._llama

    def _output(self, step: Step) -> StepOutput:
        assert isinstance(step.sequence, NumpySequence)
        tree, wanted = step.tree, list(step.logit_rows)
        assert wanted == sorted(set(wanted)), "wanted nodes ascend"
        parents = tree.parents.tolist()
        texts: list[tuple[int, ...]] = []
        for token, parent in zip(tree.tokens.tolist(), parents, strict=True):
            before = tuple(step.sequence.tokens) if parent == -1 else texts[parent]
            texts.append((*before, token))
        leaves = set(range(len(tree))).difference(parents)
        self._run([texts[leaf] for leaf in leaves])  # which passes by all other nodes
        logits = np.empty((len(wanted), self.info.vocab_size), np.float32)
        features = np.empty((len(tree), self.info.hidden_size), np.float32)
        for row, node in enumerate(wanted):
            logits[row] = self._rows[texts[node]][0]
        for node, text in enumerate(texts):
            features[node] = self._rows[text][1]
        return StepOutput(logits, features)

    def _run(self, texts: Sequence[tuple[int, ...]]) -> None:
        """Fill `_rows` with all beginnings of these texts."""
        new = [text for text in texts if text not in self._rows]
        if not new:
            return
        for text, features in zip(new, self._llama.features(new), strict=True):
            known = len(text) - 1  # the longest beginning that is known, and with it all that are shorter
            while known and text[:known] not in self._rows:
                known -= 1
            logits = self._llama.logits(features[known : len(text)])
            for length, row in enumerate(logits, known + 1):
                self._rows[text[:length]] = row.astype(np.float32), features[length - 1].astype(np.float32)


class NumpySequence:
    """See `TargetSequence`."""

    def __init__(self, engine: NumpyTarget) -> None:
        self.tokens: list[int] = []
        self._engine = engine
        self._taken = 0  # tokens of the engine's capacity
        self._fed: Tree | None = None  # may be committed

    @property
    def length(self) -> int:
        """See `TargetSequence`."""
        return len(self.tokens)

    def reserve(self, num_tokens: int) -> None:
        """See `TargetSequence`."""
        lacking = max(self.length + num_tokens - self._taken, 0)
        if lacking > self._engine.free:
            raise CacheFullError(f"expected {lacking} free tokens in the cache, got {self._engine.free}")
        self._engine.free -= lacking
        self._taken += lacking

    def reserve_tree(self, tree: Tree) -> None:
        """See `TargetSequence`."""
        self.reserve(len(tree))

    def feed(self, tree: Tree) -> None:
        """The engine's pass has `tree` behind the tokens."""
        self.reserve(len(tree))
        self._fed = tree

    def commit(self, path: Sequence[int]) -> None:
        """See `TargetSequence`."""
        assert self._fed is not None, "no tree was fed since the last commit or truncate"
        tokens, parents = self._fed.tokens.tolist(), self._fed.parents.tolist()
        assert [parents[node] for node in path] == [-1, *path][: len(path)], "a path begins at the root"
        self.tokens += [tokens[node] for node in path]
        self._fed = None

    def truncate(self, length: int) -> None:
        """See `TargetSequence`."""
        assert 0 <= length <= self.length
        del self.tokens[length:]
        self._engine.free += self._taken - length
        self._taken = length
        self._fed = None

    def set_text_length(self, length: int) -> None:
        """See `TargetSequence`."""

    def fork(self) -> NumpySequence:
        """See `TargetSequence`."""
        other = NumpySequence(self._engine)
        other.reserve(self.length)
        other.tokens = self.tokens.copy()
        return other

    def close(self) -> None:
        """See `TargetSequence`."""
        self.truncate(0)


def _check(target: NumpyTarget) -> TargetEngine:
    return target
