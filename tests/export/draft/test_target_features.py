"""Proves that the features which a target's OpenVINO graph computes for an EAGLE-3 draft are the right layers', in
families whose layers differ: against transformers' own hidden states.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import openvino as ov
import pytest
import torch
from models import families
from openvino import opset13
from transformers import AutoConfig, AutoModelForCausalLM

from dovetail.export.convert.optimum_export import _optimum_export
from dovetail.export.convert.torch_model import load_torch, target_features
from dovetail.export.draft.kinds.eagle3 import default_feature_layers
from dovetail.export.draft.target_features import add_projected_features, layer_input
from dovetail.runtime.errors import UserError

LAYERS = (0, 1, 1)


@pytest.fixture(scope="module", params=["Llama 3", "Gemma 2", "Qwen3-MoE"])
def checkpoint(request: pytest.FixtureRequest, tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("family") / "checkpoint"
    return families.write_family(folder, tiny_checkpoint / "tokenizer.json", *families.FAMILIES[request.param])


def test_features_are_those_of_transformers(checkpoint: Path, tmp_path: Path) -> None:
    config = AutoConfig.from_pretrained(checkpoint)
    _optimum_export(checkpoint, tmp_path / "raw", config, keep_float32=True)
    model = ov.Core().read_model(tmp_path / "raw" / "openvino_model.xml")
    torch.manual_seed(0)
    projection = torch.randn(config.hidden_size, 3 * config.hidden_size) / 10
    model = add_projected_features(model, LAYERS, projection.numpy())
    request = ov.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"}).create_infer_request()
    ids = np.random.default_rng(0).integers(1, 500, (1, 20))
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": np.arange(20)[None]}
    feeds["beam_idx"] = np.zeros(1, np.int32)
    wanted = {name for port in request.model_inputs for name in port.get_names()}
    request.infer({name: value for name, value in feeds.items() if name in wanted})
    got = request.get_tensor("hidden_states").data
    reference = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    taken = target_features(reference, torch.from_numpy(ids), LAYERS)[..., : 3 * config.hidden_size]
    np.testing.assert_allclose(got, (taken @ projection.T).numpy(), atol=1e-4)
    # What layer 1 reads is not what layer 0 reads: the numbers above can't come from another layer.
    assert (
        taken[..., : config.hidden_size] - taken[..., config.hidden_size : 2 * config.hidden_size]
    ).abs().max() > 0.1


def test_layers_of_our_own_graphs_are_found_by_name() -> None:
    x = opset13.parameter([-1, -1, 8], np.float32, name="x")
    stream = opset13.add(x, np.float32(1))
    stream.set_friendly_name("layers.1.input")
    model = ov.Model([opset13.relu(stream)], [x])
    assert layer_input(model, 1).get_node().get_friendly_name() == "layers.1.input"
    with pytest.raises(UserError, match="one input of the target's layer 10"):
        layer_input(model, 10)


def test_a_layer_that_is_not_there(tiny_artifact_fp32: Path) -> None:
    model = ov.Core().read_model(tiny_artifact_fp32 / "target" / "openvino_model.xml")
    with pytest.raises(UserError, match=r"one input of the target's layer 7 .* got 0"):
        add_projected_features(model, (0, 1, 7), np.zeros((64, 192), np.float32))


def test_torchs_features_are_layer_inputs_and_the_last_state(tiny_checkpoint: Path) -> None:
    model, seen = load_torch(tiny_checkpoint), list[torch.Tensor]()
    hook = model.model.layers[1].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    ids = torch.arange(1, 12)[None]
    features = target_features(model, ids, (0, 1))
    hook.remove()
    assert features.shape == (1, 11, 3 * 64)
    with torch.no_grad():
        torch.testing.assert_close(features[..., :64], model.model.embed_tokens(ids))
        torch.testing.assert_close(features[..., 64:128], seen[0])
        torch.testing.assert_close(model.lm_head(features[..., 128:]), model(input_ids=ids).logits)


def test_default_layers() -> None:
    """The published code's for the depths that drafts are published for; three different ones wherever there are."""
    assert default_feature_layers(32) == (2, 16, 29)
    assert default_feature_layers(80) == (2, 40, 77)
    for depth in range(4, 40):
        layers = default_feature_layers(depth)
        assert len(set(layers)) == 3
        assert max(layers) < depth
