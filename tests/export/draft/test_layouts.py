"""Proves that drafts are read as they are published: tiny random checkpoints in each layout, whose answers are held
against ones put together from transformers' own layers; and that each damaged or foreign one is refused in a line.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models.draft_kinds import random_draft
from models.tiny_llama import write_checkpoint
from oracles.torch_drafts import drafted_target
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm, LlamaRotaryEmbedding

from dovetail.export.draft.config import vocabulary_sha256
from dovetail.export.draft.layouts import check_draft, read_draft
from dovetail.export.draft.published import FAMILIES, DraftedTarget
from dovetail.export.quiet import quiet_torch
from dovetail.export.sources.checkpoint import read_checkpoint
from dovetail.export.training.draft_model import as_module, save_draft
from dovetail.runtime.errors import UserError

D, V, N = 64, 512, 96
SIZES: dict[str, Any] = {
    "hidden_size": D,
    "intermediate_size": 112,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": V,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
}
LLAMA3 = {"type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3["original_max_position_embeddings"] = 64


class Layers(nn.Module):
    """Transformers' decoder layers, with whatever first stage: the reference that published code amounts to."""

    def __init__(self, count: int, first_norm: bool = False, wide: bool = False, **settings: Any) -> None:
        super().__init__()
        config = LlamaConfig(**{**SIZES, "num_hidden_layers": count, **settings})
        config._attn_implementation = "sdpa"
        self.rotary = LlamaRotaryEmbedding(config)
        self.layers = nn.ModuleList(LlamaDecoderLayer(config, i) for i in range(count))
        if not first_norm:
            self.layers[0].input_layernorm = nn.Identity()
        if wide:
            for name in ("q_proj", "k_proj", "v_proj"):
                outputs = getattr(self.layers[0].self_attn, name).out_features
                setattr(self.layers[0].self_attn, name, nn.Linear(2 * D, outputs, bias=False))
        _randomize(self)

    def forward(self, x: Tensor, read: Tensor | None = None) -> Tensor:
        length = x.shape[1]
        angles = self.rotary(x, torch.arange(length)[None])
        mask = torch.full((length, length), -torch.inf).triu(1)[None, None]
        for layer in self.layers:
            if read is None:
                x = layer(x, position_embeddings=angles, attention_mask=mask)
                continue
            x = x + layer.self_attn(read, position_embeddings=angles, attention_mask=mask)[0]
            x, read = x + layer.mlp(layer.post_attention_layernorm(x)), None
        return x

    def named(self) -> dict[str, Tensor]:
        return {f"layers.{name}": tensor for name, tensor in self.layers.state_dict().items()}


def _randomize(module: nn.Module) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=0.15)
            else:
                parameter.uniform_(0.5, 1.5)


def linear(outputs: int, inputs: int, bias: bool = False) -> nn.Linear:
    made = nn.Linear(inputs, outputs, bias=bias)
    _randomize(made)
    return made


def norm(size: int = D) -> LlamaRMSNorm:
    made = LlamaRMSNorm(size, 1e-5)
    _randomize(made)
    return made


Answer = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Embeddings and features (not projected) [1, T, ...] -> the draft's features [1, T, D] and its logits."""
Made = tuple[dict[str, Any], dict[str, Tensor], Answer]
"""config.json, tensors, and what the published code would answer."""


def paper(target: DraftedTarget) -> Made:
    w1, w2, wz, e_norm, layers = linear(D, D), linear(D, D), linear(D, 2 * D), norm(), Layers(2)
    tensors = {"W_1.weight": w1.weight, "W_2.weight": w2.weight, "W_z.weight": wz.weight}
    tensors |= {"input_layernorm.weight": e_norm.weight, **layers.named()}

    def answer(e: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        h1, h2 = w1(h), functional.silu(w2(e_norm(e)))
        z = torch.sigmoid(wz(torch.cat([h1, h2], -1)))
        x = layers(z * h1 + (1 - z) * h2)
        return x, functional.linear(x, torch.from_numpy(target.lm_head))

    return {**SIZES, "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 2}, tensors, answer


def eagle(target: DraftedTarget, bias: bool, blocks: int = 1) -> Made:
    fc, layers = linear(D, 2 * D, bias), Layers(blocks)
    tensors = {f"fc.{name}": tensor for name, tensor in fc.state_dict().items()} | layers.named()
    tensors["embed_tokens.weight"] = torch.from_numpy(target.embedding)

    def answer(e: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        x = layers(fc(torch.cat([e, h], -1)))
        return x, functional.linear(x, torch.from_numpy(target.lm_head))

    return {**SIZES, "architectures": ["LlamaForCausalLM"], "num_hidden_layers": blocks, "bias": bias}, tensors, answer


def eagle3(target: DraftedTarget, layout: str, **more: Any) -> Made:
    scaling = {"rope_theta": 500000.0, "rope_scaling": LLAMA3} if layout == "specforge" else {}
    fc, token_norm, hidden_norm, last_norm = linear(D, 3 * D), norm(), norm(), norm()
    layers, head = Layers(1, wide=True, **scaling), linear(N, D)
    tokens = torch.randperm(V)[:N].sort().values
    first = "layers.0" if layout == "speculators" else "midlayer"
    tensors = {name.replace("layers.0", first): tensor for name, tensor in layers.named().items()}
    tensors |= {f"{first}.input_layernorm.weight": token_norm.weight, f"{first}.hidden_norm.weight": hidden_norm.weight}
    tensors |= {"fc.weight": fc.weight, "norm.weight": last_norm.weight, "lm_head.weight": head.weight}
    tensors["d2t"] = tokens - torch.arange(N)
    tensors["t2d"] = torch.zeros(V, dtype=torch.bool).index_fill(0, tokens, True)
    if layout == "speculators":
        tensors["embed_tokens.weight"] = torch.from_numpy(target.embedding)
    config: dict[str, Any] = {**SIZES, "draft_vocab_size": N, "architectures": ["LlamaForCausalLMEagle3"], **scaling}
    if layout == "speculators":
        config = {"transformer_layer_config": {**SIZES, "model_type": "llama"}, "draft_vocab_size": N}
        config |= {"architectures": ["Eagle3Speculator"], "speculators_model_type": "eagle3", **more}

    def answer(e: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        h = fc(h)
        normed = hidden_norm(h)
        stream = normed if more.get("norm_before_residual") else h
        x = layers(stream, torch.cat([token_norm(e), normed], -1))
        logits = torch.full((*x.shape[:-1], V), -torch.inf)
        logits[..., tokens] = head(last_norm(x))
        return x, logits

    return config, tensors, answer


Key = tuple[str, str]
"""Kind of draft, and what is published so."""

LAYOUTS: dict[Key, Callable[[DraftedTarget], Made]] = {
    ("dgf", "the paper's: `W_1`, `W_2`, `W_z`, `input_layernorm`, `layers.*`"): paper,
    ("eagle", "EAGLE-1 and 2: `fc` with bias, one layer"): lambda target: eagle(target, bias=True),
    ("eagle", "EAGLE-1 and 2: `fc` without bias, several layers"): lambda target: eagle(target, bias=False, blocks=2),
    ("eagle3", "EAGLE-3: `midlayer.*`, `d2t` as offsets"): lambda target: eagle3(target, "official"),
    ("eagle3", "SpecForge: the same, rotary scaling as in Llama 3"): lambda target: eagle3(target, "specforge"),
    ("eagle3", "speculators: `layers.0.*`, `transformer_layer_config`"): lambda target: eagle3(target, "speculators"),
    ("eagle3", "speculators: `norm_before_residual`, layers by number"): lambda target: eagle3(
        target, "speculators", norm_before_residual=True, eagle_aux_hidden_state_layer_ids=[0, 1, 1]
    ),
}


@pytest.fixture(scope="module")
def target(tiny_checkpoint: Path) -> DraftedTarget:
    return drafted_target(tiny_checkpoint)


def write(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor], pickled: bool = False) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}
    if pickled:
        torch.save(tensors, folder / "pytorch_model.bin")
    else:
        save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def proven() -> set[Key]:
    """What has passed so far."""
    return set()


@pytest.mark.parametrize("layout", LAYOUTS, ids=" ".join)
def test_published_layouts(layout: Key, target: DraftedTarget, proven: set[Key], tmp_path: Path) -> None:
    torch.manual_seed(0)
    config, tensors, answer = LAYOUTS[layout](target)
    draft = as_module(read_draft(write(tmp_path, config, tensors), target))
    assert draft.config.kind == layout[0]
    ids = torch.randint(0, V, (1, 11))
    features = torch.randn(1, 11, 3 * D if draft.config.feature_layers else D)
    with torch.no_grad():
        expected, expected_logits = answer(torch.from_numpy(target.embedding)[ids], features)
        got, _ = draft(ids, draft.project(features), torch.arange(11))
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
        logits = draft.logits(got)
        if draft.head_tokens is not None:
            everywhere = torch.full((1, 11, V), -torch.inf)
            everywhere[..., draft.head_tokens] = logits
            logits = everywhere
        torch.testing.assert_close(logits, expected_logits, rtol=1e-3, atol=1e-3)
    proven.add(layout)


@pytest.mark.parametrize(
    ("family", "config", "more"),
    [
        (LlamaForCausalLM, LlamaConfig, {"rope_theta": 5000.0}),
        (MistralForCausalLM, MistralConfig, {"sliding_window": None, "head_dim": 32}),
        (Qwen2ForCausalLM, Qwen2Config, {"tie_word_embeddings": True}),
        (Qwen3ForCausalLM, Qwen3Config, {"head_dim": 24}),
        (LlamaForCausalLM, LlamaConfig, {"vocab_size": V - 64}),
        (LlamaForCausalLM, LlamaConfig, {"vocab_size": V + 64}),
    ],
)
def test_language_models(
    family: Any, config: Any, more: dict[str, Any], target: DraftedTarget, proven: set[Key], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    sizes = {**SIZES, "hidden_size": 48, "num_hidden_layers": 2, **more}
    with quiet_torch():
        model = family(config(**sizes)).eval()
        _randomize(model)
        model.save_pretrained(tmp_path)
    shutil.copyfile(target.source.path / "tokenizer.json", tmp_path / "tokenizer.json")
    draft = as_module(read_draft(tmp_path, target))
    assert draft.config.kind == "lm"
    known = min(V, sizes["vocab_size"])
    ids = torch.randint(0, known, (1, 9))
    with torch.no_grad():
        expected = model(input_ids=ids).logits[..., :known]
        got = draft.logits(draft(ids, None, torch.arange(9))[0])
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)
        draft(torch.full((1, 1), V - 1), None, torch.arange(1))  # a token that only the target has
    proven.add(("lm", f"Hugging Face's, {config.model_type}"))


def test_layouts_are_documented(proven: set[Key], documented: Callable[[str, str, list[str]], None]) -> None:
    """The table in docs/drafts.md has what was proven above, no more and no less."""
    if len(proven) < len(LAYOUTS) + len(FAMILIES):
        pytest.skip("only after all tests of this file")
    rows = [f"| `{kind}` | {layout} |" for kind, layout in (*LAYOUTS, *sorted(proven - set(LAYOUTS)))]
    documented("drafts.md", "layouts", ["| kind | layout |", "| --- | --- |", *rows])


def test_feature_layers(target: DraftedTarget, tmp_path: Path) -> None:
    """speculators numbers the inputs of layers, SpecForge their outputs."""
    torch.manual_seed(0)
    config, tensors, _ = eagle3(target, "official")
    inner = {"eagle_aux_hidden_state_layer_ids": [-1, 0, 0]}
    for more, expected in (
        ({"eagle_config": inner}, (0, 1, 1)),
        ({"eagle_aux_hidden_state_layer_ids": [0, 1, 1]}, (0, 1, 1)),
        ({}, (1, 1, 1)),
    ):
        folder = write(tmp_path / "draft", config | more, tensors)
        assert read_draft(folder, target).config.feature_layers == expected
    with pytest.raises(UserError, match=r"layers from 0 to 1 .* got \[2, 16, 29\]"):
        read_draft(write(tmp_path / "d", config | {"eagle_aux_hidden_state_layer_ids": [2, 16, 29]}, tensors), target)


def test_pickles_are_asked_for_by_name(target: DraftedTarget, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config, tensors, _ = eagle(target, bias=True)
    folder = write(tmp_path, config, tensors, pickled=True)
    with pytest.raises(UserError, match=r"the pickle pytorch_model.bin, which may run code; .*`allow_pickle`"):
        read_draft(folder, target)
    assert read_draft(folder, target, allow_pickle=True).config.kind == "eagle"
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    with pytest.raises(UserError, match="expected whole weights"):
        read_draft(folder, target, allow_pickle=True)


def _without(name: str) -> Callable[[dict[str, Any], dict[str, Tensor]], object]:
    return lambda config, tensors: tensors.pop(name)


def _with(
    name: str, tensor: Callable[[dict[str, Tensor]], Tensor]
) -> Callable[[dict[str, Any], dict[str, Tensor]], object]:
    return lambda config, tensors: tensors.update({name: tensor(tensors)})


DAMAGES: dict[str, tuple[Callable[[dict[str, Any], dict[str, Tensor]], object], str]] = {
    "no fc": (_without("fc.weight"), "expected a draft of kind .* got .* with the tensors d2t, "),
    "no norm": (_without("norm.weight"), "no tensor for output_norm.weight"),
    "no o_proj": (_without("midlayer.self_attn.o_proj.weight"), "no tensor for blocks.0.o_proj.weight"),
    "a tensor too many": (
        _with("extra.weight", lambda t: torch.zeros(3)),
        "the tensor extra.weight, which nothing reads",
    ),
    "a wrong shape": (
        _with("midlayer.mlp.up_proj.weight", lambda t: torch.zeros(7, D)),
        r"blocks.0.up_proj.weight of shape \(112, 64\), got \(7, 64\)",
    ),
    "two feature layers": (_with("fc.weight", lambda t: torch.zeros(D, 2 * D)), r"projection.weight of shape"),
    "another hidden size": (lambda c, t: c.update(hidden_size=128), "draft hidden size 128 != target hidden size 64"),
    "another target": (lambda c, t: c.update(target_hidden_size=96), "draft hidden size 96 != target hidden size 64"),
    "another size of vocabulary": (
        lambda c, t: c.update(vocab_size=700),
        "draft vocabulary 700 != target vocabulary 512",
    ),
    "t2d of another vocabulary": (_with("t2d", lambda t: torch.zeros(700)), r"t2d of shape \(512,\), got \(700,\)"),
    "d2t beyond the end": (_with("d2t", lambda t: t["d2t"] + V), "an LM head of different tokens from 0 to 511"),
    "d2t below zero": (_with("d2t", lambda t: t["d2t"] - V), "an LM head of different tokens from 0 to 511"),
    "d2t twice the same": (_with("d2t", lambda t: -torch.arange(N)), "an LM head of different tokens"),
    "d2t too short": (_with("d2t", lambda t: t["d2t"][:-1]), r"d2t of shape \(96,\), got \(95,\)"),
    "no d2t": (_without("d2t"), r"lm_head.weight of shape \(512, 64\), got \(96, 64\)"),
    "another embedding": (_with("embed_tokens.weight", lambda t: torch.randn(V, D)), "the target's embedding"),
    "another vocabulary": (_with("embed_tokens.weight", lambda t: torch.randn(7, D)), r"embed_tokens.weight of shape"),
    "a norm before fc": (_with("fc_norm.0.weight", lambda t: torch.ones(D)), "fc_norm.0.weight .* not supported"),
    "a head of another width": (_with("lm_head.weight", lambda t: torch.zeros(N, 7)), r"lm_head.weight of shape"),
    "no token for a row": (_with("d2t", lambda t: t["d2t"][None]), r"d2t of shape \(96,\), got \(1, 96\)"),
    "another activation": (lambda c, t: c.update(hidden_act="gelu"), "with SiLU .* got gelu"),
    "heads rotated in part": (lambda c, t: c.update(partial_rotary_factor=0.5), "rotated as a whole, got rotated part"),
    "layers that are none": (lambda c, t: c.update(eagle_aux_hidden_state_layer_ids=3), r"layers from 0 to 1 .* got 3"),
    "settings that are none": (lambda c, t: c.update(eagle_config=[{}], num_attention_heads=0), "num_attention_heads"),
    "a head as long as the universe": (lambda c, t: c.update(head_dim=10**9), "head_dim as a positive whole number up"),
    "no sizes": (lambda c, t: c.update(num_attention_heads="many"), "num_attention_heads as a positive .* 'many'"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_bad_drafts_are_refused_in_a_line(damage: str, target: DraftedTarget, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config, tensors, _ = eagle3(target, "official")
    change, message = DAMAGES[damage]
    change(config, tensors)
    with pytest.raises(UserError, match=message) as refused:
        read_draft(write(tmp_path, config, tensors), target)
    assert "\n" not in str(refused.value)


def test_truncated_weights(target: DraftedTarget, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config, tensors, _ = eagle(target, bias=True)
    path = write(tmp_path, config, tensors) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"expected whole weights in .*model.safetensors"):
        read_draft(tmp_path, target)
    path.unlink()
    with pytest.raises(UserError, match=r"expected safetensors weights in .* got none"):
        read_draft(tmp_path, target)


def test_config_that_is_none(target: DraftedTarget, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"a draft folder with config.json"):
        read_draft(tmp_path, target)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(UserError, match="to be a JSON object"):
        read_draft(tmp_path, target)


@pytest.fixture(scope="module")
def other_checkpoint(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the same sizes as the tiny one, with as many tokens, two of which have changed places."""
    folder = tmp_path_factory.mktemp("other")
    shutil.copytree(tiny_checkpoint, folder, dirs_exist_ok=True)
    document = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = document["model"]["vocab"]
    vocabulary["!"], vocabulary["#"] = vocabulary["#"], vocabulary["!"]
    (folder / "tokenizer.json").write_text(json.dumps(document))
    return folder


def test_a_language_model_of_another_vocabulary(other_checkpoint: Path, target: DraftedTarget, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"expected the target's tokenizer beside the draft, got another .* token '[!#]'"
    ):
        read_draft(other_checkpoint, target)
    with pytest.raises(UserError, match="expected the target's tokenizer"):
        check_draft(other_checkpoint, target.source)
    for file in ("config.json", "model.safetensors"):
        shutil.copyfile(other_checkpoint / file, tmp_path / file)
    with pytest.raises(UserError, match=r"tokenizer\.json beside the draft"):
        read_draft(tmp_path, target)


@pytest.mark.parametrize("longer", ["the draft's", "the target's"])
def test_padding_tokens_are_no_other_vocabulary(longer: str, target: DraftedTarget, tmp_path: Path) -> None:
    """llama.cpp names the rows that pad an embedding; but a hole, or a token behind the last in another's place, is
    another vocabulary.
    """
    document = json.loads(target.source.tokenizer)
    for names, message in (
        ({"[PAD512]": 512, "[PAD513]": 513}, None),
        ({"!": 512}, "another .* token '!'"),
        ({"!": 3, "#": 1, "[PAD512]": 512}, "another .* token"),
    ):
        vocabulary = {**document["model"]["vocab"], **names}
        changed = json.dumps(document | {"model": {**document["model"], "vocab": vocabulary, "merges": []}})
        ours, theirs = (changed, target.source.tokenizer)[:: 1 if longer == "the draft's" else -1]
        source = dataclasses.replace(target.source, tokenizer=theirs)
        (tmp_path / "tokenizer.json").write_text(ours)
        (tmp_path / "config.json").write_text("{}")
        with pytest.raises(UserError, match=message) if message else contextlib.nullcontext():
            check_draft(tmp_path, source)


def test_a_damaged_tokenizer(target: DraftedTarget, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config, tensors, _ = eagle(target, bias=True)
    write(tmp_path, config, tensors)
    (tmp_path / "tokenizer.json").write_text('{"model": 3}')
    with pytest.raises(UserError, match=r"expected a tokenizer in .*tokenizer\.json"):
        read_draft(tmp_path, target)


def test_our_draft_of_another_vocabulary(other_checkpoint: Path, target: DraftedTarget, tmp_path: Path) -> None:
    digest = vocabulary_sha256(target.tokenizer)
    draft = random_draft(target.source.path, kind="eagle", vocabulary_sha256=digest)
    save_draft(draft, tmp_path)
    check_draft(tmp_path, target.source)
    assert read_draft(tmp_path, target).config == draft.config
    with pytest.raises(UserError, match="trained with another of the same size"):
        check_draft(tmp_path, read_checkpoint(other_checkpoint))


def test_our_drafts_head_is_checked(target: DraftedTarget, tmp_path: Path) -> None:
    save_draft(random_draft(target.source.path, kind="eagle3", head_size=100), tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["head_tokens"][3] = V
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="different tokens from 0 to 511"):
        read_draft(tmp_path, target)
    weights["head_tokens"][3] = V - 1
    del weights["lm_head"]
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="to fit its config"):
        read_draft(tmp_path, target)


def test_rows_of_the_targets_head(target: DraftedTarget, tmp_path: Path) -> None:
    """A draft that was trained on some tokens keeps the list of them and takes the rows from the target."""
    draft = random_draft(target.source.path, kind="dgf", head_size=100)
    save_draft(draft, tmp_path)
    assert "lm_head" not in load_file(tmp_path / "model.safetensors")
    read = read_draft(tmp_path, target)
    assert draft.head_tokens is not None
    assert read.head_tokens is not None
    np.testing.assert_array_equal(read.head_tokens, draft.head_tokens.numpy())
    np.testing.assert_array_equal(read.lm_head, target.lm_head[read.head_tokens])
    weights = load_file(tmp_path / "model.safetensors")
    weights["head_tokens"][3] = V
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="different tokens from 0 to 511"):
        read_draft(tmp_path, target)


def test_other_families_are_no_drafts(target: DraftedTarget, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, vocab_size=512)
    config = json.loads((tmp_path / "config.json").read_text())
    for change, message in (
        ({"model_type": "gpt_neox"}, "of the families llama, mistral, qwen2, qwen3, got 'gpt_neox'"),
        ({"model_type": "mistral", "sliding_window": 100}, "a sliding window of 100"),
        ({"num_hidden_layers": 3}, "the 3 layers of the config, got 2"),
        ({"vocab_size": 511}, r"embed_tokens.weight of shape \(511, 64\)"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(UserError, match=message):
            read_draft(tmp_path, target)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["lm_head.weight"]
    write(tmp_path, config, tensors)
    with pytest.raises(UserError, match="the LM head of an untied model"):
        read_draft(tmp_path, target)


def test_our_drafts_weights_are_those_of_the_config(target: DraftedTarget, tmp_path: Path) -> None:
    save_draft(random_draft(target.source.path, kind="dgf"), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for change, message in (
        ({"num_layers": 10**12}, r"to fit its config, .* got no tensor for blocks.999999999999.o_proj.weight"),
        ({"intermediate_size": 7}, r"down_proj.weight of shape \(64, 7\), got \(64, 128\)"),
        ({"qkv_bias": True}, "no tensor for blocks.0.k_proj.bias"),
        ({"head_dim": 16.0}, "a draft.head_dim as int in"),
        ({"rope_scale": "x"}, "a draft.rope_scale as a number in"),
        ({"num_heads": 0}, "positive whole numbers for hidden_size"),
        ({"feature_layers": ["x"]}, r"a draft.feature_layers\[0\] as int"),
        ({"qk_norm": 1}, "a draft.qk_norm as bool"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(UserError, match=message):
            read_draft(tmp_path, target)
