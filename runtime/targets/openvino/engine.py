"""The target on the CPU: OpenVINO, PagedAttention with a tree mask, and key/value caches that numpy owns.

Letters: S sequences in a pass, T rows of a pass over all of them, N nodes of one sequence's tree, R rows of logits
wanted, L layers, V vocabulary, D hidden size.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import openvino as ov

from dovetail.runtime.artifact.manifest import FEATURES_OUTPUT, TargetInfo
from dovetail.runtime.errors import ArtifactError, CacheFullError, ContextOverflowError, PassAbandonedError
from dovetail.runtime.hardware.cpu import available_memory
from dovetail.runtime.hardware.openvino_core import openvino_core
from dovetail.runtime.targets.base import Acceptance, Numerics, Step, StepOutput
from dovetail.runtime.targets.openvino.inputs import Inputs
from dovetail.runtime.targets.openvino.ir import (
    attention_window,
    read_ir,
    restrict_logits,
    to_paged_attention,
    weight_group,
)
from dovetail.runtime.targets.openvino.layout import MAX_FILLING, Rows, filling
from dovetail.runtime.targets.openvino.mapped_weights import MappedWeights
from dovetail.runtime.targets.openvino.pages import PageCopy, PagePool, PageTable
from dovetail.runtime.trees.tree import Tree

_ACTIVATION_GROUP = 64  # inputs whose activations share a scale in `fast`
# Both keep activations in float32: bfloat16, OpenVINO's default on CPUs that have it, rounds the logits by 1e-2.
_PRECISION: dict[str, dict[str, str]] = {
    "fast": {"DYNAMIC_QUANTIZATION_GROUP_SIZE": str(_ACTIVATION_GROUP), "KV_CACHE_PRECISION": "f16"},
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
        acceptance: Acceptance = "confirmed",
        weights: Path | None = None,
    ) -> None:
        """Load the IR at `path`, its weights from `weights` or the file beside it. The cache holds `capacity` tokens,
        rounded up to whole pages, or more of them up to `at_most`, as far as a quarter of the free memory goes. Pages
        take memory when they are first used.

        Raises `ArtifactError` when the IR is not a stateful decoder with a `hidden_states` result, and
        `ContextOverflowError` where there is no memory for the cache.
        """
        self.info = info
        self.numerics: Numerics = numerics
        self.acceptance: Acceptance = acceptance
        self.threads = threads
        self._weights = MappedWeights(weights or path.with_suffix(".bin"))
        self._packed = False  # OpenVINO has its own copy of every weight
        self._is_abandoned = False  # the pass that runs, or ran last
        model = restrict_logits(to_paged_attention(read_ir(path, self._weights)))
        window = attention_window(model)
        # A mask counts the window in slots, where siblings lie between a node and its past. A row alone has its path in
        # front of it, and nothing else.
        self.window = window if acceptance == "relaxed" else None
        config = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": "f32",
            "INFERENCE_NUM_THREADS": str(threads),
            **_PRECISION[numerics],
        }
        group = weight_group(model)
        if numerics == "fast" and group is not None and group < _ACTIVATION_GROUP:
            config["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = str(group)
        compiled = openvino_core().compile_model(model, "CPU", config)
        ports = [port for port in compiled.inputs if "_cache." in port.any_name]
        shapes = [tuple(d.get_length() for d in list(port.partial_shape)[1:]) for port in ports]
        if not ports or len(set(shapes)) != 1:
            raise ArtifactError(
                f"{path}: expected one cache shape over all layers, got {sorted(set(shapes))}; not supported"
            )
        _check_sizes(compiled, info, len(ports), path)
        if window != info.sliding_window:
            raise ArtifactError(
                f"{path}: expected the attention window {info.sliding_window}, got {window}; export it again"
            )
        kv_heads, page_size, head_dim = shapes[0]
        dtype = _CACHE_DTYPES[ports[0].element_type.get_type_name()]
        page_bytes = len(ports) * kv_heads * page_size * head_dim * np.dtype(dtype).itemsize
        num_pages = -(-capacity // page_size)
        filled = -(-MAX_FILLING // page_size)  # pages of the rows that fill passes up
        if at_most is not None:
            within = int(_CACHE_SHARE * available_memory()) // page_bytes - filled
            num_pages = max(num_pages, min(-(-at_most // page_size), within))
        size, free = (num_pages + filled) * page_bytes, available_memory()
        if size > free:
            raise ContextOverflowError(
                f"expected memory for a cache of {size / 1e9:.1f} GB ({capacity} tokens), got {free / 1e9:.1f} GB; "
                "lower sequences or ctx_size"
            )
        self.pool = PagePool(num_pages + filled, page_size)
        self._filling_pages = self.pool.take(filled)
        self.capacity = num_pages * page_size
        # All layers in one array, so that keeping a path is one numpy copy. Untouched pages cost no memory.
        shape = (len(ports), self.pool.num_pages, kv_heads, page_size, head_dim)
        self.cache = np.zeros(shape, dtype)  # [2L, ...]
        self._request = compiled.create_infer_request()
        for port, cache in zip(ports, self.cache, strict=True):
            self._request.set_tensor(port.any_name, ov.Tensor(cache, shared_memory=True))
        self._inputs = Inputs(self._request)

    @property
    def free(self) -> int:
        """See `TargetEngine`."""
        return self.pool.num_free * self.pool.page_size

    def sequence(self) -> OpenVinoSequence:
        """See `TargetEngine`."""
        return OpenVinoSequence(self, PageTable(self.pool))

    def forward(self, steps: Sequence[Step], rows: int = 0) -> list[StepOutput]:
        """See `TargetEngine`."""
        parts: list[Rows] = []
        begins, rows_of_nodes = [0], []  # of every step
        logit_rows, logit_begins = list[int](), [0]
        for step in steps:
            assert isinstance(step.sequence, OpenVinoSequence), "a sequence of another engine"
            its_parts, its_rows = step.sequence.place(step)
            parts += its_parts
            logit_rows += [begins[-1] + (node if its_rows is None else its_rows[node]) for node in step.logit_rows]
            logit_begins.append(len(logit_rows))
            begins.append(begins[-1] + sum(map(len, its_parts)))
            rows_of_nodes.append(its_rows)
        fill = filling(parts, rows, self.threads, self._filling_pages)
        parts += [] if fill is None else [fill]
        if len(logit_rows) == 1 and self.acceptance == "confirmed":  # the LM head has another kernel for one row, too
            logit_rows *= 2
        self._inputs.fill(parts, logit_rows)
        self._is_abandoned = False
        try:
            with contextlib.nullcontext() if self._packed else self._weights.read_once():
                self._request.infer(share_outputs=True)
        except RuntimeError:
            if self._is_abandoned:
                raise PassAbandonedError from None
            raise
        self._packed = self._packed or bool(logit_rows)  # no row of logits: the LM head is still to come
        logits = self._request.get_tensor("logits").data.reshape(-1, self.info.vocab_size)  # [R, V]
        features = self._request.get_tensor(FEATURES_OUTPUT).data.reshape(-1, self.info.hidden_size)  # [T, D]
        outputs = []
        for i, step in enumerate(steps):
            its_rows = rows_of_nodes[i]
            own = features[begins[i] : begins[i + 1]]
            own = own[: len(step.tree)] if its_rows is None else own[its_rows]
            outputs.append(StepOutput(logits[logit_begins[i] : logit_begins[i + 1]], own))
        return outputs

    def abandon(self) -> None:
        """See `TargetEngine`. OpenVINO looks between two operators of the graph."""
        self._is_abandoned = True
        self._request.cancel()

    def close(self) -> None:
        """See `TargetEngine`."""
        del self._inputs, self._request, self.cache, self._weights


class OpenVinoSequence:
    """One text's pages, and those of its tree's branches. See `TargetSequence`."""

    def __init__(self, engine: OpenVinoTarget, table: PageTable) -> None:
        self._engine = engine
        self.table = table
        self._is_long = False  # whether the text is beyond the border of its rotary frequencies
        self._tree: Tree | None = None  # that there is room for
        self._paths: list[list[int]] = []  # of that tree
        self._branches: list[PageTable] = []  # of its paths behind the first
        self._homes: list[tuple[int, int]] | None = None  # page and offset of every node that was fed; None: in order

    @property
    def length(self) -> int:
        """See `TargetSequence`."""
        return self.table.length

    def set_text_length(self, length: int) -> None:
        """See `TargetSequence`."""
        border = self._engine.info.rope_border
        is_long = border is not None and length > border
        if is_long != self._is_long:
            self.truncate(0)
            self._is_long = is_long

    def reserve(self, num_tokens: int) -> None:
        """See `TargetSequence`."""
        copy = self.table.reserve(num_tokens)
        if copy is not None:
            self._copy(copy)

    def reserve_tree(self, tree: Tree) -> None:
        """See `TargetSequence`."""
        if tree is self._tree:
            return
        self._drop_branches()
        if self._engine.acceptance == "relaxed" or tree.is_chain():
            self.reserve(len(tree))
            self._tree, self._paths = tree, [list(range(len(tree)))]
            return
        paths = tree.paths()
        try:
            for path in paths[1:]:
                table = self.table.fork()
                self._branches.append(table)
                copy = table.reserve(len(path))
                if copy is not None:
                    self._copy(copy)
            self.reserve(max(map(len, paths)))  # whichever is kept, it ends up in the pages of the text
        except CacheFullError:
            self._drop_branches()
            raise
        self._tree, self._paths = tree, paths

    def place(self, step: Step) -> tuple[list[Rows], list[int] | None]:
        """The rows of a step, and which of them each node has; None: nodes and rows are the same."""
        tree, past = step.tree, self.length
        is_relaxed = self._engine.acceptance == "relaxed"
        if step.is_prompt or is_relaxed:
            is_chain = tree.is_chain()
            assert is_chain or self._engine.window is None or past + len(tree) <= self._engine.window, (
                "siblings beyond the attention window"
            )
            tokens = tree.tokens
            if len(tokens) == 1 and not is_relaxed:  # a block has two rows; the second is not read
                tokens = np.append(tokens, 0)
            self._drop_branches()
            self.reserve(len(tokens))
            depths, mask = (np.arange(len(tokens)), None) if is_chain else (tree.depths(), tree.ancestors())
            self._homes = None
            return [Rows(tokens, depths, past, self.table.pages, mask, is_long=self._is_long)], None
        self.reserve_tree(tree)
        tables = [self.table, *self._branches]
        parts = [
            Rows(tree.tokens[path], np.arange(len(path)), past, table.pages, are_alone=True, is_long=self._is_long)
            for path, table in zip(self._paths, tables, strict=True)
        ]
        if len(parts) == 1:
            self._homes = None
            return parts, None
        rows, homes, row = [-1] * len(tree), [(-1, -1)] * len(tree), 0
        for path, table in zip(self._paths, tables, strict=True):
            for depth, node in enumerate(path):
                if rows[node] < 0:
                    rows[node], homes[node] = row + depth, table.slot(past + depth)
            row += len(path)
        self._homes = homes
        return parts, rows

    def commit(self, path: Sequence[int]) -> None:
        """See `TargetSequence`."""
        table, past = self.table, self.table.length
        if self._homes is None:
            moved = [
                (table.slot(past + node), table.slot(past + kept)) for kept, node in enumerate(path) if node != kept
            ]
        else:
            pairs = ((self._homes[node], table.slot(past + kept)) for kept, node in enumerate(path))
            moved = [(source, target) for source, target in pairs if source != target]
        if moved:
            # All reads are done before the first write, so the two may overlap.
            sources, targets = zip(*moved, strict=True)
            source_pages, source_offsets = zip(*sources, strict=True)
            target_pages, target_offsets = zip(*targets, strict=True)
            cache = self._engine.cache
            cache[:, target_pages, :, target_offsets] = cache[:, source_pages, :, source_offsets]
        self._drop_branches()
        table.length += len(path)

    def truncate(self, length: int) -> None:
        """See `TargetSequence`."""
        self._drop_branches()
        self.table.truncate(length)

    def fork(self) -> OpenVinoSequence:
        """See `TargetSequence`."""
        other = OpenVinoSequence(self._engine, self.table.fork())
        other._is_long = self._is_long
        return other

    def close(self) -> None:
        """See `TargetSequence`."""
        self.truncate(0)

    def _drop_branches(self) -> None:
        for branch in self._branches:
            branch.truncate(0)
        self._branches, self._paths, self._tree = [], [], None

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
