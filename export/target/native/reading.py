"""What a source's weights in float32 make of a text: the yardstick of an export, computed by the parts of the graph
that is exported, a few layers at a time, so that the memory is bounded however large the model is.

Letters: T tokens, V vocabulary, D hidden size, L feature layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
from numpy.typing import NDArray
from openvino import opset13 as op

from dovetail.export.sources.base import Source
from dovetail.export.sources.tensors import Matrix
from dovetail.export.target.native.decoder import Decoder
from dovetail.export.target.native.graph import LOWEST, Parts, integers
from dovetail.export.target.native.tensor_names import EMBEDDING, HEAD, layer_shapes
from dovetail.export.target.native.weights import FloatWeights
from dovetail.runtime.hardware.openvino_core import openvino_core
from dovetail.runtime.terminal.progress import stage

PRECISE = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
_GRAPH_BYTES = 1 << 29  # of float32 weights in one graph, if a layer has no more
_HEAD_ROWS = 1 << 15  # of the LM head that are in memory at once

Ids = NDArray[np.int64]
Windows = Sequence[Ids]


def hidden_states(source: Source, decoder: Decoder, windows: Windows, layers: Sequence[int] = ()) -> list[Matrix]:
    """Of each of the `windows` [T], read from an empty cache: the inputs of `layers` side by side and what the LM head
    reads, [T, (L + 1) * D].
    """
    parts = Parts(decoder, FloatWeights(source.tensors))
    table = source.tensors[EMBEDDING]
    streams = [table.look_up(ids) * np.float32(decoder.embedding_scale) for ids in windows]
    kept: dict[int, list[Matrix]] = {}  # what a layer reads, of each window
    with stage("reading the source in float32") as bar:
        for first, last in _runs(decoder, layers):
            if first in layers:
                kept[first] = streams
            run = _layers(decoder, parts, range(first, last))
            streams = [run(x) for x in streams]
            del run  # before the next one is made
            bar.update(last / (decoder.num_layers + 1), f"layer {last} of {decoder.num_layers}")
    x = _stream(decoder)
    norm = _compiled([x], parts.final_norm(x))
    inputs = [[kept[layer][i] for layer in layers] for i in range(len(windows))]
    return [np.concatenate([*read, norm(x)], axis=1) for read, x in zip(inputs, streams, strict=True)]


def _runs(decoder: Decoder, layers: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Layers from one to before another that are read as one graph: small ones many at a time, because each graph takes
    a while to compile. One that a draft reads begins a run.
    """
    size = 4 * sum(math.prod(shape) for shape in layer_shapes(decoder).values())
    most, first = max(1, _GRAPH_BYTES // size), 0
    for last in range(1, decoder.num_layers + 1):
        if last - first == most or last == decoder.num_layers or last in layers:
            yield first, last
            first = last


def _layers(decoder: Decoder, parts: Parts, numbers: Sequence[int]) -> Callable[[Matrix], Matrix]:
    """The layers `numbers` as a function of what the first of them reads [T, D], from position 0 on."""
    x = stream = _stream(decoder)
    length = op.gather(op.shape_of(x), op.constant(np.array(1)), op.constant(np.array(0)))
    columns = op.range(op.constant(np.array(0)), length, op.constant(np.array(1)), "i64")
    positions, rows = op.unsqueeze(columns, integers(0)), op.unsqueeze(columns, integers(1))
    for number in numbers:
        layer = decoder.layers[number]
        angles = None if layer.rotary is None else parts.angles(layer.rotary, positions)
        seen = op.less_equal(columns, rows)
        if layer.window is not None:
            seen = op.logical_and(seen, op.greater(columns, op.subtract(rows, integers(layer.window))))
        scores = op.select(seen, op.constant(np.float32(0)), op.constant(np.float32(LOWEST)))
        mask = op.unsqueeze(scores, integers(0, 1))  # [1, 1, T, T]
        x = parts.layer(number, x, angles, mask, lambda _, keys, values: (keys, values))
    return _compiled([stream], x)


def _stream(decoder: Decoder) -> Any:
    return op.parameter([1, -1, decoder.hidden_size], np.float32)


def _compiled(inputs: list[Any], output: Any) -> Callable[[Matrix], Matrix]:
    request = openvino_core().compile_model(ov.Model([output], inputs), "CPU", PRECISE).create_infer_request()

    def run(x: Matrix) -> Matrix:
        request.infer([x[None]])
        return np.array(request.get_output_tensor(0).data[0])

    return run


def write_logits(source: Source, decoder: Decoder, hidden: Sequence[Matrix], scratch: Path) -> Matrix:
    """What the LM head makes of `hidden` [T, D] each: [sum of T, V], in the file `scratch`, from which it is mapped."""
    head = source.tensors[EMBEDDING if decoder.tied else HEAD]
    rows = np.concatenate(hidden)
    # Written as a file and only then mapped: a disk that fills under a mapping ends the process.
    with scratch.open("wb") as file:
        for start in range(0, len(rows), 256):
            part = rows[start : start + 256]
            logits = np.empty((len(part), decoder.vocab_size), np.float32)
            for first in range(0, decoder.vocab_size, _HEAD_ROWS):
                weight = head.read_rows(first, min(first + _HEAD_ROWS, decoder.vocab_size))
                np.matmul(part, weight.T, out=logits[:, first : first + len(weight)])
            logits /= np.float32(decoder.logits_divisor)
            if decoder.logits_cap is not None:
                cap = np.float32(decoder.logits_cap)
                logits = np.tanh(logits / cap) * cap
            logits.tofile(file)
    return np.memmap(scratch, np.float32, "r", shape=(len(rows), decoder.vocab_size))
