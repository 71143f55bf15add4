"""The target on the CPU: OpenVINO, PagedAttention with a tree mask, and key/value caches that numpy owns.

Letters: S sequences in a pass, T tokens in a pass over all of them, N nodes of one sequence's tree, R rows of logits
wanted, L layers, V vocabulary, D hidden size.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import openvino as ov

from dovetail.runtime.artifact.manifest import FEATURES_OUTPUT, TargetInfo
from dovetail.runtime.errors import ArtifactError, ContextOverflowError
from dovetail.runtime.hardware.cpu import available_memory
from dovetail.runtime.targets.base import Numerics, Step, StepOutput
from dovetail.runtime.targets.openvino.inputs import Inputs
from dovetail.runtime.targets.openvino.ir import attention_window, read_ir, restrict_logits, to_paged_attention
from dovetail.runtime.targets.openvino.mapped_weights import MappedWeights
from dovetail.runtime.targets.openvino.pages import PageCopy, PagePool, PageTable

# Both keep activations in float32: bfloat16, OpenVINO's default on CPUs that have it, rounds the logits by 1e-2.
_PRECISION: dict[str, dict[str, str]] = {
    "fast": {"DYNAMIC_QUANTIZATION_GROUP_SIZE": "64", "KV_CACHE_PRECISION": "f16"},
    "exact": {"DYNAMIC_QUANTIZATION_GROUP_SIZE": "0", "KV_CACHE_PRECISION": "f32"},
}
_CACHE_SHARE = 0.25  # of the free memory
_CACHE_DTYPES = {"f32": np.float32, "f16": np.float16}


class OpenVinoTarget:
    """The compiled target and the pages of its cache. See `TargetEngine`."""

    def __init__(
        self,
        path: Path,
        info: TargetInfo,
        *,
        numerics: Numerics,
        threads: int,
        capacity: int,
        at_most: int | None = None,
    ) -> None:
        """Load the IR at `path`; the cache holds `capacity` tokens, rounded up to whole pages, or more of them up to
        `at_most`, as far as a quarter of the free memory goes. Pages take memory when they are first used.

        Raises `ArtifactError` when the IR is not a stateful decoder with a `hidden_states` result, and
        `ContextOverflowError` where there is no memory for the cache.
        """
        self.info = info
        self.numerics: Numerics = numerics
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
        kv_heads, page_size, head_dim = shapes[0]
        dtype = _CACHE_DTYPES[ports[0].element_type.get_type_name()]
        page_bytes = len(ports) * kv_heads * page_size * head_dim * np.dtype(dtype).itemsize
        num_pages = -(-capacity // page_size)
        if at_most is not None:
            within = int(_CACHE_SHARE * available_memory()) // page_bytes
            num_pages = max(num_pages, min(-(-at_most // page_size), within))
        size, free = num_pages * page_bytes, available_memory()
        if size > free:
            raise ContextOverflowError(
                f"expected memory for a cache of {size / 1e9:.1f} GB ({capacity} tokens), got {free / 1e9:.1f} GB; "
                "lower sequences or ctx_size"
            )
        self.pool = PagePool(num_pages, page_size)
        # All layers in one array, so that keeping a path is one numpy copy. Untouched pages cost no memory.
        shape = (len(ports), self.pool.num_pages, kv_heads, page_size, head_dim)
        self.cache = np.zeros(shape, dtype)  # [2L, ...]
        self._request = compiled.create_infer_request()
        for port, cache in zip(ports, self.cache, strict=True):
            self._request.set_tensor(port.any_name, ov.Tensor(cache, shared_memory=True))
        self._inputs = Inputs(self._request)

    @property
    def capacity(self) -> int:
        """See `TargetEngine`."""
        return self.pool.num_pages * self.pool.page_size

    @property
    def free(self) -> int:
        """See `TargetEngine`."""
        return self.pool.num_free * self.pool.page_size

    def sequence(self) -> OpenVinoSequence:
        """See `TargetEngine`."""
        return OpenVinoSequence(self, PageTable(self.pool))

    def forward(self, steps: Sequence[Step]) -> list[StepOutput]:
        """See `TargetEngine`."""
        tables = []
        for step in steps:
            sequence = step.sequence
            assert isinstance(sequence, OpenVinoSequence), "a sequence of another engine"
            in_window = self.window is None or sequence.length + len(step.tree) <= self.window
            assert in_window or step.tree.is_chain(), "siblings beyond the attention window"
            sequence.reserve(len(step.tree))
            tables.append(sequence.table)
        tokens, rows = self._inputs.fill(steps, tables)
        with contextlib.nullcontext() if self._packed else self._weights.read_once():
            self._request.infer(share_outputs=True)
        self._packed = self._packed or rows[-1] > 0  # no row of logits: the LM head is still to come
        logits = self._request.get_tensor("logits").data.reshape(-1, self.info.vocab_size)  # [R, V]
        features = self._request.get_tensor(FEATURES_OUTPUT).data.reshape(-1, self.info.hidden_size)  # [T, D]
        return [
            StepOutput(logits[r0:r1], features[t0:t1])
            for (r0, r1), (t0, t1) in zip(itertools.pairwise(rows), itertools.pairwise(tokens), strict=True)
        ]

    def close(self) -> None:
        """See `TargetEngine`."""
        del self._inputs, self._request, self.cache, self._weights


class OpenVinoSequence:
    """One text's pages. See `TargetSequence`."""

    def __init__(self, engine: OpenVinoTarget, table: PageTable) -> None:
        self._engine = engine
        self.table = table

    @property
    def length(self) -> int:
        """See `TargetSequence`."""
        return self.table.length

    def reserve(self, num_tokens: int) -> None:
        """See `TargetSequence`."""
        copy = self.table.reserve(num_tokens)
        if copy is not None:
            self._copy(copy)

    def commit(self, path: Sequence[int]) -> None:
        """See `TargetSequence`."""
        table, past = self.table, self.table.length
        moved = [(past + node, past + kept) for kept, node in enumerate(path) if node != kept]
        if moved:
            # All reads are done before the first write, so the two may overlap.
            sources, targets = zip(*moved, strict=True)
            source_pages, source_offsets = zip(*(table.slot(slot) for slot in sources), strict=True)
            target_pages, target_offsets = zip(*(table.slot(slot) for slot in targets), strict=True)
            cache = self._engine.cache
            cache[:, target_pages, :, target_offsets] = cache[:, source_pages, :, source_offsets]
        table.length += len(path)

    def truncate(self, length: int) -> None:
        """See `TargetSequence`."""
        self.table.truncate(length)

    def fork(self) -> OpenVinoSequence:
        """See `TargetSequence`."""
        return OpenVinoSequence(self._engine, self.table.fork())

    def close(self) -> None:
        """See `TargetSequence`."""
        self.table.truncate(0)

    def _copy(self, copy: PageCopy) -> None:
        cache = self._engine.cache
        cache[:, copy.target, :, : copy.slots] = cache[:, copy.source, :, : copy.slots]


def _check_sizes(compiled: ov.CompiledModel, info: TargetInfo, num_caches: int, path: Path) -> None:
    """The IR has the sizes that the manifest says: a row read with another width would be garbage."""
    got = {name: compiled.output(name).partial_shape[-1].get_length() for name in ("logits", FEATURES_OUTPUT)}
    expected = {"logits": info.vocab_size, FEATURES_OUTPUT: info.hidden_size}
    if got != expected or num_caches != 2 * info.num_layers:
        raise ArtifactError(
            f"{path}: expected {info.num_layers} layers and the widths {expected}, got {num_caches // 2} and {got}; "
            "export the artifact again"
        )
