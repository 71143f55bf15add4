"""Proves that a GGUF file is read as the checkpoint that it was made of: tiny models of every family, written as
llama.cpp's converter writes them, give back transformers' tensors and the same decoder. That parts are one model. And
that whatever else a GGUF file may be ends in one clear line.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from models import families, tiny_gguf
from numpy.typing import NDArray
from real_models import gemma3_gguf, smollm2_gguf
from tokenizers import Tokenizer

from dovetail.export.sources.base import Source
from dovetail.export.sources.checkpoint import read_checkpoint
from dovetail.export.sources.finding import find_source
from dovetail.export.target.native.families import read_decoder
from dovetail.runtime.errors import UserError

Contents = tuple[dict[str, Any], dict[str, NDArray[Any]]]


@pytest.fixture(scope="module")
def checkpoints(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("checkpoints")

    def checkpoint(family: str) -> Path:
        path = folder / family
        if not path.is_dir():
            families.write_family(path, tiny_checkpoint / "tokenizer.json", *tiny_gguf.FAMILIES[family])
        return path

    return checkpoint


@pytest.mark.parametrize("family", tiny_gguf.FAMILIES)
def test_it_is_read_as_the_checkpoint_that_it_was_made_of(
    family: str, checkpoints: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = checkpoints(family)
    ours = find_source(tiny_gguf.write_gguf(tmp_path / "model.gguf", *tiny_gguf.contents(folder)))
    theirs = read_checkpoint(folder)
    assert ours.layout == "gguf"
    assert ours.tensors.keys() == theirs.tensors.keys()
    for name, tensor in theirs.tensors.items():
        assert ours.tensors[name].shape == tensor.shape
        exact = ours.tensors[name].shift == 0  # 1 + w, and 1 off it again, loses bits
        np.testing.assert_allclose(ours.tensors[name].read(), tensor.read(), rtol=0, atol=0 if exact else 1e-7)
    assert_same_decoder(ours, theirs)
    text = "def parse(text):  # and  42\n"
    assert Tokenizer.from_str(ours.tokenizer).encode(text).ids == Tokenizer.from_str(theirs.tokenizer).encode(text).ids


def assert_same_decoder(ours: Source, theirs: Source) -> None:
    """But for float32's rounding of numbers in the metadata, and transformers' name for one family."""
    one, other = (dataclasses.asdict(read_decoder(source)) for source in (ours, theirs))
    layers = one.pop("layers"), other.pop("layers")
    assert one == pytest.approx(other)
    for mine, its in zip(*layers, strict=True):
        assert mine["window"] == its["window"]
        assert (mine["rotary"] is None) == (its["rotary"] is None)
        if its["rotary"] is not None:
            assert mine["rotary"] == {
                key: pytest.approx(value, rel=1e-6) if value is not None else None
                for key, value in its["rotary"].items()
            }


def test_blocks_come_in_the_order_of_the_rows(checkpoints: Callable[[str], Path], tmp_path: Path) -> None:
    folder = checkpoints("Llama 2")
    source = find_source(tiny_gguf.write_gguf(tmp_path / "model.gguf", *tiny_gguf.contents(folder, quantise=True)))
    for name, tensor in read_checkpoint(folder).tensors.items():
        stored = source.tensors[name]
        if len(tensor.shape) == 1:
            assert not stored.has_blocks
            continue
        kind = gguf.GGMLQuantizationType.Q8_0
        blocks = gguf.quants.quantize(tensor.read(), kind)  # row by row, so the order does not matter to it
        np.testing.assert_array_equal(stored.blocks(), blocks)
        np.testing.assert_array_equal(stored.read(), gguf.quants.dequantize(blocks, kind))


def test_a_model_in_parts_is_one(checkpoints: Callable[[str], Path], tmp_path: Path) -> None:
    folder = checkpoints("Llama 2")
    values, tensors = tiny_gguf.contents(folder)
    paths = [tmp_path / f"m-{number:05}-of-00003.gguf" for number in (1, 2, 3)]
    names = sorted(tensors)
    for number, path in enumerate(paths):
        split = {"split.no": number, "split.count": 3, "split.tensors.count": len(names)}
        part = values | split if number == 0 else {"general.architecture": "llama"} | split
        tiny_gguf.write_gguf(path, part, {name: tensors[name] for name in names[number::3]})
    whole = read_checkpoint(folder).tensors
    source = find_source(paths[0])
    assert all((source.tensors[name].read() == whole[name].read()).all() for name in whole)
    with pytest.raises(UserError, match="the first of 3 parts"):
        find_source(paths[1].rename(tmp_path / "m-00002-of-00003.gguf.gguf"))
    with pytest.raises(UserError, match=r"expected 3 parts of the model, got no .*m-00002-of-00003\.gguf"):
        find_source(paths[0])
    paths[1].write_bytes(paths[2].read_bytes())
    with pytest.raises(UserError, match=r"expected part 2 of 3, got another one in"):
        find_source(paths[0])
    twice = {"general.architecture": "llama", "split.no": 1, "split.count": 3}
    tiny_gguf.write_gguf(paths[1], twice, {name: tensors[name] for name in names[::3]})
    with pytest.raises(UserError, match=r"expected each tensor once, got .* again in"):
        find_source(paths[0])


def drop(*names: str) -> Callable[[Contents], None]:
    def change(contents: Contents) -> None:
        for name in names:
            contents[0].pop(name, None)
            contents[1].pop(name, None)

    return change


def put(name: str, value: Any) -> Callable[[Contents], None]:
    def change(contents: Contents) -> None:
        contents[isinstance(value, np.ndarray)][name] = value

    return change


def experts(contents: Contents) -> None:
    contents[0]["llama.expert_count"] = 8


QUERY = "blk.1.attn_q.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put("general.architecture", "clip"), "expected a language model, got a vision projector in"),
        (put("general.architecture", "eagle3"), "got a draft head without its target (EAGLE-3) in"),
        (put("general.architecture", "mamba"), "expected a GGUF of an architecture of llama, smollm3"),
        (put("general.type", "adapter"), "got a LoRA adapter in"),
        (put("general.type", "mmproj"), "got a vision projector in"),
        (put("general.type", "martian"), "got a file of the type 'martian' in"),
        (experts, "expected a model without experts, got 8 of them"),
        (put("llama.attention.causal", False), "got an embedding model"),
        (drop("llama.block_count"), "expected llama.block_count as a whole number from 1 to"),
        (put("llama.block_count", 1), "expected only the tensors of a llama in"),
        (put("llama.block_count", 3), "expected model.layers.2.self_attn.q_proj.weight of shape [64, 64] in"),
        (put("llama.block_count", 2_000_000_000), "expected llama.block_count as a whole number from 1 to"),
        (drop("llama.context_length"), "expected llama.context_length as"),
        (put("llama.context_length", "long"), "expected llama.context_length as"),
        (drop("llama.attention.layer_norm_rms_epsilon"), "expected llama.attention.layer_norm_rms_epsilon as a number"),
        (put("llama.attention.value_length", 8), "expected llama.attention.value_length as key_length, 16"),
        (put("llama.attention.key_length", 1 << 30), "expected llama.attention.key_length as a whole number"),
        (put("llama.attention.head_count", 3), "expected heads that the key/value heads divide"),
        (put("llama.embedding_length", 32), "expected model.embed_tokens.weight of shape [512, 32] in"),
        (put("llama.vocab_size", 500), "expected llama.vocab_size as the embedding's rows, 512"),
        (put("tokenizer.ggml.tokens", ["a", "b"]), "expected tokenizer.ggml.tokens as one a row of the embedding, 512"),
        (drop("tokenizer.ggml.model"), "expected tokenizer.ggml.model as a text"),
        (put("llama.rope.dimension_count", 32), "expected llama.rope.dimension_count as an even number up to 16"),
        (put("llama.rope.freq_base", 0.0), "expected llama.rope.freq_base as a positive number"),
        (put("llama.rope.scaling.type", "martian"), "expected llama.rope.scaling.type as none, linear, yarn"),
        (put("llama.rope.scaling.type", "longrope"), "as longrope with the tensors of its factors"),
        (put("llama.rope.scaling.type", "yarn"), "expected llama.rope.scaling.factor as a positive number"),
        (put("rope_freqs.weight", np.ones(5, np.float32)), "expected 8 positive factors in the tensor rope_freqs"),
        (put("rope_freqs.weight", np.zeros(8, np.float32)), "expected 8 positive factors in the tensor rope_freqs"),
        (drop("token_embd.weight"), "expected the tensor token_embd.weight"),
        (drop(QUERY), "expected model.layers.1.self_attn.q_proj.weight of shape [64, 64] in"),
        (put(QUERY, np.ones((32, 64), np.float32)), "got [32, 64]"),
        (put(QUERY, np.ones((64, 64), np.int32)), "expected weights in floating point or in blocks, got I32"),
        (put("blk.0.attn_sinks.weight", np.ones(4, np.float32)), "got 'blk.0.attn_sinks.weight', too"),
        (put("blk.1.attn_q.bias", np.ones(64, np.float32)), "got model.layers.1.self_attn.q_proj.bias, too"),
    ],
)
def test_what_is_no_whole_language_model_is_one_clear_line(
    change: Callable[[Contents], None], message: str, checkpoints: Callable[[str], Path], tmp_path: Path
) -> None:
    contents = tiny_gguf.contents(checkpoints("Llama 2"))
    change(contents)
    path = tiny_gguf.write_gguf(tmp_path / "model.gguf", *contents)
    with pytest.raises(UserError) as caught:
        find_source(path)
    assert message in str(caught.value)
    assert "model.gguf" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_gemma_2_is_refused_for_its_cap(checkpoints: Callable[[str], Path], tmp_path: Path) -> None:
    values, tensors = tiny_gguf.contents(checkpoints("Gemma 2"))
    del values["gemma2.attn_logit_softcapping"]  # llama.cpp knows it by heart
    path = tiny_gguf.write_gguf(tmp_path / "model.gguf", values, tensors)
    with pytest.raises(UserError, match=r"without a cap on its logits, got attn_logit_softcapping 50\.0"):
        find_source(path)


def test_a_granite_without_its_scale_is_refused(checkpoints: Callable[[str], Path], tmp_path: Path) -> None:
    """llama.cpp takes another one than transformers."""
    values, tensors = tiny_gguf.contents(checkpoints("Granite"))
    del values["granite.attention.scale"]
    path = tiny_gguf.write_gguf(tmp_path / "model.gguf", values, tensors)
    with pytest.raises(UserError, match=r"expected granite\.attention\.scale as a number"):
        find_source(path)


def test_smollm2_is_read() -> None:
    source = find_source(smollm2_gguf())
    decoder = read_decoder(source)
    assert (decoder.num_layers, decoder.hidden_size, decoder.num_heads, decoder.num_kv_heads) == (30, 576, 9, 3)
    assert decoder.tied
    assert decoder.rms_norm_eps == 1e-5
    assert source.generation_config == {"bos_token_id": 1, "eos_token_id": [2, 0]}
    assert {tensor.kind for tensor in source.tensors.values()} == {"F32", "Q4_1", "Q8_0"}


@pytest.mark.gemma
def test_gemma_3_is_read() -> None:
    """Its file does not say which layers have a window, nor with what they rotate there."""
    decoder = read_decoder(find_source(gemma3_gguf()))
    assert [layer.window for layer in decoder.layers] == [*[512] * 5, None] * 3
    assert [layer.rotary.frequencies[1] < 0.91 for layer in decoder.layers if layer.rotary] == [*[False] * 5, True] * 3
    assert decoder.norm_offset == 1
