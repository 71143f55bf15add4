"""What a target makes of a stream of tokens, computed once and kept in files: its features, and the tokens it expects
with their chances. A run that was stopped goes on with the first document that is missing, and so does one whose
stream has grown.

Letters: N tokens, V vocabulary, D hidden size, L feature layers, K tokens expected.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dovetail.export.artifact.atomic_file import replacing
from dovetail.export.draft.onnx_graph import FLOAT16_MAX
from dovetail.export.sources.tensors import Matrix
from dovetail.export.training.material import Material
from dovetail.runtime.errors import UserError
from dovetail.runtime.terminal.progress import stage

EXPECTED = 32  # tokens whose chances are kept: on real text they hold 99 % of the target's distribution
_BATCH_BYTES = 1 << 28  # of features that are computed at a time
_HEAD_BYTES = 1 << 26  # of logits at a time

Ids = NDArray[np.int64]
# Documents' ids [T] each -> the inputs of the feature layers side by side and last the last hidden state, after the
# final norm, [T, (L + 1) * D] each.
FeatureReader = Callable[[Sequence[Ids]], Sequence[Matrix]]


@dataclasses.dataclass(frozen=True, slots=True)
class TargetRecord:
    """`features[i]` belong to the token i of the material, `expected[i]` and `chances[i]` say what follows it: the most
    likely first.
    """

    material: Material
    features: NDArray[np.float16]  # [N, (L + 1) * D]
    expected: NDArray[np.int32]  # [N, K]
    chances: NDArray[np.float16]  # [N, K]


def record(material: Material, read: FeatureReader, width: int, head: Matrix, folder: Path, what: str) -> TargetRecord:
    """Compute what is not in `folder` yet. `width` is (L + 1) * D, `head` the target's LM head [V, D]; `what` names it
    on the progress bar. Raises `UserError` on a full disk.
    """
    folder.mkdir(parents=True, exist_ok=True)
    count, keep = len(material.ids), min(EXPECTED, len(head))
    state = folder / "record.json"
    done = _done(state, material, width)
    try:
        features = _file(folder / "features.f16", np.float16, (count, width))
        expected = _file(folder / "expected.i32", np.int32, (count, keep))
        chances = _file(folder / "chances.f16", np.float16, (count, keep))
        with stage(what) as bar:
            for begin, documents in _batches(material, done, width):
                rows = np.concatenate(read(documents))
                end = begin + len(rows)
                features[begin:end] = rows.clip(-FLOAT16_MAX, FLOAT16_MAX)
                expected[begin:end], chances[begin:end] = _expected(rows[:, -head.shape[1] :], head, keep)
                for array in (features, expected, chances):
                    array.flush()
                _save(state, material, width, end)
                bar.update(end / count, f"{end} tokens")
    except OSError as error:
        size = count * (2 * width + 6 * keep)
        raise UserError(
            f"expected {size} bytes for what the target makes of the text, in {folder}, got: {error.strerror}; free "
            f"some space and run the same command"
        ) from None
    return TargetRecord(material, features, expected, chances)


def _batches(material: Material, done: int, width: int) -> Iterator[tuple[int, list[Ids]]]:
    """Whole documents behind the first `done` tokens, as many at a time as are worth it, and where they begin."""
    most, begin, start = max(1, _BATCH_BYTES // (4 * width)), 0, 0
    documents: list[Ids] = []
    for length in material.lengths:
        end = begin + length
        if begin >= done:
            if not documents:
                start = begin
            documents.append(material.ids[begin:end].astype(np.int64))
            if end - start >= most:
                yield start, documents
                documents = []
        begin = end
    if documents:
        yield start, documents


def _expected(hidden: Matrix, head: Matrix, keep: int) -> tuple[NDArray[np.int32], NDArray[np.float16]]:
    """The `keep` most likely tokens behind each row [T, D] and their chances, the first first."""
    tokens = np.empty((len(hidden), keep), np.int32)
    chances = np.empty((len(hidden), keep), np.float16)
    size = max(1, _HEAD_BYTES // (4 * len(head)))
    for begin in range(0, len(hidden), size):
        logits = hidden[begin : begin + size] @ head.T  # [T, V]
        best = np.argpartition(logits, -keep, axis=1)[:, -keep:]
        best = np.take_along_axis(best, np.argsort(-np.take_along_axis(logits, best, 1), axis=1), 1)
        top = np.take_along_axis(logits, best, 1)
        logits -= top[:, :1]
        total = np.exp(logits, out=logits).sum(axis=1, keepdims=True)
        tokens[begin : begin + size] = best
        chances[begin : begin + size] = np.exp(top - top[:, :1]) / total
    return tokens, chances


def _file(path: Path, dtype: type[np.generic], shape: tuple[int, int]) -> np.memmap[Any, Any]:
    """The array in a file, which grows or shrinks to its size; zeros cost no disk before they are written."""
    with path.open("ab"):
        pass
    with path.open("r+b") as file:
        file.truncate(max(1, shape[0] * shape[1]) * np.dtype(dtype).itemsize)
    return np.memmap(path, dtype, "r+", shape=shape)


def _done(state: Path, material: Material, width: int) -> int:
    """How many tokens of this very stream are in the files."""
    try:
        saved = json.loads(state.read_text(encoding="utf-8"))
        done, digest, saved_width = saved["tokens"], saved["sha256"], saved["width"]
    except (OSError, ValueError, KeyError, TypeError):
        return 0
    return done if saved_width == width and digest == _digest(material, done) else 0


def _save(state: Path, material: Material, width: int, done: int) -> None:
    document = {"tokens": done, "sha256": _digest(material, done), "width": width}
    with replacing(state) as path:
        path.write_text(json.dumps(document) + "\n", encoding="utf-8")


def _digest(material: Material, tokens: int) -> str:
    """Of the first tokens and where their documents end."""
    ends = np.cumsum(material.lengths)
    digest = hashlib.sha256(material.ids[:tokens].tobytes())
    digest.update(ends[ends <= tokens].tobytes())
    return digest.hexdigest()
