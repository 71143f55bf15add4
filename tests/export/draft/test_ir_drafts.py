"""Proves that a target given as an OpenVINO IR takes drafts as its checkpoint does: the weights and hidden states that
are read off the graph are torch's, and so the draft in the artifact is the same file and is believed as often.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import openvino as ov
import pytest
import torch
from models import families
from models.draft_kinds import write_kind
from openvino import opset13
from processes.lean_process import EXPORT, TORCH_FAMILY, run_without

from dovetail.export.artifact.writing import write_artifact
from dovetail.export.convert.torch_model import body_and_head, load_torch, target_features
from dovetail.export.draft.kinds import KINDS
from dovetail.export.quiet import quiet_torch
from dovetail.export.target.ir_features import embedding_and_head, features
from dovetail.runtime import load
from dovetail.runtime.artifact.manifest import DRAFT_MODEL
from dovetail.runtime.errors import UserError
from dovetail.runtime.targets.openvino.ir import read_ir

TEXT = "def parse(text):\n    return text.split()\n\n" * 20


def write_ir(checkpoint: Path, folder: Path) -> Path:
    """As optimum-intel itself exports it."""
    with quiet_torch():
        from optimum.exporters.openvino import main_export
        from optimum.intel import OVConfig

        main_export(str(checkpoint), folder, task="text-generation-with-past", ov_config=OVConfig(dtype="fp32"))
    shutil.copyfile(checkpoint / "tokenizer.json", folder / "tokenizer.json")
    return folder


@pytest.fixture(scope="module")
def ir(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_ir(tiny_checkpoint, tmp_path_factory.mktemp("ir") / "untied")


@pytest.fixture(scope="module")
def tied(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(checkpoint, IR) of a model whose LM head is its embedding."""
    folder = tmp_path_factory.mktemp("tied")
    families.write_family(folder / "checkpoint", tiny_checkpoint / "tokenizer.json", *families.FAMILIES["Llama 3"])
    return folder / "checkpoint", write_ir(folder / "checkpoint", folder / "ir")


def test_weights_are_the_checkpoints(ir: Path, tied: tuple[Path, Path], tiny_checkpoint: Path) -> None:
    for checkpoint, folder in ((tiny_checkpoint, ir), tied):
        _, *expected = body_and_head(load_torch(checkpoint))
        model = read_ir(folder / "openvino_model.xml")
        for ours, theirs in zip(embedding_and_head(model), expected, strict=True):
            np.testing.assert_array_equal(ours, theirs.numpy())


def test_quantised_weights_are_what_they_stand_for(ir: Path, tiny_checkpoint: Path) -> None:
    import nncf

    with quiet_torch():
        model = nncf.compress_weights(ov.Core().read_model(ir / "openvino_model.xml"))
    for ours, theirs in zip(embedding_and_head(model), body_and_head(load_torch(tiny_checkpoint))[1:], strict=True):
        step = np.ptp(theirs.numpy(), axis=1, keepdims=True) / 255
        assert np.abs(ours - theirs.numpy()).max() > 0
        assert (np.abs(ours - theirs.numpy()) < 1.1 * step).all()


def test_hidden_states_are_torchs(ir: Path, tiny_checkpoint: Path) -> None:
    ids = np.random.default_rng(0).integers(1, families.VOCAB, 40)
    model = read_ir(ir / "openvino_model.xml")
    for layers in ((), (0, 1)):
        expected = target_features(load_torch(tiny_checkpoint), torch.from_numpy(ids)[None], layers)[0].numpy()
        np.testing.assert_allclose(features(model, ids, layers), expected, atol=2e-4)
    assert len(model.outputs) == 1, "the model was changed"


@pytest.mark.parametrize("kind", KINDS)
def test_the_draft_is_the_one_that_the_checkpoint_gets(
    kind: str, ir: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    draft = write_kind(tmp_path / "draft", tiny_checkpoint, kind)
    by_ir = write_artifact(ir, tmp_path / "ir", draft=draft, check_text=TEXT)
    by_checkpoint = write_artifact(
        tiny_checkpoint, tmp_path / "checkpoint", draft=draft, weight_format="fp32", check_text=TEXT
    )
    assert by_ir.draft == by_checkpoint.draft
    assert by_ir.default_tree == by_checkpoint.default_tree
    assert by_ir.checks.draft_argmax_agreement == pytest.approx(by_checkpoint.checks.draft_argmax_agreement, abs=0.02)
    assert (tmp_path / "ir" / DRAFT_MODEL).read_bytes() == (tmp_path / "checkpoint" / DRAFT_MODEL).read_bytes()
    done = []
    for folder in ("ir", "checkpoint"):
        with load(tmp_path / folder, numerics="exact", draft_device="cpu") as pipe:
            done.append(pipe.generate("def f(x):", temperature=1.0, seed=7, max_new_tokens=60, ignore_eos=True))
    assert done[0].token_ids == done[1].token_ids
    assert done[0].totals.accepted_tokens == done[1].totals.accepted_tokens > 0


def test_without_torch(ir: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    """The command, where neither torch nor transformers is installed, writes the same draft."""
    draft, text = write_kind(tmp_path / "draft", tiny_checkpoint, "eagle3"), tmp_path / "text"
    text.write_text(TEXT)
    arguments = ["model", str(ir), "-o", str(tmp_path / "lean"), "--draft", str(draft), "--check-text", str(text)]
    done = run_without(TORCH_FAMILY, EXPORT, *arguments)
    assert done.returncode == 0, done.stderr
    write_artifact(ir, tmp_path / "here", draft=draft, check_text=TEXT)
    assert (tmp_path / "lean" / DRAFT_MODEL).read_bytes() == (tmp_path / "here" / DRAFT_MODEL).read_bytes()


def test_an_ir_with_other_names(ir: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Inputs are known by their tensors. EAGLE-3's layers are found by the names that optimum-intel gives to nodes:
    where those are others, its drafts alone are refused.
    """
    source = tmp_path / "source"
    shutil.copytree(ir, source)
    model = read_ir(ir / "openvino_model.xml")
    for number, node in enumerate(model.get_ops()):
        node.set_friendly_name(f"node_{number}")
    ov.save_model(model, source / "openvino_model.xml", compress_to_fp16=False)
    draft = write_kind(tmp_path / "eagle3", tiny_checkpoint, "eagle3")
    with pytest.raises(
        UserError, match=r"one input of the target's layer 1 .* got 0; .* no draft of kind eagle3"
    ) as no:
        write_artifact(source, tmp_path / "out", draft=draft, check_text=TEXT)
    assert "\n" not in str(no.value)
    assert not (tmp_path / "out").exists()
    draft = write_kind(tmp_path / "eagle", tiny_checkpoint, "eagle")
    made = write_artifact(source, tmp_path / "out", draft=draft, draft_weight_format="float32", check_text=TEXT)
    assert made.checks.draft_argmax_agreement is not None
    assert made.checks.draft_argmax_agreement > 0.97


def test_a_graph_without_an_embedding_is_refused() -> None:
    vectors = opset13.parameter([-1, -1, 8], np.float32, name="inputs_embeds")
    table = opset13.constant(np.ones((families.VOCAB, 8), np.float32))
    head = opset13.matmul(vectors, table, False, True)
    head.output(0).get_tensor().set_names({"logits"})
    with pytest.raises(UserError, match="expected one embedding of shape"):
        embedding_and_head(ov.Model([head], [vectors]))
