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
from dovetail.export.artifact.source_models import SourceModel
from dovetail.export.draft.onnx_graph import FLOAT16_MAX
from dovetail.export.sources.tensors import Matrix
from dovetail.export.training.material import Material
from dovetail.runtime.errors import UserError
from dovetail.runtime.evaluation.likelihood import chunks
from dovetail.runtime.targets.base import Step, TargetEngine
from dovetail.runtime.terminal.progress import stage
from dovetail.runtime.trees.tree import chain

EXPECTED = 32  # tokens whose chances are kept: of SmolLM2 on its own answers they hold 92 % of the distribution
_BATCH_BYTES = 1 << 26  # of features that are computed at a time
_PART = 256  # rows whose logits are in memory at once

Ids = NDArray[np.int64]
# Documents' ids [T] each -> part by part, in their order, the inputs of the feature layers side by side and last the
# last hidden state, after the final norm, [T, (L + 1) * D]; and the logits [T, V]. Valid until the next part.
Reader = Callable[[Sequence[Ids]], Iterator[tuple[Matrix, Matrix]]]


@dataclasses.dataclass(frozen=True, slots=True)
class TargetRecord:
    """`features[i]` belong to the token i of the material, `expected[i]` and `chances[i]` say what follows it: the most
    likely first.
    """

    material: Material
    features: NDArray[np.float16]  # [N, (L + 1) * D]
    expected: NDArray[np.int32]  # [N, K]
    chances: NDArray[np.float16]  # [N, K]


def by_runtime(engine: TargetEngine) -> Reader:
    """The artifact's own target reads: in the numerics that the draft will meet, and several times as fast as float32
    where its weights are integers. It gives the last hidden state alone.
    """

    def read(documents: Sequence[Ids]) -> Iterator[tuple[Matrix, Matrix]]:
        sequence = engine.sequence()
        for ids in documents:
            sequence.truncate(0)
            sequence.set_text_length(len(ids))
            for chunk in chunks(ids, engine.info.vocab_size):
                out = engine.forward([Step(sequence, chain(chunk), is_prompt=True)])[0]
                yield out.features, out.logits
                sequence.commit(range(len(chunk)))
        sequence.close()

    return read


def by_source(model: SourceModel, layers: Sequence[int], head: Matrix) -> Reader:
    """The source's weights read, in float32, for a draft that is fed the inputs of `layers`; `head` [V, D]."""

    def read(documents: Sequence[Ids]) -> Iterator[tuple[Matrix, Matrix]]:
        for features in model.features(documents, layers):
            for begin in range(0, len(features), _PART):
                rows = features[begin : begin + _PART]
                yield rows, rows[:, -head.shape[1] :] @ head.T

    return read


def record(material: Material, read: Reader, width: int, vocab_size: int, folder: Path, what: str) -> TargetRecord:
    """Compute what is not in `folder` yet. `width` is (L + 1) * D; `what` names it on the progress bar. Raises
    `UserError` on a full disk.
    """
    folder.mkdir(parents=True, exist_ok=True)
    count, keep = len(material.ids), min(EXPECTED, vocab_size)
    state = folder / "record.json"
    done = _done(state, material, width)
    try:
        features = _file(folder / "features.f16", np.float16, (count, width))
        expected = _file(folder / "expected.i32", np.int32, (count, keep))
        chances = _file(folder / "chances.f16", np.float16, (count, keep))
        with stage(what) as bar:
            for documents in _batches(material, done, width):
                for rows, logits in read(documents):
                    part = slice(done, done + len(rows))
                    features[part] = rows.clip(-FLOAT16_MAX, FLOAT16_MAX)
                    expected[part], chances[part] = _expected(logits, keep)
                    done += len(rows)
                    bar.update(done / count, f"{done} tokens")
                for array in (features, expected, chances):
                    array.flush()
                _save(state, material, width, done)
    except OSError as error:
        size = count * (2 * width + 6 * keep)
        raise UserError(
            f"expected {size} bytes for what the target makes of the text, in {folder}, got: {error.strerror}; free "
            f"some space and run the same command"
        ) from None
    return TargetRecord(material, features, expected, chances)


def _batches(material: Material, done: int, width: int) -> Iterator[list[Ids]]:
    """The whole documents behind the first `done` tokens, as many at a time as are worth it."""
    most, begin, size = max(1, _BATCH_BYTES // (4 * width)), 0, 0
    documents: list[Ids] = []
    for length in material.lengths:
        if begin >= done:
            documents.append(material.ids[begin : begin + length].astype(np.int64))
            size += length
        begin += length
        if size >= most:
            yield documents
            documents, size = [], 0
    if documents:
        yield documents


def _expected(logits: Matrix, keep: int) -> tuple[NDArray[np.int32], NDArray[np.float16]]:
    """Of logits [T, V] the `keep` most likely tokens and their chances, the first first."""
    best = np.argpartition(logits, -keep, axis=1)[:, -keep:]
    best = np.take_along_axis(best, np.argsort(-np.take_along_axis(logits, best, 1), axis=1), 1)
    top = np.take_along_axis(logits, best, 1)
    total = np.exp(logits - top[:, :1]).sum(axis=1, keepdims=True)
    return best.astype(np.int32), (np.exp(top - top[:, :1]) / total).astype(np.float16)


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
