"""The draft: an ONNX graph that proposes a token tree, and the key/value cache it needs. ONNX Runtime only.

Letters: T tokens in a call, P tokens already in the cache, R rows wanted, K children per row, W rows expanded at a
level, D hidden size, L draft layers, H key/value heads, E head size.

The draft reads pairs (EAGLE, Li et al. 2024, arXiv 2401.15077, section 4.1): the target's feature of position t goes
with the token of position t + 1. Inside a drafted branch the target's features do not exist yet, and the draft's own
predictions stand in.
"""

from __future__ import annotations

import dataclasses
import math
import time
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from dovetail.runtime.errors import ArtifactError, DeviceError, DraftError
from dovetail.runtime.manifest import DraftInfo
from dovetail.runtime.policy import Growth
from dovetail.runtime.tree import Bools, Float32s, Int64s, Tree, TreeBuilder, root_only

PREFILL_CHUNK = 256
TREE_ROWS = 1024  # cache room for the expanded candidates of one tree


class Draft(Protocol):
    """Guesses the target's next tokens for one text."""

    @property
    def native_s(self) -> float: ...  # seconds spent inside the draft's engine so far
    @property
    def bytes_in(self) -> int: ...  # handed to the draft's engine for this text so far, its cache not counted
    @property
    def bytes_out(self) -> int: ...

    def propose(self, tokens: Int64s, features: Float32s, growth: Growth) -> Tree:
        """A tree rooted at `tokens[-1]`.

        `tokens` [n] are new since the last call. `features` [m, D] are the target's for the tokens one position
        before; m == n, except on the first call of a text, where m == n - 1: the first token follows nothing.
        """
        ...


class NoDraft:
    """Plain decoding: the tree is its root."""

    native_s = 0.0
    bytes_in = bytes_out = 0

    def propose(self, tokens: Int64s, features: Float32s, growth: Growth) -> Tree:
        """The last token alone."""
        return root_only(int(tokens[-1]))


@dataclasses.dataclass(frozen=True, slots=True)
class DraftOutput:
    """One call's results for the R rows wanted."""

    top_tokens: Int64s  # [R, K]
    top_log_probs: Float32s  # [R, K] descending
    features: npt.NDArray[np.float16]  # [R, D] predicted


class DraftModel:
    """The ONNX session. Sequences share it; calls come from one thread at a time."""

    def __init__(self, path: Path, info: DraftInfo, *, device: str, threads: int, context_length: int) -> None:
        """Load the graph at `path`. `device` is `cpu`, `cuda` or `cuda:i`. Raises `DeviceError` if the session did
        not get it.
        """
        import onnxruntime as ort

        self.info = info
        self.context_length = context_length
        self.native_s = 0.0
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        # Idle workers that spin would take the target's cores between two draft calls.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        providers = _providers(device)
        try:
            self._session = ort.InferenceSession(str(path), options, providers=providers)
        except Exception as error:  # ONNX Runtime has a dozen exception types and no common base but this
            reason = " ".join(str(error).split())[:200]
            raise ArtifactError(
                f"{path}: expected a draft that ONNX Runtime loads, got: {reason}; export again"
            ) from None
        provider = self._session.get_providers()[0]
        if device.startswith("cuda") and provider != "CUDAExecutionProvider":
            raise DeviceError(
                f"--draft-device {device}: expected the CUDA provider, the session got {provider}; "
                "install the CUDA libraries or use cpu"
            )
        self._outputs = [output.name for output in self._session.get_outputs()]
        self._check_sizes(path)
        caches = [f"{kind}.{i}" for i in range(info.num_layers) for kind in ("key", "value")]
        self.past_names, self.new_names = [f"past_{name}" for name in caches], [f"new_{name}" for name in caches]

    def _check_sizes(self, path: Path) -> None:
        """The graph has the inputs and sizes that the manifest says."""
        info = self.info
        expected = {
            "input_ids": 1,
            "position_ids": 1,
            "logit_rows": 1,
            "attention_mask": 2,
        }  # dimensions, or a last size
        expected |= {"features": info.hidden_size}
        expected |= {f"past_{kind}.{i}": info.head_dim for i in range(info.num_layers) for kind in ("key", "value")}
        shapes = {port.name: port.shape for port in self._session.get_inputs()}
        got = {name: shape[-1] if isinstance(shape[-1], int) else len(shape) for name, shape in shapes.items()}
        if got != expected:
            raise ArtifactError(f"{path}: expected the inputs {expected}, got {got}; export the artifact again")

    def sequence(self) -> DraftSequence:
        """A new text."""
        return DraftSequence(self)

    def run(self, feeds: dict[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
        """One call of the graph; arrays in and out are the host's."""
        start = time.perf_counter()
        values = self._session.run(None, feeds)
        self.native_s += time.perf_counter() - start
        return dict(zip(self._outputs, values, strict=True))


class DraftSequence:
    """The draft's side of one text: its cache of verified pairs, and the tree it grows on top of them."""

    def __init__(self, model: DraftModel) -> None:
        self._model = model
        info = model.info
        # Token-major, so that the rows in use are one contiguous view and a call copies nothing.
        # Keys of layer i are at 2i, its values at 2i + 1.
        capacity = model.context_length + TREE_ROWS
        self._cache = np.zeros(
            (2 * info.num_layers, capacity, info.num_kv_heads, info.head_dim), np.float16
        )  # [2L, P, H, E]
        self.length = 0  # verified pairs in the cache
        self._unread: list[tuple[Int64s, Float32s]] = []  # verified pairs still to be read
        self.bytes_in = self.bytes_out = 0

    @property
    def native_s(self) -> float:
        """Seconds spent inside ONNX Runtime so far, over all sequences of the model."""
        return self._model.native_s

    def propose(self, tokens: Int64s, features: Float32s, growth: Growth) -> Tree:
        """See `Draft.propose`. One call of the graph per level; the first also reads the newly verified pairs.

        Where no tree is wanted, nothing is run: the pairs wait for the next call.
        """
        root = int(tokens[-1])
        self._unread.append((tokens[len(tokens) - len(features) :], features))
        if not growth.goes_on(0, [0.0]):
            return root_only(root)
        out = self._read()
        if out is None:  # the text's first token: nothing to go by
            return root_only(root)
        width = min(growth.width, out.top_tokens.shape[1])
        builder = TreeBuilder(root)
        builder.extend([0], out.top_tokens[:, :width], out.top_log_probs[:, :width])
        visible = np.zeros((1, 0), np.bool_)  # [rows of the last call, tree rows in the cache]
        level = 1
        while growth.goes_on(level, builder.newest_scores):
            chosen = builder.frontier(width)  # [W]
            source = [(candidate - builder.newest) // width for candidate in chosen]  # each one's parent's row
            size, behind = len(chosen), self.length + visible.shape[1]
            mask = np.zeros((size, behind + size), np.bool_)
            mask[:, : self.length] = True
            mask[:, self.length : behind] = visible[source]
            mask[:, behind:].flat[:: size + 1] = True  # each sees itself
            visible = mask[:, self.length :]
            positions = np.full(size, self.length + level - 1)
            out = self._call(builder.tokens_of(chosen), out.features[source], positions, mask, np.arange(size), behind)
            _require_numbers(out)
            builder.extend(chosen, out.top_tokens[:, :width], out.top_log_probs[:, :width])
            level += 1
        return builder.best(growth.drafted)

    @property
    def known(self) -> int:
        """Verified pairs it was given: in the cache, or waiting to be read."""
        return self.length + sum(len(features) for _, features in self._unread)

    def truncate(self, known: int) -> None:
        """Forget the pairs from `known` on."""
        assert 0 <= known <= self.known
        waiting, self._unread = self._unread, []
        room = known - self.length
        for tokens, features in waiting:
            self._unread.append((tokens[: max(room, 0)], features[: max(room, 0)]))
            room -= len(features)
        self.length = min(self.length, known)

    def _read(self) -> DraftOutput | None:
        """Take the verified pairs into the cache; returns the last row's output."""
        tokens, features = (np.concatenate(parts) for parts in zip(*self._unread, strict=True))
        self._unread.clear()
        pairs, out = features.astype(np.float16), None
        for begin in range(0, len(tokens), PREFILL_CHUNK):
            chunk = tokens[begin : begin + PREFILL_CHUNK]
            size = len(chunk)
            mask = np.tri(size, self.length + size, self.length, dtype=np.bool_)
            positions = self.length + np.arange(size)
            last = np.array([size - 1])
            out = self._call(chunk, pairs[begin : begin + size], positions, mask, last, self.length)
            _require_numbers(out)
            self.length += size
        return out

    def _call(
        self,
        tokens: Int64s,
        features: npt.NDArray[np.float16],
        positions: Int64s,
        mask: Bools,
        rows: Int64s,
        behind: int,
    ) -> DraftOutput:
        """Run T tokens on top of the first `behind` cache rows and write theirs after them."""
        feeds: dict[str, npt.NDArray[Any]] = {
            "input_ids": tokens,
            "features": features,
            "position_ids": positions,
            "attention_mask": mask,
            "logit_rows": rows,
        }
        self.bytes_in += sum(array.nbytes for array in feeds.values())
        feeds.update(zip(self._model.past_names, self._cache[:, :behind], strict=True))
        out = self._model.run(feeds)
        for name, cache in zip(self._model.new_names, self._cache, strict=True):
            cache[behind : behind + len(tokens)] = out[name]
        # The view renames ONNX Runtime's "long long" to the int64 that OpenVINO knows.
        done = DraftOutput(out["top_token_ids"].view(np.int64), out["top_log_probs"], out["hidden_states"])
        self.bytes_out += done.top_tokens.nbytes + done.top_log_probs.nbytes + done.features.nbytes
        return done


def _require_numbers(out: DraftOutput) -> None:
    if not math.isfinite(out.top_log_probs.sum()):  # as is every sum with something that is none
        raise DraftError("the draft's log-probabilities are not numbers")


def resolve_device(device: str) -> str:
    """`auto` as the device it stands for on this machine; anything else as it is."""
    return "cpu" if device == "auto" else device


def _providers(device: str) -> list[Any]:
    import onnxruntime as ort

    if device == "cpu":
        return ["CPUExecutionProvider"]
    name, _, index = device.partition(":")
    if name != "cuda" or (index and not index.isdigit()):
        raise DeviceError(f"--draft-device: expected auto, cpu, cuda or cuda:INDEX, got {device!r:.40}")
    if "CUDAExecutionProvider" not in ort.get_available_providers() or not _cuda_driver():
        raise DeviceError(
            f"--draft-device {device}: expected an NVIDIA GPU with its driver, found none on this machine; "
            "use --draft-device cpu"
        )
    ort.preload_dlls()
    return [("CUDAExecutionProvider", {"device_id": int(index or 0)})]


def _cuda_driver() -> bool:
    """Whether the NVIDIA driver's library can be loaded: the CUDA provider is compiled in whether or not it can ever
    run.
    """
    import ctypes

    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True
