"""Proves that damaged GGUF and safetensors files end in one clear line, within two seconds and a small multiple of
their size: cut, with flipped bits, with sizes that lie. tests/tools/fuzz_sources.py does the same for longer.
"""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
from faults.damage import damaged, survives
from models import tiny_gguf
from safetensors.numpy import save_file

from dovetail.export.sources.finding import find_source
from dovetail.export.sources.gguf_format import read_gguf_file
from dovetail.export.sources.safetensors_file import read_safetensors
from dovetail.export.target.native.families import is_native, read_decoder
from dovetail.export.target.native.tensor_names import check_tensors
from dovetail.runtime.errors import UserError

CASES = 240


def read_all(path: Path) -> None:
    """A source and all of its numbers."""
    for tensor in find_source(path).tensors.values():
        tensor.read()


def read_weights(path: Path) -> None:
    for tensor in read_safetensors([path]).values():
        tensor.read()


@pytest.fixture(scope="module")
def gguf_file(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    contents = tiny_gguf.contents(tiny_checkpoint, quantise=True)
    return tiny_gguf.write_gguf(tmp_path_factory.mktemp("gguf") / "model.gguf", *contents)


def test_damaged_gguf_files(gguf_file: Path, tmp_path: Path) -> None:
    data, path = gguf_file.read_bytes(), tmp_path / "model.gguf"
    header = data.index(b"output_norm.weight")  # the last name in the table of tensors, or near it
    read_all(gguf_file)
    taken = 0
    for seed in range(CASES):
        path.write_bytes(damaged(data, header, seed))
        taken += survives(path, read_all)
    assert taken < CASES // 3  # damage to a number, or to a token's text, can't be seen


def test_damaged_safetensors_files(tmp_path: Path) -> None:
    whole, path = tmp_path / "whole.safetensors", tmp_path / "model.safetensors"
    tensors = {f"tensor.{i}": np.full((8, 16), i, np.float16 if i % 2 else np.float32) for i in range(20)}
    save_file(tensors, whole)
    data = whole.read_bytes()
    (header,) = struct.unpack("<Q", data[:8])
    taken = 0
    for seed in range(CASES):
        path.write_bytes(damaged(data, 8 + header, seed))
        taken += survives(path, read_weights)
    assert taken < CASES // 3


def test_hostile_configs(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Whatever stands in config.json; what a family's reader makes of it is proven in test_bad_configs.py."""
    folder = tmp_path / "source"
    shutil.copytree(tiny_checkpoint, folder)
    config = json.loads((folder / "config.json").read_text())
    names = [*config, "quantization_config", "is_encoder_decoder", "auto_map", "attn_logit_softcapping"]
    for name in names:
        for value in (None, -1, 0, 10**9, 2**63, 1.5, True, "x", "", [], [[]], ["x"], {}, {"quant_method": []}):
            (folder / "config.json").write_text(json.dumps(config | {name: value}))
            survives(folder, read_config)


def read_config(folder: Path) -> None:
    source = find_source(folder)
    if is_native(source):
        check_tensors(source, read_decoder(source))


def header(*, tensors: int = 0, values: int = 0, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, values)


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


STRINGS, NUMBERS = 8, 5
HOSTILE = {
    "empty": b"",
    "another format": b"PK\x03\x04" + bytes(100),
    "the beginning alone": b"GGUF",
    "version 1": header(version=1),
    "big endian": b"GGUF" + struct.pack(">I", 3) + bytes(100),
    "as many tensors as a number can say": header(tensors=(1 << 64) - 1),
    "as many values": header(values=(1 << 64) - 1),
    "a name of 2^60 bytes": header(values=1) + struct.pack("<Q", 1 << 60),
    "an array of 2^40 strings": header(values=1) + text(b"x") + struct.pack("<IIQ", 9, STRINGS, 1 << 40),
    "an array of 2^62 numbers": header(values=1) + text(b"x") + struct.pack("<IIQ", 9, NUMBERS, 1 << 62),
    "a million empty arrays of arrays": header(values=1) + text(b"x") + struct.pack("<II", 9, 9) * 1_000_000,
    "twelve million empty strings": header(values=1)
    + text(b"x")
    + struct.pack("<IIQ", 9, STRINGS, 12_000_000)
    + bytes(96_000_000),
    "a value of no type": header(values=1) + text(b"x") + struct.pack("<I", 99),
    "a name that is no text": header(values=1) + text(b"\xff\xfe"),
    "a value twice": header(values=2) + 2 * (text(b"x") + struct.pack("<Ii", NUMBERS, 1)),
    "a tensor of 2^32 axes": header(tensors=1) + text(b"t") + struct.pack("<I", (1 << 32) - 1),
    "a tensor of 2^64 numbers": header(tensors=1) + text(b"t") + struct.pack("<IQQIQ", 2, 1 << 32, 1 << 32, 0, 0),
    "a tensor of nothing": header(tensors=1) + text(b"t") + struct.pack("<IQIQ", 1, 0, 0, 0) + bytes(64),
    "a tensor of an unknown type": header(tensors=1) + text(b"t") + struct.pack("<IQIQ", 1, 8, 999, 0) + bytes(64),
    "a tensor twice": header(tensors=2)
    + b"".join(text(b"t") + struct.pack("<IQIQ", 1, 8, 0, 32 * i) for i in range(2))
    + bytes(128),
    "tensors in one place": header(tensors=2)
    + b"".join(text(name) + struct.pack("<IQIQ", 1, 8, 0, 0) for name in (b"t", b"u"))
    + bytes(128),
    "half a block": header(tensors=1) + text(b"t") + struct.pack("<IQIQ", 1, 33, 8, 0) + bytes(128),
    "an alignment of 3": header(values=1) + text(b"general.alignment") + struct.pack("<II", 4, 3),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_gguf_files(name: str, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(HOSTILE[name])
    assert not survives(path, read_gguf_file)


def test_a_cut_model_says_how_much_there_is(gguf_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    shutil.copyfile(gguf_file, path)
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.truncate(size - 1000)
    with pytest.raises(UserError, match=f"expected a whole GGUF file, got its end after {size - 1000} bytes, within"):
        find_source(path)
