"""The target on the CPU: OpenVINO, PagedAttention with a tree mask, and key/value caches that numpy owns.

Letters: S sequences in a call, T tokens in a call over all of them, N tokens of one sequence, R rows of logits
wanted, L layers, V vocabulary, D hidden size, P tokens already in a sequence's cache.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import openvino as ov

from dovetail.runtime.artifact.manifest import FEATURES_OUTPUT, TargetInfo
from dovetail.runtime.errors import ArtifactError, ContextOverflowError
from dovetail.runtime.targets.openvino.inputs import Feeds, Layout, SequenceStep, layout_of
from dovetail.runtime.targets.openvino.ir import attention_window, read_ir, restrict_logits, to_paged_attention
from dovetail.runtime.targets.openvino.mapped_weights import MappedWeights
from dovetail.runtime.targets.openvino.pages import BlockPool, BlockTable
from dovetail.runtime.trees.shape import MAX_TREE_NODES
from dovetail.runtime.trees.tree import Float32s, Int64s, Tree

Numerics = Literal["fast", "exact"]

PREFILL_CHUNK = 256  # tokens a call: an interrupt is only seen between calls
MAX_LAYOUTS = 64  # whose input arrays are kept: one per tree size and number of blocks in use

# Both keep activations in float32: bfloat16, OpenVINO's default on CPUs that have it, rounds the logits by 1e-2.
_PRECISION: dict[str, dict[str, str]] = {
    "fast": {"DYNAMIC_QUANTIZATION_GROUP_SIZE": "64", "KV_CACHE_PRECISION": "f16"},
    "exact": {"DYNAMIC_QUANTIZATION_GROUP_SIZE": "0", "KV_CACHE_PRECISION": "f32"},
}
_CACHE_DTYPES = {"f32": np.float32, "f16": np.float16}


@dataclasses.dataclass(frozen=True, slots=True)
class StepOutput:
    """What one sequence gets back. Views of the engine's memory: valid until the next call."""

    logits: Float32s  # [R, V]
    features: Float32s  # [N, D] last hidden state, after the final norm


class TargetModel:
    """The compiled target and its cache pool. Several sequences may live in it and share a call; calls come from one
    thread at a time.
    """

    def __init__(
        self, path: Path, info: TargetInfo, *, numerics: Numerics, threads: int, cache_tokens: int, sequences: int = 1
    ) -> None:
        """Load the IR at `path` for `numerics`; the pool has room for `cache_tokens` tokens over all sequences, and
        one tree.

        Raises `ArtifactError` when the IR is not a stateful decoder with a `hidden_states` result.
        """
        self.info = info
        self.numerics = numerics
        self.native_s = 0.0  # seconds spent inside OpenVINO so far
        self._weights = MappedWeights(path.with_suffix(".bin"))
        self._packed = False  # OpenVINO has its own copy of every weight
        model = restrict_logits(to_paged_attention(read_ir(path, self._weights)))
        self.window = attention_window(model)
        config = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": "f32",
            "INFERENCE_NUM_THREADS": str(threads),
            **_PRECISION[numerics],
        }
        compiled = ov.Core().compile_model(model, "CPU", config)
        self._request = compiled.create_infer_request()
        ports = [port for port in compiled.inputs if "_cache." in port.any_name]
        shapes = [tuple(d.get_length() for d in list(port.partial_shape)[1:]) for port in ports]
        if not ports or len(set(shapes)) != 1:
            raise ArtifactError(
                f"{path}: expected one cache shape over all layers, got {sorted(set(shapes))}; not supported"
            )
        _check_sizes(compiled, info, len(ports), path)
        if self.window != info.sliding_window:
            raise ArtifactError(
                f"{path}: expected the attention window {info.sliding_window}, got {self.window}; export it again"
            )
        kv_heads, block_size, head_dim = shapes[0]
        dtype = _CACHE_DTYPES[ports[0].element_type.get_type_name()]
        self.pool = BlockPool(sequences * -(-(cache_tokens + MAX_TREE_NODES) // block_size), block_size)
        # All layers in one array, so that keeping a path is one numpy copy. Untouched pages cost no memory.
        shape = (len(ports), self.pool.num_blocks, kv_heads, block_size, head_dim)
        try:
            self._cache = np.zeros(shape, dtype)  # [2L, ...]
        except MemoryError:
            size = np.prod(shape, dtype=np.int64) * np.dtype(dtype).itemsize / 1e9
            raise ContextOverflowError(
                f"expected memory for a cache of {size:.1f} GB ({cache_tokens} tokens), got none; lower ctx_size"
            ) from None
        self._feeds: dict[Layout, Feeds] = {}
        self._bound: Layout | None = None
        for port, cache in zip(ports, self._cache, strict=True):
            self._request.set_tensor(port.any_name, ov.Tensor(cache, shared_memory=True))

    def sequence(self) -> TargetSequence:
        """A new, empty sequence."""
        return TargetSequence(self)

    def forward(self, steps: Sequence[SequenceStep]) -> list[StepOutput]:
        """One pass over the weights for all `steps`. Writes each step's keys and values behind its table's `length`,
        which stays.
        """
        for step in steps:
            step.table.reserve(len(step.tokens))
        feeds = self._bound_feeds(layout_of(steps))
        feeds.fill(steps)
        start = time.perf_counter()
        with contextlib.nullcontext() if self._packed else self._weights.read_once():
            self._request.infer(share_outputs=True)
        self.native_s += time.perf_counter() - start
        self._packed = self._packed or feeds.rows[-1] > 0  # no row of logits: the LM head is still to come
        logits = self._request.get_tensor("logits").data.reshape(-1, self.info.vocab_size)  # [R, V]
        features = self._request.get_tensor(FEATURES_OUTPUT).data.reshape(-1, self.info.hidden_size)  # [T, D]
        return [
            StepOutput(logits[r0:r1], features[t0:t1])
            for (r0, r1), (t0, t1) in zip(itertools.pairwise(feeds.rows), itertools.pairwise(feeds.tokens), strict=True)
        ]

    def _bound_feeds(self, layout: Layout) -> Feeds:
        """The inputs of this layout, bound to the request."""
        if layout != self._bound:
            feeds = self._feeds.pop(layout, None) or Feeds(layout)
            self._feeds[layout] = feeds  # the newest is last
            if len(self._feeds) > MAX_LAYOUTS:
                del self._feeds[next(iter(self._feeds))]
            feeds.bind(self._request)
            self._bound = layout
        return self._feeds[layout]

    def move_rows(self, table: BlockTable, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Copy cache rows between slots of one sequence, in every layer; all are read before any is written."""
        source_blocks, source_offsets = zip(*(table.slot(s) for s in sources), strict=True)
        target_blocks, target_offsets = zip(*(table.slot(s) for s in targets), strict=True)
        self._cache[:, target_blocks, :, target_offsets] = self._cache[:, source_blocks, :, source_offsets]


class TargetSequence:
    """One text in the target's cache. The last emitted token is never in it: it is the root of the next tree."""

    def __init__(self, model: TargetModel) -> None:
        self._model = model
        self._table = BlockTable(model.pool)

    @property
    def native_s(self) -> float:
        """Seconds spent inside OpenVINO so far, over all sequences of the model."""
        return self._model.native_s

    @property
    def length(self) -> int:
        """Tokens in the cache."""
        return self._table.length

    @property
    def window(self) -> int | None:
        """Tokens that the most short-sighted layer sees; None: all layers see the whole text."""
        return self._model.window

    def prefill(self, tokens: Int64s) -> StepOutput:
        """Append `tokens` [N] to the cache, a chunk a call; returns the features [N, D] of all, and the logits [1, V]
        of the last ([0, V] of none): no other row goes through the LM head.
        """
        logits = np.empty((0, self._model.info.vocab_size), np.float32)
        features = np.empty((len(tokens), self._model.info.hidden_size), np.float32)
        for begin in range(0, len(tokens), PREFILL_CHUNK):
            chunk = tokens[begin : begin + PREFILL_CHUNK]
            positions = self._table.length + np.arange(len(chunk))
            wanted = [len(chunk) - 1] if begin + len(chunk) == len(tokens) else []
            step = SequenceStep(self._table, chunk, positions, None, np.array(wanted, np.int64))
            out = self._model.forward([step])[0]
            logits, features[begin : begin + len(chunk)] = out.logits, out.features
            self._table.length += len(chunk)
        return StepOutput(logits, features)

    def step(self, tree: Tree) -> SequenceStep:
        """The tree as this sequence's part of a call."""
        size, past = len(tree), self._table.length
        window = self.window
        if tree.is_chain():
            return SequenceStep(self._table, tree.tokens, np.arange(past, past + size), None, np.arange(size))
        assert window is None or past + size <= window, "siblings beyond the attention window"
        return SequenceStep(self._table, tree.tokens, past + tree.depths(), tree.ancestors(), np.arange(size))

    def verify(self, tree: Tree) -> StepOutput:
        """Logits [N, V] and features [N, D] of every node, in one pass. The cache grows only by what `commit` keeps."""
        return self._model.forward([self.step(tree)])[0]

    def commit(self, path: Sequence[int]) -> None:
        """Keep the rows of the nodes `path` (root first, of the tree verified last) and drop the others."""
        past = self._table.length
        moved = [(past + node, past + kept) for kept, node in enumerate(path) if node != kept]
        if moved:
            self._model.move_rows(self._table, *zip(*moved, strict=True))
        self._table.length += len(path)

    def reserve(self, num_tokens: int) -> None:
        """Take the blocks for `num_tokens` more tokens now. Raises `ContextOverflowError`, changing nothing."""
        self._table.reserve(num_tokens)

    def truncate(self, length: int) -> None:
        """Forget the tokens from `length` on."""
        self._table.truncate(length)

    def close(self) -> None:
        """Give the blocks back."""
        self._table.release()


def _check_sizes(compiled: ov.CompiledModel, info: TargetInfo, num_caches: int, path: Path) -> None:
    """The IR has the sizes that the manifest says: a row read with another width would be garbage."""
    got = {name: compiled.output(name).partial_shape[-1].get_length() for name in ("logits", FEATURES_OUTPUT)}
    expected = {"logits": info.vocab_size, FEATURES_OUTPUT: info.hidden_size}
    if got != expected or num_caches != 2 * info.num_layers:
        raise ArtifactError(
            f"{path}: expected {info.num_layers} layers and the widths {expected}, got {num_caches // 2} and {got}; "
            "export the artifact again"
        )
