"""Proves that the GGUF file holds the checkpoint's function: weights, sizes, order of rotated rows, and llama.cpp's
greedy tokens beside transformers'.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dovetail.export.target.gguf_writer import write_gguf
from dovetail.runtime.errors import UserError

gguf = pytest.importorskip("gguf", reason="the extra `bench` is not installed")

LLAMA_CPP = """
import json, sys, llama_cpp
job = json.load(sys.stdin)
llama = llama_cpp.Llama(job["path"], n_ctx=256, n_threads=2, verbose=False)
texts = []
for ids in job["prompts"]:
    llama.reset()
    tokens = llama.generate(ids, temp=0.0, top_k=1, repeat_penalty=1.0)
    texts.append([token for _, token in zip(range(job["count"]), tokens)])
print(json.dumps(texts))
"""


def change_config(checkpoint: Path, out: Path, **changes: Any) -> Path:
    """The same checkpoint with other entries in config.json."""
    out.mkdir()
    for path in checkpoint.iterdir():
        (out / path.name).symlink_to(path)
    config = json.loads((checkpoint / "config.json").read_text())
    (out / "config.json").unlink()
    (out / "config.json").write_text(json.dumps({**config, **changes}))
    return out


@pytest.fixture(scope="module")
def written(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(tiny_checkpoint, out)
    return out


def test_the_file_says_what_the_checkpoint_says(written: Path, tiny_checkpoint: Path) -> None:
    config = json.loads((tiny_checkpoint / "config.json").read_text())
    reader = gguf.GGUFReader(written)

    def value(name: str) -> Any:
        return reader.get_field(name).contents()

    assert value("general.architecture") == "llama"
    for ours, theirs in (
        ("block_count", "num_hidden_layers"),
        ("embedding_length", "hidden_size"),
        ("feed_forward_length", "intermediate_size"),
        ("attention.head_count", "num_attention_heads"),
        ("attention.head_count_kv", "num_key_value_heads"),
        ("context_length", "max_position_embeddings"),
    ):
        assert value(f"llama.{ours}") == config[theirs]
    assert value("llama.attention.layer_norm_rms_epsilon") == pytest.approx(config["rms_norm_eps"])
    assert len(value("tokenizer.ggml.tokens")) == config["vocab_size"]
    assert not list(written.parent.glob(".*")), "a temporary file stayed"


def test_the_weights_come_back(written: Path, tiny_checkpoint: Path) -> None:
    from safetensors.numpy import load_file

    weights = load_file(tiny_checkpoint / "model.safetensors")
    read = {
        tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        for tensor in gguf.GGUFReader(written).tensors
    }
    assert len(read) == len(weights)
    for ours, theirs in (
        ("token_embd.weight", "model.embed_tokens.weight"),
        ("output.weight", "lm_head.weight"),
        ("blk.1.ffn_down.weight", "model.layers.1.mlp.down_proj.weight"),
        ("blk.0.attn_v.weight", "model.layers.0.self_attn.v_proj.weight"),
    ):
        error = np.abs(read[ours] - weights[theirs]).max()
        assert error <= np.abs(weights[theirs]).max() / 127, ours
    np.testing.assert_array_equal(read["output_norm.weight"], weights["model.norm.weight"])
    # In a head of 16, llama.cpp rotates rows (0, 1), (2, 3), ...; transformers rotates (0, 8), (1, 9), ...
    heads = weights["model.layers.0.self_attn.q_proj.weight"].reshape(4, 16, 64)
    turned = read["blk.0.attn_q.weight"].reshape(4, 16, 64)
    np.testing.assert_allclose(turned[:, 0::2], heads[:, :8], atol=np.abs(heads).max() / 127)
    np.testing.assert_allclose(turned[:, 1::2], heads[:, 8:], atol=np.abs(heads).max() / 127)


def test_float16_weights_come_back_as_they_are(tiny_checkpoint: Path, tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    write_gguf(tiny_checkpoint, tmp_path / "tiny.gguf", file_type="F16")
    reader = gguf.GGUFReader(tmp_path / "tiny.gguf")
    assert reader.get_field("general.file_type").contents() == gguf.LlamaFileType.MOSTLY_F16
    tensors = {tensor.name: tensor.data for tensor in reader.tensors}
    weights = load_file(tiny_checkpoint / "model.safetensors")
    assert len(tensors) == len(weights)
    for ours, theirs in (("output.weight", "lm_head"), ("blk.1.ffn_down.weight", "model.layers.1.mlp.down_proj")):
        np.testing.assert_array_equal(tensors[ours], weights[f"{theirs}.weight"].astype(np.float16))
    np.testing.assert_array_equal(tensors["output_norm.weight"], weights["model.norm.weight"])


@pytest.mark.skipif(
    importlib.util.find_spec("llama_cpp") is None, reason="llama-cpp-python is not installed: it is compiled, minutes"
)
@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default", "rope_theta": 10000.0},
        {
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ],
    ids=["plain", "llama3"],
)
def test_llama_cpp_says_what_transformers_says(rope: dict[str, Any], tiny_checkpoint: Path, tmp_path: Path) -> None:
    import torch

    from dovetail.export.convert.torch_model import load_torch

    source = change_config(tiny_checkpoint, tmp_path / "checkpoint", rope_parameters=rope)
    out = tmp_path / "tiny.gguf"
    write_gguf(source, out)
    model = load_torch(source)
    prompts = [np.random.default_rng(seed).integers(1, 512, 100).tolist() for seed in range(8)]
    job = {"path": str(out), "prompts": prompts, "count": 1}
    done = subprocess.run(
        [sys.executable, "-c", LLAMA_CPP], input=json.dumps(job), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    theirs = [text[0] for text in json.loads(done.stdout.splitlines()[-1])]
    with torch.inference_mode():
        logits = model(torch.tensor(prompts)).logits[:, -1]
    best = logits.argmax(-1).tolist()
    # 8-bit weights and activations move logits a little: a wrong token may only stand where the best two nearly tie.
    behind = [float(logits[i, best[i]] - logits[i, token]) for i, token in enumerate(theirs)]
    assert max(behind) < 0.3
    assert sum(token == other for token, other in zip(theirs, best, strict=True)) >= 6


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"model_type": "qwen2"}, "a model of type llama"),
        ({"attention_bias": True}, "projections without biases"),
        ({"hidden_act": "gelu"}, "SiLU"),
        ({"intermediate_size": 100}, "intermediate_size divisible by 32"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rotary"),
        ({"num_hidden_layers": 3}, r"model\.layers\.2\."),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(
    changes: dict[str, Any], line: str, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    source = change_config(tiny_checkpoint, tmp_path / "checkpoint", **changes)
    with pytest.raises(UserError, match=line):
        write_gguf(source, tmp_path / "out.gguf")
    assert not (tmp_path / "out.gguf").exists()
