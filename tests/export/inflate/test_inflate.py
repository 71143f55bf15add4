"""Proves that an inflated model is the small one in a big one's shape: logits equal to float32 rounding (target and
draft, grouped heads, doubled heads, tied embeddings, scaled rotary positions, padded tokens), the text of its INT8
artifact is the small artifact's, and its matrices are those of a transformers model of the shape, without zeros where
the function allows others. Bad input is one clear line, and nothing is written.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from models.draft_kinds import random_draft
from transformers import LlamaConfig, LlamaForCausalLM

from dovetail.export.artifact.writing import write_artifact
from dovetail.export.commands.cli import dovetail_export
from dovetail.export.convert.torch_model import body_and_head, load_torch
from dovetail.export.inflate import enlarged_weights, inflate
from dovetail.export.sources.checkpoint import read_checkpoint
from dovetail.export.sources.llama_shapes import (
    INFLATION_NOTE,
    SHAPES,
    Shape,
    check_grows,
    find_shape,
    holding,
    read_shape,
)
from dovetail.export.target.native.families import read_decoder
from dovetail.export.target.native.scheme import scheme
from dovetail.export.target.native.writing import write_native_target
from dovetail.export.training.draft_model import DraftModel, load_draft, save_draft
from dovetail.runtime import load
from dovetail.runtime.artifact.manifest import TARGET_WEIGHTS
from dovetail.runtime.errors import UserError

SMALL = Shape(64, 2, 128, 4, 2, 16, 512)  # the tiny checkpoint of conftest.py
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
CASES = {
    "only hidden size, units and tokens": (SMALL, Shape(96, 2, 384, 4, 2, 16, 700), {}),
    "grouped to bigger groups, layers": (SMALL, Shape(144, 4, 384, 12, 3, 16, 1024), {}),
    "grouped to one query a head": (SMALL, Shape(128, 3, 384, 8, 8, 16, 1024), {}),
    "groups of three to groups of two": (Shape(48, 1, 128, 6, 2, 16, 512), Shape(128, 2, 192, 8, 4, 16, 512), {}),
    "heads of double size": (SMALL, Shape(192, 3, 384, 4, 2, 32, 1000), {}),
    "heads of double size, llama3 scaling": (SMALL, Shape(192, 3, 384, 4, 4, 32, 1000), {"rope_parameters": LLAMA3}),
    "heads of size not hidden / heads, tied": (
        Shape(64, 2, 128, 2, 1, 48, 512),
        Shape(200, 2, 400, 4, 2, 144, 513),
        {},
    ),
    "the same hidden size, no padded tokens": (SMALL, Shape(64, 3, 128, 4, 2, 16, 512), {}),
}


def make_source(folder: Path, tokenizer: Path, shape: Shape, **settings: Any) -> Path:
    """A random Llama of any shape, norms included, with a tokenizer of 512 tokens."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(_config(shape, **settings))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.uniform_(0.5, 1.5)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tokenizer / name, folder / name)
    return folder


def _config(shape: Shape, **settings: Any) -> Any:
    return LlamaConfig(
        **{
            "hidden_size": shape.hidden_size,
            "num_hidden_layers": shape.num_layers,
            "intermediate_size": shape.intermediate_size,
            "num_attention_heads": shape.num_heads,
            "num_key_value_heads": shape.num_kv_heads,
            "head_dim": shape.head_dim,
            "vocab_size": shape.vocab_size,
            "max_position_embeddings": 512,
            "initializer_range": 0.15,
            "bos_token_id": 0,
            "eos_token_id": 0,
            **settings,
        }
    )


def make_draft(folder: Path, source: Path, blocks: int = 2) -> Path:
    from models.tiny_llama import write_draft

    return write_draft(folder, source, blocks=blocks)


def shape_folder(folder: Path, shape: Shape) -> str:
    """A folder that --like takes."""
    folder.mkdir()
    (folder / "config.json").write_text(_config(shape).to_json_string(use_diff=False))
    return str(folder)


@pytest.mark.parametrize("case", CASES)
def test_same_function(case: str, tiny_checkpoint: Path, tmp_path: Path) -> None:
    small_shape, shape, settings = CASES[case]
    settings = settings | {"tie_word_embeddings": "tied" in case}
    source = make_source(tmp_path / "source", tiny_checkpoint, small_shape, **settings)
    draft = make_draft(tmp_path / "draft", source)
    out, draft_out = tmp_path / "out", tmp_path / "draft-out"
    like = shape_folder(tmp_path / "like", shape)
    report = inflate.inflate(source, like, out, draft=draft, draft_out=draft_out, dtype="float32", seed=3)
    small, big = load_torch(source), load_torch(out)
    assert read_shape(out) == shape
    assert sum(weight.numel() for weight in big.parameters()) == shape.parameters() == report.parameters
    ids = torch.randint(0, small_shape.vocab_size, (3, 200), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        _same(big(ids).logits, small(ids).logits)
        (body, *weights), (big_body, *big_weights) = body_and_head(small), body_and_head(big)
        old, new = load_draft(draft, *weights), load_draft(draft_out, *big_weights)
        assert new.num_parameters() == shape.draft_parameters(2) == report.draft_parameters
        features, big_features = (b(input_ids=ids).last_hidden_state[:, :-1] for b in (body, big_body))
        predicted = _predicted(old, ids, features)
        grown = _predicted(new, ids, big_features)
        _same(new.logits(grown), old.logits(predicted))
        again = _predicted(new, ids[:, 1:], grown[:, :-1])  # a level deeper: its own features, as a tree grows
        _same(new.logits(again), old.logits(_predicted(old, ids[:, 1:], predicted[:, :-1])))


def test_a_draft_keeps_the_tokens_of_its_head(tiny_checkpoint: Path, tmp_path: Path) -> None:
    small = random_draft(tiny_checkpoint, kind="dgf", head_size=100)
    save_draft(small, tmp_path / "draft")
    shape = Shape(96, 2, 384, 4, 2, 16, 700)
    like, out, draft_out = shape_folder(tmp_path / "like", shape), tmp_path / "out", tmp_path / "draft-out"
    inflate.inflate(tiny_checkpoint, like, out, draft=tmp_path / "draft", draft_out=draft_out, dtype="float32")
    big = load_draft(draft_out, *body_and_head(load_torch(out))[1:])
    assert big.head_tokens is not None
    assert torch.equal(big.head_tokens, small.head_tokens)
    assert big.lm_head.shape == (100, shape.hidden_size)


def _predicted(draft: DraftModel, ids: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    out: torch.Tensor = draft(ids[:, 1:], features, torch.arange(ids.shape[1] - 1))[0]
    return out


def _same(logits: torch.Tensor, expected: torch.Tensor) -> None:
    """To float32 rounding, and no probability for padded tokens."""
    vocab_size = expected.shape[-1]
    scale = float(expected.abs().max())
    assert scale > 1
    torch.testing.assert_close(logits[..., :vocab_size], expected, rtol=0, atol=2e-5 * scale)
    if logits.shape[-1] > vocab_size:
        assert float((expected.logsumexp(-1) - logits[..., vocab_size:].amax(-1)).min()) > inflate.PADDED_MARGIN


def test_int8_artifact_is_the_small_one_in_a_bigger_shape(
    tiny_checkpoint: Path, tiny_draft: Path, tiny_artifact: Path, tmp_path: Path
) -> None:
    # Trained rows keep their largest entry, so their 8-bit scales: the INT8 target computes what the small INT8 target
    # does, up to the order of sums. Not with another head_dim (the queries' scales, times its root, round anew to
    # float16) nor in float16 (the weights are rounded first).
    shape = Shape(192, 5, 384, 12, 4, 16, 1000)
    like = shape_folder(tmp_path / "like", shape)
    out, draft_out = tmp_path / "out", tmp_path / "draft"
    inflate.inflate(tiny_checkpoint, like, out, draft=tiny_draft, draft_out=draft_out, dtype="float32")
    manifest = write_artifact(out, tmp_path / "artifact", draft=draft_out)
    assert manifest.target.parameters == shape.parameters()
    random = make_source(tmp_path / "random", tiny_checkpoint, shape)
    (tmp_path / "random-artifact").mkdir()
    source = read_checkpoint(random)
    write_native_target(source, read_decoder(source), scheme("int8"), tmp_path / "random-artifact", "int8")
    artifacts = tmp_path / "artifact", tmp_path / "random-artifact"
    assert _matrices(artifacts[0]) == _matrices(artifacts[1])
    sizes = [(artifact / TARGET_WEIGHTS).stat().st_size for artifact in artifacts]
    assert abs(sizes[0] - sizes[1]) < 256  # small constants besides weights
    texts, accepted, top = [], [], []
    for path in (tiny_artifact, tmp_path / "artifact"):
        with load(path, draft_device="cpu", numerics="exact") as pipe:
            prompts = ["def parse(self, text):\n", "import os\n\nclass Decoder(", "    return [x for x in"]
            # each alone: what several texts share of a pass depends on the last digit of their chances
            done = [pipe.generate(prompt, max_new_tokens=48, ignore_eos=True, logprobs=2) for prompt in prompts]
        texts.append([text.token_ids for text in done])  # a seed draws otherwise from a bigger vocabulary
        accepted.append([text.totals.accept_histogram for text in done])
        top.append(np.array([token.top[0][1] for text in done for token in text.logprobs or ()]))
    assert texts[1] == texts[0]
    assert accepted[1] == accepted[0]
    assert np.abs(top[1] - top[0]).max() < 1e-3


def _matrices(artifact: Path) -> list[tuple[str, tuple[int, ...]]]:
    """Of the target's IR: every 8-bit constant, and every matrix product, with its shape."""
    import openvino as ov

    model = ov.Core().read_model(artifact / "target/openvino_model.xml")
    found = []
    for node in model.get_ops():
        kind = node.get_type_name()
        if kind == "Constant" and node.get_output_element_type(0).to_string() == "i8":
            found.append((kind, tuple(node.get_output_shape(0))))
        elif kind in ("MatMul", "ScaledDotProductAttention"):
            found.append((kind, tuple(d.get_length() if d.is_static else -1 for d in node.output(0).partial_shape)))
    return sorted(found)


def test_nothing_to_skip(tiny_checkpoint: Path, tmp_path: Path) -> None:
    shape = Shape(128, 5, 384, 8, 4, 16, 1024)
    inflate.inflate(tiny_checkpoint, shape_folder(tmp_path / "like", shape), tmp_path / "out")
    seen: set[bytes] = set()
    for name, weight in load_torch(tmp_path / "out").state_dict().items():
        kind = name.split(".")[-2]
        zeros = {"embed_tokens": 0.3, "v_proj": 0.5, "up_proj": 0.5, "o_proj": 0.9, "down_proj": 0.7}.get(kind, 0.01)
        assert float((weight == 0).float().mean()) <= zeros, name
        assert weight.numpy().tobytes() not in seen, f"{name}: OpenVINO would keep it once"
        seen.add(weight.numpy().tobytes())


def test_trained_rows_keep_their_8_bit_scales(tiny_checkpoint: Path, tmp_path: Path) -> None:
    shape = Shape(128, 2, 384, 8, 4, 16, 1024)
    inflate.inflate(tiny_checkpoint, shape_folder(tmp_path / "like", shape), tmp_path / "out", dtype="float32")
    small, big = (load_torch(path).state_dict() for path in (tiny_checkpoint, tmp_path / "out"))
    names = ["lm_head", "model.embed_tokens", "model.layers.0.mlp.up_proj", "model.layers.1.mlp.gate_proj"]
    names += [f"model.layers.{i}.{name}" for i in (0, 1) for name in ("self_attn.o_proj", "mlp.down_proj")]
    for name in names:
        weight = small[f"{name}.weight"]
        assert torch.equal(weight.abs().amax(1), big[f"{name}.weight"][: len(weight)].abs().amax(1)), name


def test_seed_and_dtype(tiny_checkpoint: Path, tmp_path: Path) -> None:
    like = shape_folder(tmp_path / "like", Shape(128, 3, 384, 4, 2, 16, 600))
    folders = [tmp_path / name for name in ("one", "again", "other", "half")]
    for folder, seed, dtype in zip(folders, (1, 1, 2, 1), ("float32",) * 3 + ("float16",), strict=True):
        inflate.inflate(tiny_checkpoint, like, folder, seed=seed, dtype=dtype)
    one, again, other, half = ({p.name: p.read_bytes() for p in f.glob("*.safetensors")} for f in folders)
    assert one == again
    assert set(one) == set(other)
    assert all(one[name] != other[name] for name in one)
    assert sum(map(len, half.values())) < 0.55 * sum(map(len, one.values()))
    assert json.loads((folders[3] / "config.json").read_text())["dtype"] == "float16"
    index = json.loads((folders[0] / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(one)


def test_command_and_note(tiny_checkpoint: Path, tiny_draft: Path, tmp_path: Path) -> None:
    like = shape_folder(tmp_path / "like", Shape(128, 3, 384, 4, 2, 16, 600))
    settings = tmp_path / "source"
    shutil.copytree(tiny_checkpoint, settings)
    (settings / "chat_template.jinja").write_text("{{ messages }}")
    done = CliRunner().invoke(
        dovetail_export,
        [
            *("inflate", str(settings), "--like", like, "-o", str(tmp_path / "out"), "--json", "--seed", "4"),
            *("--draft", str(tiny_draft), "--draft-output", str(tmp_path / "draft")),
        ],
        catch_exceptions=False,
    )
    assert done.exit_code == 0
    document = json.loads(done.stdout.splitlines()[-1])
    for folder in ("out", "draft"):
        assert json.loads((tmp_path / folder / INFLATION_NOTE).read_text()) == document
    assert document["source"] == "source"
    assert document["shape"]["num_layers"] == 3
    assert (document["seed"], document["dtype"]) == (4, "float16")
    assert document["target"]["argmax_agreement"] > 0.95
    assert document["target"]["padded_margin"] > inflate.PADDED_MARGIN
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "{{ messages }}"
    assert str(tmp_path) not in (tmp_path / "out" / INFLATION_NOTE).read_text()


def test_named_shapes() -> None:
    for name, shape in SHAPES.items():
        check_grows(SMALL, shape)
        with torch.device("meta"):
            model = LlamaForCausalLM(_config(shape))
        assert sum(weight.numel() for weight in model.parameters()) == shape.parameters(), name
    assert round(SHAPES["llama-1b"].parameters() / 1e9, 2) == 1.10
    tied = SHAPES["smollm2-1.7b"]
    assert round((tied.parameters() - tied.vocab_size * tied.hidden_size) / 1e9, 2) == 1.71
    assert round(SHAPES["llama-7b"].parameters() / 1e9, 2) == 6.74


def test_named_shapes_hold_deeper_sources_at_the_same_cost() -> None:
    smollm2 = Shape(576, 30, 1536, 9, 3, 64, 49152)
    for name in ("llama-1b", "smollm2-1.7b", "llama-7b"):
        shape = SHAPES[name]
        held = holding(shape, smollm2)
        check_grows(smollm2, held)
        assert (held.num_layers, held.vocab_size) == (max(30, shape.num_layers), 49152)
        assert 0.99 < held.pass_weights() / shape.pass_weights() <= 1, name
        for field in ("hidden_size", "num_heads", "num_kv_heads", "head_dim"):
            assert getattr(held, field) == getattr(shape, field)
    assert holding(SHAPES["llama-7b"], SMALL) is SHAPES["llama-7b"]
    with pytest.raises(UserError, match="expected a shape of at least"):
        holding(SHAPES["llama-68m"], smollm2)


@pytest.mark.parametrize(
    ("shape", "found"),
    [
        ({"hidden_size": 48}, "expected hidden_size of at least the source's 64, got 48"),
        ({"num_layers": 1}, "expected num_layers of at least the source's 2, got 1"),
        ({"vocab_size": 500}, "expected vocab_size of at least the source's 512, got 500"),
        ({"num_kv_heads": 1}, "expected num_kv_heads of at least the source's 2, got 1"),
        ({"head_dim": 24}, "expected a head_dim that the source's 16 divides"),
        ({"num_heads": 9}, "expected heads that the key/value heads divide, got 9 heads and 2"),
        ({"head_dim": 17}, "expected an even head_dim"),
        ({"num_heads": 6}, "expected a hidden size that the heads divide, as transformers does, got 64 and 6 heads"),
        ({"vocab_size": 600}, "to keep 88 padded tokens away"),
    ],
)
def test_shapes_that_do_not_fit(shape: dict[str, int], found: str, tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "like"
    folder.mkdir()
    names = {
        "num_layers": "num_hidden_layers",
        "num_heads": "num_attention_heads",
        "num_kv_heads": "num_key_value_heads",
    }
    sizes = {names.get(name, name): size for name, size in (dataclasses.asdict(SMALL) | shape).items()}
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"} | sizes))
    _refused(found, tiny_checkpoint, str(folder), tmp_path)


def test_groups_that_do_not_fit() -> None:
    with pytest.raises(UserError, match="expected at least 4 key/value heads of 3 heads each"):
        check_grows(Shape(64, 2, 128, 8, 2, 16, 512), Shape(144, 2, 128, 9, 3, 16, 512))


def _refused(found: str, source: Path, like: str, tmp_path: Path, **settings: Any) -> None:
    with pytest.raises(UserError) as error:
        inflate.inflate(source, like, tmp_path / "out", **settings)
    assert found in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out*"))


def test_other_bad_input(
    tiny_checkpoint: Path, tiny_draft: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = shape_folder(tmp_path / "like", Shape(128, 3, 384, 4, 2, 16, 600))
    _refused("got 'llama-2t'", tiny_checkpoint, "llama-2t", tmp_path)
    for change, found in (
        ({"model_type": "qwen2"}, "got model_type 'qwen2'"),
        ({"attention_bias": True}, "got biases"),
    ):
        other = tmp_path / found.split()[-1]
        shutil.copytree(tiny_checkpoint, other)
        config = json.loads((other / "config.json").read_text()) | change
        (other / "config.json").write_text(json.dumps(config))
        _refused(found, other, good, tmp_path)
    scaled = make_source(
        tmp_path / "yarn",
        tiny_checkpoint,
        SMALL,
        rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0},
    )
    doubled = shape_folder(tmp_path / "doubled", Shape(128, 3, 384, 4, 2, 32, 600))
    _refused("got 'yarn', which depends on it", scaled, doubled, tmp_path)

    other_draft = {"draft": tiny_draft, "draft_out": tmp_path / "draft-out"}
    wide = make_source(tmp_path / "wide", tiny_checkpoint, Shape(96, 2, 128, 4, 2, 16, 512))
    _refused("draft hidden size 64 != target hidden size 96", wide, good, tmp_path, **other_draft)
    heads = make_source(tmp_path / "heads", tiny_checkpoint, Shape(64, 2, 128, 2, 2, 16, 512))
    _refused("expected a draft with the target's heads", heads, good, tmp_path, **other_draft)
    assert not (tmp_path / "draft-out").exists()
    both = {"draft": tiny_draft, "draft_out": tmp_path / "out"}
    _refused("for both the target and the draft", tiny_checkpoint, good, tmp_path, **both)

    for name, value, found in (
        ("available_memory", lambda: 1 << 20, "GB of memory for 0.00 B parameters, got 0.0 GB"),
        ("PADDED_MARGIN", 1e9, "nats below the likely ones"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(inflate, name, value)
            _refused(found, tiny_checkpoint, good, tmp_path, **other_draft)
    with monkeypatch.context() as patch:
        patch.setattr(enlarged_weights, "PADDED_ROW", -1e5)
        _refused("use `dtype` float32", tiny_checkpoint, good, tmp_path)

    (tmp_path / "there").mkdir()
    with pytest.raises(UserError, match="which exists"):
        inflate.inflate(tiny_checkpoint, good, tmp_path / "there")
    done = CliRunner().invoke(
        dovetail_export,
        ["inflate", str(tiny_checkpoint), "--like", good, "-o", str(tmp_path / "o"), "--draft", str(tiny_draft)],
    )
    assert isinstance(done.exception, UserError)
    assert "expected --draft and --draft-output together" in str(done.exception)
    assert find_shape(good).num_layers == 3


def test_models_above_a_billion_parameters_are_compressed_once(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import optimum.exporters.openvino.__main__ as optimum_export

    from dovetail.export.convert.optimum_export import export_target

    monkeypatch.setattr(optimum_export, "_MAX_UNCOMPRESSED_SIZE", 1000)
    assert export_target(tiny_checkpoint, tmp_path).parameters > 1000  # and asserts symmetric 8-bit weights
