"""The artifact held against its source on held-out text: what compression and conversion changed, in numbers; and the
target's paged attention held against itself.

Letters: T tokens, V vocabulary, D hidden size.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from dovetail.export.target.ir_weights import stateful_feeds
from dovetail.runtime.artifact.manifest import TARGET_MODEL, ExportChecks, TargetInfo
from dovetail.runtime.errors import UserError
from dovetail.runtime.evaluation.likelihood import Divergence, chunks, log_probs, log_softmax
from dovetail.runtime.evaluation.standard_library import held_out_files
from dovetail.runtime.hardware.openvino_core import openvino_core
from dovetail.runtime.hardware.threads import default_threads
from dovetail.runtime.targets.base import Numerics, Step, TargetEngine, read
from dovetail.runtime.targets.openvino.engine import OpenVinoTarget
from dovetail.runtime.terminal.progress import stage
from dovetail.runtime.trees.shape import MAX_TREE_NODES
from dovetail.runtime.trees.tree import Tree, root_only

TOKENS = 2048  # of a small model; see `num_tokens`
_FEWEST_TOKENS = 256
_WEIGHTS_READ = 1 << 36  # parameters times tokens: some seconds a reading
WINDOW = 512
_MIN_TOKENS = 16
# Nats a token that rounding to these formats does not cost: where there are more, something else is wrong.
_LIMITS = {"fp32": 1e-3, "fp16": 1e-2, "keep": 2e-2}
_INTEGERS = ("int8", "int8_asym", "int4", "keep")  # weight formats with which `fast` rounds activations, too
_MAX_PERPLEXITY = 1e12  # the manifest's
_LONGEST_WINDOW = 1024  # a window of attention that is longer is not outgrown here
_PARENTS = (-1, 0, 0, 1, 1, 2, 3, 5, 0)  # of the tree that is held against its paths
_TREE_TOLERANCE = 1e-2  # of the largest logit: a wrong mask is off by far more, float32 rounding by far less

Ids = NDArray[np.int64]
Logits = NDArray[np.float32]


@dataclasses.dataclass(frozen=True, slots=True)
class Reading:
    """What a target is compared on, and how its source read it: `ids` in windows of `length`, the source's `logits`
    [T, V] or None, and the share of first children that the draft's rounded weights leave, or None.
    """

    ids: Ids
    length: int
    logits: Logits | None = None
    draft_agreement: float | None = None


def num_tokens(parameters: int, length: int) -> int:
    """On how many tokens a model with so many `parameters` is compared, read in windows of `length`: fewer the larger
    it is, but at least one window.
    """
    return max(min(TOKENS, _WEIGHTS_READ // max(1, parameters)), _FEWEST_TOKENS, length)


def held_out_ids(tokenizer: Tokenizer, text: str | None, count: int) -> Ids:
    """What is compared on: up to `count` tokens, and the one that follows, of `text`, or of held-out files of this
    interpreter's standard library. Raises `UserError` for a text too short.
    """
    if text is None:
        ids: list[int] = []
        for _, document in held_out_files():
            ids += tokenizer.encode(document[:4000]).ids
            if len(ids) > count:
                break
    else:
        ids = tokenizer.encode(text).ids
    if len(ids) < _MIN_TOKENS:
        raise UserError(
            f"expected a check text of at least {_MIN_TOKENS} tokens, got {len(ids)}; give a longer `check_text`"
        )
    return np.asarray(ids[: count + 1], np.int64)


def window_length(context: int, attention: int | None, rope_border: int | None = None) -> int:
    """How much is read at once of a model with this context and attention window: enough to outgrow the latter, where
    that is not very long, and not beyond `rope_border`.
    """
    outgrown = 2 * attention if attention is not None and attention <= _LONGEST_WINDOW else 0
    return min(max(WINDOW, outgrown), context, rope_border or context)


def windows(ids: Ids, length: int) -> Iterator[Ids]:
    """`ids` in parts of `length` that are read from an empty cache, each with the token that follows its last."""
    return (ids[start : start + length + 1] for start in range(0, len(ids) - 1, length))


def text_length(number: int, rope_border: int | None) -> int | None:
    """How long the text counts as, in which window `number` is read: of a model with such a border every second one is
    read as if it began a text beyond. None: as long as it is.
    """
    return rope_border + 1 if rope_border is not None and number % 2 else None


def torch_logits(model: Any, ids: Ids, length: int, scratch: Path) -> Logits:
    """[T, V] by the torch `model`, in the order of `windows`. They lie in the file `scratch`: a vocabulary of 150,000
    makes them 1.2 GB.
    """
    import torch

    count, row = len(ids) - 1, 0
    # Written as a file and only then mapped: a disk that fills under a mapping ends the process.
    with scratch.open("wb") as file, stage("reading held-out text with torch") as bar, torch.no_grad():
        for part in windows(ids, length):
            logits = model(input_ids=torch.from_numpy(part[:-1])[None], use_cache=False).logits[0]
            logits.float().numpy().tofile(file)
            row += len(part) - 1
            bar.update(row / count, f"{row} tokens")
    return np.memmap(scratch, np.float32, "r", shape=(count, model.config.vocab_size))


def compare(folder: Path, target: TargetInfo, reading: Reading) -> ExportChecks:
    """Read the same with the artifact's target as the runtime does, in float32, so that the figures are the artifact's
    own, and hold it against the source's logits, or for want of them against the IR as it was before the runtime's
    rewriting. Where weights are integers, read it again with activations in 8 bits, which is how it is run unless one
    asks for `exact`.

    Raises `UserError` where a target answers no finite numbers, or a tree is not verified as its paths are.
    """
    ids, reference = reading.ids, reading.logits
    own = None if reference is not None else _stateful_logits(folder / TARGET_MODEL, ids[: reading.length])
    model = _open(folder, target, reading, "exact")
    _check_tree(model, ids)
    divergence = _divergence(model, reading, own, "checking the target on held-out text")
    model.close()
    limit = _LIMITS.get(target.weight_format)
    if reference is not None and limit is not None and divergence.kl_mean > limit:
        raise UserError(
            f"expected a target as {target.weight_format} that computes what its source does, got a KL divergence of "
            f"{divergence.kl_mean:.3g} nats a token; report this model"
        )
    as_run = None
    if reference is not None and target.weight_format in _INTEGERS:
        fast = _open(folder, target, reading, "fast")
        as_run = _divergence(fast, reading, None, "reading it with activations in 8 bits")
        fast.close()
    return ExportChecks(
        tokens=divergence.tokens,
        target_kl_mean=None if reference is None else divergence.kl_mean,
        target_argmax_agreement=None if reference is None else divergence.argmax_agreement,
        draft_argmax_agreement=reading.draft_agreement,
        target_perplexity=min(divergence.perplexity, _MAX_PERPLEXITY),
        source_perplexity=None if reference is None else min(divergence.reference_perplexity, _MAX_PERPLEXITY),
        fast_kl_mean=None if as_run is None else as_run.kl_mean,
        fast_argmax_agreement=None if as_run is None else as_run.argmax_agreement,
    )


def _open(folder: Path, target: TargetInfo, reading: Reading, numerics: Numerics) -> OpenVinoTarget:
    """With trees under a mask, which is what the export has to prove; rows alone are checked where they are run."""
    return OpenVinoTarget(
        folder / TARGET_MODEL,
        target,
        numerics=numerics,
        threads=default_threads(),
        capacity=reading.length + MAX_TREE_NODES,
        acceptance="relaxed",
    )


def _divergence(model: TargetEngine, reading: Reading, own: Logits | None, what: str) -> Divergence:
    """From the source's logits, or from nothing; `own` [O, V] are of the IR before its attention was rewritten."""
    ids, reference = reading.ids, reading.logits
    divergence, row = Divergence(), 0
    with stage(what) as bar:
        for number, part in enumerate(windows(ids, reading.length)):
            rows = log_probs(model, part[:-1], text_length(number, model.info.rope_border))
            for ours, following in zip(rows, chunks(part[1:], model.info.vocab_size), strict=True):
                _check_finite(ours)
                theirs = ours if reference is None else log_softmax(reference[row : row + len(ours)])
                divergence.add(ours, theirs, following)
                if own is not None and row + len(ours) <= len(own):
                    _check_rewriting(ours, log_softmax(own[row : row + len(ours)]))
                row += len(ours)
                bar.update(row / (len(ids) - 1), f"{row} tokens")
    return divergence


def _check_finite(values: NDArray[np.floating[Any]]) -> None:
    if not np.isfinite(values).all():
        raise UserError("expected finite logits from the target, got NaN or infinity; its weights overflow")


def _check_tree(model: TargetEngine, ids: Ids) -> None:
    """A tree's logits are those of its paths, each alone: the tree mask works in this model."""
    size = len(_PARENTS)
    room = min(model.window or len(ids), model.info.rope_border or len(ids), model.info.context_length) - size
    past = max(0, min(64, len(ids) - size, room))
    prompt, tokens = ids[:past], np.arange(7, 7 + size) % model.info.vocab_size
    tree = Tree(tokens, np.array(_PARENTS)) if room >= 0 else root_only(int(tokens[0]))
    sequence = model.sequence()
    read(model, sequence, prompt)
    together = model.forward([Step(sequence, tree)])[0].logits.copy()
    sequence.close()
    _check_finite(together)
    mask = tree.ancestors()
    alone = model.sequence()
    read(model, alone, prompt)
    for node in range(len(tree)):
        path = tree.tokens[np.flatnonzero(mask[node])]
        alone.truncate(past)
        read(model, alone, path[:-1])
        expected = model.forward([Step(alone, root_only(int(path[-1])))])[0].logits[0]
        difference = float(np.abs(together[node] - expected).max() / np.abs(expected).max())
        if difference > _TREE_TOLERANCE:
            raise UserError(
                f"expected a tree to be verified as its paths are, got logits {difference:.1%} apart; OpenVINO's paged "
                f"attention does not carry this model"
            )
    alone.close()


def _check_rewriting(ours: NDArray[np.float64], theirs: NDArray[np.float64]) -> None:
    """Both in log-probabilities: the rewritten attention computes what the IR's own did."""
    divergence = float((np.exp(theirs) * (theirs - ours)).sum(axis=1).max())
    if divergence > _TREE_TOLERANCE:
        raise UserError(
            f"expected the IR's own answers after rewriting its attention, got a KL divergence of {divergence:.3f} "
            f"nats; OpenVINO's paged attention does not carry this model"
        )


def _stateful_logits(path: Path, ids: Ids) -> Logits:
    """[T, V] by the IR as it lies there."""

    from dovetail.runtime.targets.openvino.ir import read_ir

    settings = {
        "INFERENCE_PRECISION_HINT": "f32",
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0",
        "KV_CACHE_PRECISION": "f32",
    }
    request = openvino_core().compile_model(read_ir(path), "CPU", settings).create_infer_request()
    wanted = {name for port in request.model_inputs for name in port.get_names()}
    request.infer({name: value for name, value in stateful_feeds(ids[None]).items() if name in wanted})
    return np.array(request.get_tensor("logits").data[0], np.float32)
