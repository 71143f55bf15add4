"""Proves that every kind of draft is the same as torch module, as graph and at run time: the graph computes what the
module does, the runtime feeds it what it was trained on (features of the right layers, each beside the right token),
and the words stay the target's.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import openvino as ov
import pytest
import torch
from models.draft_kinds import random_draft, write_kind
from models.plain_artifact import DRAFT
from oracles.torch_drafts import drafted_target, run_torch, weights_of
from processes.lean_process import TORCH_FAMILY, run_without

from dovetail.export.artifact.writing import write_artifact
from dovetail.export.commands.cli import dovetail_export
from dovetail.export.convert.torch_model import load_torch, target_features
from dovetail.export.draft.config import DraftConfig, block_sizes, config_for
from dovetail.export.draft.kinds import KINDS, TRAINED_KINDS
from dovetail.export.draft.layouts import read_draft
from dovetail.export.draft.onnx_graph import check_graph, example_call, export_draft
from dovetail.export.draft.shapes import num_parameters, weight_shapes
from dovetail.export.sources.checkpoint import read_checkpoint
from dovetail.export.training.draft_model import DraftModel, as_module, load_draft, save_draft
from dovetail.export.training.fusions import FUSIONS
from dovetail.runtime import load
from dovetail.runtime.artifact.manifest import DRAFT_KINDS
from dovetail.runtime.drafts.joint_calls import JointCalls
from dovetail.runtime.drafts.model_draft import ModelDraft
from dovetail.runtime.errors import UserError
from dovetail.runtime.policies.base import DepthBudget
from dovetail.runtime.targets.base import read
from dovetail.runtime.trees.verified import Verified

VARIANTS: dict[str, dict[str, Any]] = {
    "dgf": {"kind": "dgf"},
    "eagle": {"kind": "eagle"},
    "eagle with bias": {"kind": "eagle", "fusion_bias": True},
    "eagle3": {"kind": "eagle3", "head_size": 200},
    "eagle3, normed stream, two blocks": {"kind": "eagle3", "norm_before_residual": True, "num_layers": 2},
    "lm": {"kind": "lm"},
    "lm like Qwen 2": {"kind": "lm", "qkv_bias": True},
    "lm like Qwen 3": {"kind": "lm", "qk_norm": True, "num_layers": 2},
}

EXPORT_DRAFTS = """
from pathlib import Path
from dovetail.export.draft.layouts import read_draft
from dovetail.export.draft.onnx_graph import export_draft
from dovetail.export.draft.published import DraftedTarget
from dovetail.export.sources.finding import find_source
source, folder = find_source(sys.argv[1]), Path(sys.argv[2])
weights = [source.tensors[name].read() for name in ("model.embed_tokens.weight", "lm_head.weight")]
for kind in sys.argv[3:]:
    export_draft(read_draft(folder / kind, DraftedTarget(source, *weights)), folder / f"{kind}.onnx")
"""


@pytest.fixture(scope="module", params=VARIANTS)
def draft(request: pytest.FixtureRequest, tiny_checkpoint: Path) -> DraftModel:
    return random_draft(tiny_checkpoint, **VARIANTS[request.param])


@pytest.mark.parametrize("weight_format", ["float32", "int8"])
def test_graph_is_the_module(draft: DraftModel, weight_format: Any, tmp_path: Path) -> None:
    info = export_draft(weights_of(draft), tmp_path / "model.onnx", weight_format=weight_format)
    check_graph(tmp_path / "model.onnx", info)
    session = ort.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    for length, past in ((1, 0), (5, 0), (1, 9), (7, 30)):
        call = example_call(info, length, past, seed=length)
        out = dict(zip([port.name for port in session.get_outputs()], session.run(None, call), strict=True))
        hidden, log_probs = run_torch(draft, call)
        ids = out["top_token_ids"].astype(np.int64)
        expected = np.take_along_axis(log_probs, ids, axis=1)
        if weight_format == "float32":
            np.testing.assert_allclose(out["top_log_probs"], expected, atol=3e-3)
            assert (ids[:, 0] == log_probs.argmax(-1)).all()
            if draft.config.kind != "lm":
                np.testing.assert_allclose(out["hidden_states"], hidden, atol=5e-3, rtol=2e-3)
        else:
            assert np.abs(out["top_log_probs"] - expected).mean() < 0.3


def test_the_tensors_are_the_modules(draft: DraftModel) -> None:
    """By name and shape: what a folder is held against without torch."""
    ours = {name: tuple(tensor.shape) for name, tensor in draft.named_parameters() if name != "lm_head"}
    assert weight_shapes(draft.config) == ours
    assert num_parameters(weights_of(draft)) == draft.num_parameters()


def test_saved_and_read_is_the_same(draft: DraftModel, tmp_path: Path) -> None:
    if draft.config.kind == "lm":
        pytest.skip("a language model is read from its own checkpoint")
    save_draft(draft, tmp_path)
    again = load_draft(tmp_path, draft.embedding, draft.lm_head if draft.head_tokens is None else draft.embedding)
    assert again.config == draft.config
    for name, tensor in draft.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)


def test_the_kinds_are_those_of_the_runtime_and_of_the_command() -> None:
    assert tuple(KINDS) == tuple(FUSIONS) == DRAFT_KINDS
    for name, kind in KINDS.items():
        assert dataclasses.replace(DRAFT, kind=name).reads_features == kind.reads_features
    (option,) = (option for option in dovetail_export.commands["draft"].params if option.name == "kind")
    assert list(option.type.choices) == TRAINED_KINDS  # type: ignore[attr-defined]  # it is a choice


def test_every_kind_is_written_without_torch(tiny_checkpoint: Path, tmp_path: Path) -> None:
    for kind in KINDS:
        write_kind(tmp_path / kind, tiny_checkpoint, kind)
    done = run_without(TORCH_FAMILY, EXPORT_DRAFTS, str(tiny_checkpoint), str(tmp_path), *KINDS)
    assert done.returncode == 0, done.stderr
    for kind in KINDS:
        draft = read_draft(tmp_path / kind, drafted_target(tiny_checkpoint))
        export_draft(draft, tmp_path / "here.onnx")
        assert (tmp_path / "here.onnx").read_bytes() == (tmp_path / f"{kind}.onnx").read_bytes()


def test_another_kind_is_refused(tiny_checkpoint: Path) -> None:
    config = config_for(block_sizes(read_checkpoint(tiny_checkpoint)), 1)
    with pytest.raises(UserError, match="kind dgf, eagle, eagle3, lm, got 'medusa'"):
        dataclasses.replace(config, kind="medusa")


@pytest.fixture(scope="module", params=[kind for kind in KINDS if kind != "dgf"])  # which most other tests have
def artifact(request: pytest.FixtureRequest, tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny target in float32 with a draft of each kind."""
    folder = tmp_path_factory.mktemp(request.param)
    write_kind(folder / "draft", tiny_checkpoint, request.param)
    settings: dict[str, Any] = {"weight_format": "fp32", "draft_weight_format": "float32"}
    write_artifact(tiny_checkpoint, folder / "artifact", draft=folder / "draft", **settings)
    return folder / "artifact"


def test_the_words_stay_the_targets(artifact: Path) -> None:
    with (
        load(artifact, numerics="exact", draft_device="cpu") as pipe,
        load(artifact, numerics="exact", draft="none") as plain,
    ):
        assert pipe.draft_kind == pipe.artifact.manifest.draft.kind  # type: ignore[union-attr]  # it has one
        for prompt in ("def f(x):", "import os\n"):
            for temperature in (0.0, 1.0):
                controls = {"max_new_tokens": 24, "temperature": temperature, "seed": 5, "ignore_eos": True}
                ours, theirs = (p.generate(prompt, **controls) for p in (pipe, plain))  # type: ignore[arg-type]
                assert ours.token_ids == theirs.token_ids
                assert ours.totals.drafted_tokens > 0
                assert ours.draft_failure is None


def test_turns_of_a_conversation(artifact: Path) -> None:
    """A second turn rolls the draft's cache back to what the prompts share, whatever a pair is made of."""
    with load(artifact, numerics="exact", draft_device="cpu") as pipe, pipe.conversation() as turns:
        first = pipe.stream([5, 6, 7, 8, 9], conversation=turns, max_new_tokens=9, ignore_eos=True).finish()
        prompt = [5, 6, 7, 8, 9, *first.token_ids[:4], 11, 12]
        second = pipe.stream(prompt, conversation=turns, max_new_tokens=12, ignore_eos=True).finish()
        fresh = pipe.generate(prompt, max_new_tokens=12, ignore_eos=True)
        assert second.token_ids == fresh.token_ids
        assert second.totals.accepted_tokens == fresh.totals.accepted_tokens
        assert second.draft_failure is None


@pytest.mark.parametrize("device", ["cpu", "openvino:CPU"])
def test_run_time_is_the_module_on_the_targets_features(artifact: Path, device: str, tiny_checkpoint: Path) -> None:
    """The first children that the runtime gets behind a text are torch's, given torch's features: the layers, the
    projection in the target's graph, the pairing of features and tokens, and the positions are all right.
    """
    model = load_torch(tiny_checkpoint)
    draft = as_module(read_draft(artifact.parent / "draft", drafted_target(tiny_checkpoint)))
    kind, size = draft.config.kind, draft.config.hidden_size
    rng = np.random.default_rng(1)
    with load(artifact, numerics="exact", draft_device=device) as pipe:
        for length in (2, 3, 17):
            tokens = rng.integers(0, 512, length)
            features = read(pipe.target, pipe.target.sequence(), tokens[:-1]).features
            assert pipe.draft is not None
            text = ModelDraft(pipe.draft)
            text.tell(Verified(0, tokens, features))
            growth = text.grow(int(tokens[-1]), DepthBudget(depth=1, width=5))
            JointCalls(pipe.draft).grow([growth], 5)
            tree = growth.candidates.best(5)
            text.close()
            ids = torch.from_numpy(tokens)[None]
            with torch.no_grad():
                taken = target_features(model, ids, draft.config.feature_layers)[:, :-1]
                fed = draft.project(taken[..., :-64] if draft.config.feature_layers else taken)
                if kind == "lm":
                    out, _ = draft(ids, None, torch.arange(length))
                else:
                    assert fed.shape[-1] == size
                    np.testing.assert_allclose(features, fed[0].numpy(), atol=2e-4, rtol=1e-4)
                    out, _ = draft(ids[:, 1:], fed, torch.arange(length - 1))
                logits = draft.logits(out[:, -1])[0]
            best = logits.topk(5).indices
            best = best if draft.head_tokens is None else draft.head_tokens[best]
            assert tree.tokens.tolist() == [int(tokens[-1]), *best.tolist()]


def test_stock_ir_stays_readable(artifact: Path) -> None:
    """The target answers like the torch model also without the runtime's rewriting."""
    model = ov.Core().read_model(artifact / "target" / "openvino_model.xml")
    names = [name for port in model.outputs for name in port.get_names()]
    assert names.count("hidden_states") == names.count("logits") == 1


@pytest.mark.parametrize("kind", TRAINED_KINDS)
def test_feature_layers_are_in_the_config(kind: str, tiny_checkpoint: Path) -> None:
    config: DraftConfig = KINDS[kind].config_for(block_sizes(read_checkpoint(tiny_checkpoint)), 1)
    assert bool(config.feature_layers) == (kind == "eagle3")
