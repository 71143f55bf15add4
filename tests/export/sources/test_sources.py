"""Proves what SRC may be: an OpenVINO IR that somebody exported, without torch on the machine; a model on the hub; and
that whatever can't be exported ends in one clear line and leaves nothing behind.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fake_hub
import families
import huggingface_hub
import numpy as np
import openvino as ov
import pytest
import torch
from lean_process import EXPORT, TORCH_FAMILY, run_without
from openvino import opset13
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from dovetail.export.artifact.writing import write_artifact
from dovetail.export.quiet import quiet_torch
from dovetail.export.sources.finding import find_source
from dovetail.runtime import load
from dovetail.runtime.artifact.manifest import TARGET_MODEL
from dovetail.runtime.artifact.opening import open_artifact
from dovetail.runtime.errors import UserError
from dovetail.runtime.targets.openvino.ir import read_ir

TEXT = "def parse(text):\n    return text.split()\n\n" * 20
REPOSITORY = "someone/tiny"

NOT_NEEDED = (*TORCH_FAMILY, "onnx", "safetensors", "huggingface_hub")


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With sliding windows and a chat template: what an IR has to bring along."""
    folder = tmp_path_factory.mktemp("sources") / "checkpoint"
    families.write_family(folder, tiny_checkpoint / "tokenizer.json", *families.FAMILIES["Mistral"])
    template = "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
    (folder / "chat_template.jinja").write_text(template)
    return folder


@pytest.fixture(scope="module")
def ir(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as optimum-intel itself exports it."""
    folder = tmp_path_factory.mktemp("sources") / "ir"
    with quiet_torch():
        from optimum.exporters.openvino import main_export
        from optimum.intel import OVConfig

        main_export(str(checkpoint), folder, task="text-generation-with-past", ov_config=OVConfig(dtype="fp32"))
    return folder


def test_an_ir_becomes_an_artifact_without_torch(ir: Path, checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "text").write_text(TEXT)
    out = tmp_path / "out"
    arguments = ["model", str(ir), "-o", str(out), "--check-text", str(tmp_path / "text"), "--json"]
    done = run_without(NOT_NEEDED, EXPORT, *arguments)
    assert done.returncode == 0, done.stderr
    manifest = json.loads(done.stdout.splitlines()[-1])
    assert manifest["target"] | {"parameters": 0} == {
        "architecture": "mistral",
        "hidden_size": 64,
        "num_layers": 2,
        "vocab_size": families.VOCAB,
        "context_length": families.CONTEXT,
        "parameters": 0,
        "weight_format": "fp32",
        "sliding_window": families.WINDOW,
        "weight_forms": None,
        "rope_border": None,
    }
    assert manifest["checks"]["target_kl_mean"] is None
    assert manifest["checks"]["target_perplexity"] > 1
    with load(out, draft="lookup", numerics="exact") as pipe:
        prompt = np.random.default_rng(0).integers(1, families.VOCAB, 30).tolist()
        model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
        model.generation_config.eos_token_id = None
        model.generation_config.pad_token_id = 0
        ids = torch.tensor([prompt])
        expected = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=50, do_sample=False)
        assert pipe.generate(prompt, max_new_tokens=50, ignore_eos=True).token_ids == expected[0, 30:].tolist()
        assert pipe.generate([{"role": "user", "content": "x"}], max_new_tokens=2).token_ids


def test_the_weights_of_an_ir_stay_as_they_are(ir: Path, tmp_path: Path) -> None:
    import nncf

    source = tmp_path / "source"
    shutil.copytree(ir, source)
    with quiet_torch():
        model = nncf.compress_weights(ov.Core().read_model(ir / "openvino_model.xml"))
    ov.save_model(model, source / "openvino_model.xml", compress_to_fp16=False)
    manifest = write_artifact(source, tmp_path / "out", check_text=TEXT)
    assert manifest.target.weight_format == "int8_asym"

    def constants(path: Path) -> dict[str, bytes]:
        nodes = [node for node in read_ir(path).get_ops() if node.get_type_name() == "Constant"]
        return {node.get_friendly_name(): node.get_tensor_view().data.tobytes() for node in nodes}

    theirs = constants(source / "openvino_model.xml")
    ours = constants(open_artifact(tmp_path / "out").file(TARGET_MODEL))
    assert sorted(ours.values()) == sorted(theirs.values())
    with pytest.raises(UserError, match="no `weight_format` with an IR"):
        write_artifact(source, tmp_path / "again", weight_format="int4")


def small_ir(folder: Path, result: str, parameter: str = "input_ids") -> None:
    """A graph with neither attention nor state."""
    ids = opset13.parameter([-1, -1], np.int64, name=parameter)
    ids.output(0).get_tensor().set_names({parameter})
    table = opset13.constant(np.ones((families.VOCAB, 8), np.float32))
    head = opset13.matmul(opset13.gather(table, ids, opset13.constant(np.int64(0))), table, False, True)
    head.output(0).get_tensor().set_names({result})
    ov.save_model(ov.Model([head], [ids]), folder / "openvino_model.xml")


def no_logits(folder: Path) -> None:
    small_ir(folder, "last_hidden_state")


def stateless(folder: Path) -> None:
    small_ir(folder, "logits")


def encoder_decoder(folder: Path) -> None:
    small_ir(folder, "logits", "encoder_hidden_states")


def no_weights(folder: Path) -> None:
    (folder / "openvino_model.bin").unlink()


def truncated_bin(folder: Path) -> None:
    data = (folder / "openvino_model.bin").read_bytes()
    (folder / "openvino_model.bin").write_bytes(data[: len(data) // 2])


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def no_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def other_window(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"sliding_window": 64}))


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (no_logits, "expected an IR with the result logits"),
        (stateless, "expected a stateful IR"),
        (encoder_decoder, "got an encoder-decoder's"),
        (no_weights, "openvino_model.bin"),
        (truncated_bin, "expected"),
        (no_config, "config.json"),
        (no_tokenizer, "tokenizer.json"),
        (other_window, "attention windows"),
    ],
)
def test_bad_ir_is_one_line(spoil: Callable[[Path], None], named: str, ir: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(ir, source)
    spoil(source)
    refused(source, named, tmp_path)


def refused(source: Path | str, named: str, folder: Path, **settings: Any) -> None:
    with pytest.raises(UserError, match=named) as raised:
        write_artifact(source, folder / "out", check_text=TEXT, **settings)
    assert "\n" not in str(raised.value)
    assert not [path for path in folder.iterdir() if "out" in path.name], "something was left behind"


def set_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def gptq(folder: Path) -> None:
    set_config(folder, quantization_config={"quant_method": "gptq", "bits": 4})


def awq(folder: Path) -> None:
    set_config(folder, quantization_config={"quant_method": "awq", "bits": 4})


def old_gptq(folder: Path) -> None:
    """As the first tools wrote it: config.json says nothing of it."""
    path = sorted(folder.glob("*.safetensors"))[0]
    tensors = load_file(path)
    name = sorted(tensors)[0]
    packed = name.removesuffix("weight") + "qweight"
    save_file({**tensors, packed: torch.zeros(8, 64, dtype=torch.int32)}, path, {"format": "pt"})


def sequence_to_sequence(folder: Path) -> None:
    set_config(folder, architectures=["T5ForConditionalGeneration"], is_encoder_decoder=True)


def embedding_model(folder: Path) -> None:
    set_config(folder, architectures=["MistralModel"])


def missing_shard(folder: Path) -> None:
    sorted(folder.glob("*.safetensors"))[0].unlink()


def missing_tensor(folder: Path) -> None:
    change_a_tensor(folder, lambda tensor: None)


def another_shape(folder: Path) -> None:
    change_a_tensor(folder, lambda tensor: tensor[:, :-1].contiguous())


def change_a_tensor(folder: Path, change: Callable[[torch.Tensor], torch.Tensor | None]) -> None:
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        name = next((name for name in tensors if name.endswith("down_proj.weight")), None)
        if name is not None:
            changed = change(tensors.pop(name))
            save_file(tensors if changed is None else tensors | {name: changed}, path, {"format": "pt"})
            return


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (gptq, "quantised by gptq"),
        (awq, "quantised by awq"),
        (old_gptq, r"in floating point, got a checkpoint with .*\.qweight"),
        (sequence_to_sequence, "T5ForConditionalGeneration"),
        (embedding_model, "MistralModel"),
        (missing_shard, "model-00001"),
        (missing_tensor, "down_proj.weight"),
        (another_shape, r"down_proj.weight of shape \[64, 128\]"),
    ],
)
def test_bad_checkpoint_is_one_line(
    spoil: Callable[[Path], None], named: str, checkpoint: Path, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    shutil.copytree(checkpoint, source)
    spoil(source)
    refused(source, named, tmp_path)


def test_pickles_only_if_asked_for_by_name(tiny_checkpoint: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(tiny_checkpoint, source)
    torch.save(load_file(source / "model.safetensors"), source / "pytorch_model.bin")
    (source / "model.safetensors").unlink()
    refused(source, "`allow_pickle`", tmp_path)
    assert write_artifact(source, tmp_path / "made", check_text=TEXT, allow_pickle=True).target.hidden_size == 64


def test_a_model_on_the_hub(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fetched at its revision, without code, pickles and subfolders, and found in the cache when the hub is away."""
    files = tmp_path / "files"
    shutil.copytree(checkpoint, files)
    (files / "original").mkdir()
    for name in ("modeling_evil.py", "pytorch_model.bin", "original/consolidated.safetensors", "README.md"):
        (files / name).write_bytes(b"no")
    with fake_hub.serving(files, REPOSITORY, monkeypatch, tmp_path / "cache") as asked:
        found = find_source(REPOSITORY, "v1")
        assert found.layout == "checkpoint"
        wanted = {path.name for path in checkpoint.iterdir()}
        assert set(asked) == wanted == {path.name for path in found.path.iterdir()}
        with pytest.raises(UserError, match="someone/other, unknown there"):
            find_source("someone/other")
        with pytest.raises(UserError, match="a revision of someone/tiny, got 'v9'"):
            find_source(REPOSITORY, "v9")
    gated = fake_hub.serving(files, "someone/gated", monkeypatch, tmp_path / "cache", gated=True)
    with gated, pytest.raises(UserError, match="gated"):
        find_source("someone/gated")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert find_source(REPOSITORY, "v1").path == found.path
    with pytest.raises(UserError, match=r"offline\?"):
        find_source("someone/elsewhere")


@pytest.mark.parametrize("name", ["a/b/c", "nothing", "/no/where", "x y/z"])
def test_what_is_no_source(name: str) -> None:
    with pytest.raises(UserError, match=r"a checkpoint folder, a \.gguf file, an IR folder or a hub id"):
        find_source(name)


def test_a_revision_of_a_folder(tiny_checkpoint: Path) -> None:
    with pytest.raises(UserError, match="`revision`"):
        find_source(tiny_checkpoint, "main")
