"""Proves the graph that is built: for each family what torch computes, window by window and layer by layer, what
optimum-intel's graph computes, with weights in every form that a GGUF may mix; and that its windows, and the border of
its rotary frequencies, are there for the runtime.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import openvino as ov
import pytest
import torch
from models import families

from dovetail.export.convert.optimum_export import export_target
from dovetail.export.convert.torch_model import load_torch, target_features
from dovetail.export.sources.base import Source
from dovetail.export.sources.checkpoint import read_checkpoint
from dovetail.export.sources.tensors import Matrix, StoredTensor
from dovetail.export.target.compression import Compression
from dovetail.export.target.native.decoder import Decoder
from dovetail.export.target.native.families import read_decoder
from dovetail.export.target.native.reading import hidden_states, write_logits
from dovetail.export.target.native.scheme import scheme
from dovetail.export.target.native.writing import write_native_target
from dovetail.runtime.artifact.manifest import LONG_POSITIONS, TARGET_MODEL, TargetInfo

EXACT = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0", "KV_CACHE_PRECISION": "f32"}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
NATIVE = {
    **{name: kind for name, kind in families.FAMILIES.items() if kind[0] not in ("Mixtral", "Qwen3Moe", "GptOss")},
    "Llama with biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "Llama with yarn": ("Llama", {"rope_parameters": YARN}),
    "Llama, linear": ("Llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}}),
}
IDS = np.random.default_rng(0).integers(0, families.VOCAB, 150)


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            folder = tmp_path_factory.mktemp("native") / "checkpoint"
            made[name] = families.write_family(folder, tiny_checkpoint / "tokenizer.json", *NATIVE[name])
        return made[name]

    return make


def written(source: Source, folder: Path, weight_format: str = "fp32") -> tuple[Decoder, TargetInfo, Path]:
    decoder = read_decoder(source)
    folder.mkdir(exist_ok=True)
    info = write_native_target(source, decoder, scheme(weight_format), folder, weight_format)
    return decoder, info, folder / TARGET_MODEL


def logits(path: Path, ids: Any, first: int = 0) -> Matrix:
    """[T, V] by the stateful graph, read in two parts, the first position being `first`."""
    request = ov.Core().compile_model(path, "CPU", EXACT).create_infer_request()
    inputs = {name for port in request.model_inputs for name in port.get_names()}
    parts = []
    for begin, end in ((0, len(ids) // 2), (len(ids) // 2, len(ids))):
        feeds = {
            "input_ids": ids[None, begin:end],
            "attention_mask": np.ones((1, end), np.int64),
            "position_ids": np.arange(begin, end)[None] + first,
            "beam_idx": np.zeros(1, np.int32),
        }
        request.infer({name: value for name, value in feeds.items() if name in inputs})
        parts.append(np.array(request.get_tensor("logits").data[0]))
    return np.concatenate(parts)


def by_torch(folder: Path, ids: Any) -> Matrix:
    with torch.no_grad():
        rows: Matrix = load_torch(folder)(torch.from_numpy(ids)[None], use_cache=False).logits[0].numpy()
    return rows


def near(ours: Matrix, theirs: Matrix) -> None:
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=3e-5 * np.abs(theirs).max())


@pytest.mark.parametrize("name", NATIVE)
def test_torch_computes_the_same(name: str, checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    folder = checkpoint(name)
    source = read_checkpoint(folder)
    decoder, info, path = written(source, tmp_path / "artifact")
    border = decoder.rope_border
    assert info.rope_border == border
    ids = IDS if border is None else IDS[:border]  # beyond it a text is read anew
    expected = by_torch(folder, ids)
    near(logits(path, ids), expected)
    layers = (1, 0, 1)
    parts = [ids[:-30], ids[-30:]]
    read = hidden_states(source, decoder, parts, layers)
    for part, hidden in zip(parts, read, strict=True):
        near(hidden, target_features(load_torch(folder), torch.from_numpy(part)[None], layers)[0].numpy())
    last = [hidden[:, -decoder.hidden_size :] for hidden in hidden_states(source, decoder, [ids])]
    near(write_logits(source, decoder, last, tmp_path / "logits"), expected)


def test_a_text_beyond_the_border(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    folder = checkpoint("Phi-4 mini")
    source = read_checkpoint(folder)
    decoder, _, path = written(source, tmp_path / "artifact")
    expected = by_torch(folder, IDS)
    assert decoder.rope_border is not None
    assert decoder.rope_border < len(IDS)
    near(logits(path, IDS, LONG_POSITIONS), expected)
    (hidden,) = hidden_states(source, decoder.beyond_border(), [IDS])
    near(write_logits(source, decoder, [hidden], tmp_path / "logits"), expected)
    assert np.abs(logits(path, IDS[:40], LONG_POSITIONS) - by_torch(folder, IDS[:40])).max() > 0.1, "other frequencies"


@pytest.mark.parametrize("name", ["Llama 3", "Qwen3", "Gemma 3", "Phi-3"])
def test_optimum_s_graph_computes_the_same(name: str, checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    folder = checkpoint(name)
    _, info, path = written(read_checkpoint(folder), tmp_path / "ours")
    (tmp_path / "theirs").mkdir()
    other = export_target(folder, tmp_path / "theirs", Compression("fp32"))
    near(logits(path, IDS), logits(tmp_path / "theirs" / TARGET_MODEL, IDS))
    same = {"weight_forms": None, "parameters": 1}  # it counts tables of rotary angles as well
    assert dataclasses.replace(info, **same) == dataclasses.replace(other, **same)  # type: ignore[arg-type]


BLOCKS = {
    "q_proj": "Q4_0",
    "k_proj": "Q8_0",
    "v_proj": "Q4_1",
    "gate_proj": "Q5_0",
    "up_proj": "Q5_0",
    "down_proj": "Q5_1",
}


@pytest.mark.parametrize("embedding", ["Q8_0", "Q4_1", "F16"])
def test_blocks_of_many_kinds(embedding: str, checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    """Those of one layer differ, so they are products of their own; with offsets and without; an embedding can't have
    offsets and gets 8 bits.
    """
    source = read_checkpoint(checkpoint("Llama 3"))
    tensors = dict(source.tensors)
    for name, tensor in source.tensors.items():
        stem = name.removesuffix(".weight").rpartition(".")[2]
        kind = embedding if stem == "embed_tokens" else BLOCKS.get(stem)
        if kind is not None and kind != "F16":
            tensors[name] = in_blocks(tensor, kind)
        elif kind is not None:
            half = tensor.read().astype(np.float16)
            tensors[name] = StoredTensor(name, tensor.shape, kind, half, lambda raw, _: raw.astype(np.float32))
    mixed = dataclasses.replace(source, tensors=tensors)
    decoder, info, path = written(mixed, tmp_path / "artifact", "keep")
    (hidden,) = hidden_states(mixed, decoder, [IDS])
    expected = write_logits(mixed, decoder, [hidden], tmp_path / "logits")
    tolerance = 0.05 if embedding == "Q4_1" else 1e-4
    assert np.abs(logits(path, IDS) - expected).max() < tolerance * np.abs(expected).max()
    assert info.weight_forms is not None
    assert set(BLOCKS.values()) <= set(info.weight_forms)
    assert ("int8" in info.weight_forms) == (embedding == "Q4_1")


def in_blocks(tensor: StoredTensor, kind: str) -> StoredTensor:
    number = gguf.GGMLQuantizationType[kind]
    blocks = gguf.quants.quantize(tensor.read(), number)
    return StoredTensor(
        tensor.name,
        tensor.shape,
        kind,
        blocks,
        lambda raw, _: gguf.quants.dequantize(np.ascontiguousarray(raw), number),
    )


def test_what_is_needed_of_the_memory_does_not_grow_with_the_layers(
    checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layers are read in graphs of a bounded size: many small ones at once, or each alone, to the same end."""
    from dovetail.export.target.native import reading

    source = read_checkpoint(checkpoint("Gemma 3"))
    decoder = read_decoder(source)
    (together,) = hidden_states(source, decoder, [IDS])
    monkeypatch.setattr(reading, "_GRAPH_BYTES", 1)
    (alone,) = hidden_states(source, decoder, [IDS])
    near(together, alone)
