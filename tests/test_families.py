"""Proves for every supported family: what the command exports from a checkpoint writes, with tree drafts, the tokens of
transformers' greedy `generate`, also past the length of an attention window, where trees would be verified wrongly and
chains are used instead; in every weight format; with drafts that need no training. Writes docs/support.md.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import families
import numpy as np
import openvino as ov
import pytest
import torch
from click.testing import CliRunner
from conftest import write_draft
from dovetail.export.artifact import write_artifact
from dovetail.export.cli import dovetail_export
from dovetail.export.quiet import quiet_torch
from dovetail.export.target import matrix_widths
from dovetail.export.weights import Compression, compress
from dovetail.runtime import engine, load
from dovetail.runtime.artifact import open_artifact
from dovetail.runtime.draft import Foresight, blind
from dovetail.runtime.engine import rounds
from dovetail.runtime.errors import UserError
from dovetail.runtime.likelihood import Divergence, Float64s, log_probs
from dovetail.runtime.manifest import TARGET_MODEL, WEIGHT_FORMATS, TreeShape
from dovetail.runtime.pipeline import Pipeline
from dovetail.runtime.policy import FixedPolicy, Growth
from dovetail.runtime.target import TargetModel, read_ir
from dovetail.runtime.tree import Float32s, Int64s, Tree, root_only
from families import FAMILIES, WINDOW, WINDOWED
from transformers import AutoConfig, AutoModelForCausalLM

NEW_TOKENS = 60
TREE = TreeShape(nodes=9, depth=4, width=2)
PROMPTS = [np.random.default_rng(7).integers(1, families.VOCAB, length).tolist() for length in (3, 30, 90)]


SUPPORT: dict[str, dict[str, str]] = {name: {} for name in FAMILIES}
DRAFTS = ("lookup", "dgf")


class Family:
    """A checkpoint, its float32 artifact, and what transformers writes behind each prompt."""

    def __init__(self, checkpoint: Path, artifact: Path) -> None:
        self.checkpoint, self.artifact = checkpoint, artifact
        model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
        model.generation_config.eos_token_id = None  # all texts to their full length
        model.generation_config.pad_token_id = 0
        self.texts = []
        for prompt in PROMPTS:
            ids = torch.tensor([prompt])
            with torch.no_grad():
                out = model.generate(
                    ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False
                )
            self.texts.append(out[0, len(prompt) :].tolist())
            assert len(set(self.texts[-1])) > 12, "a text that repeats itself would prove little"


@pytest.fixture(scope="session")
def family(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Family]:
    made: dict[str, Family] = {}

    def make(name: str) -> Family:
        if name not in made:
            folder = tmp_path_factory.mktemp("family")
            families.write_family(folder / "checkpoint", tiny_checkpoint / "tokenizer.json", *FAMILIES[name])
            text = folder / "text"
            text.write_text("def window(tokens):\n    return [token for token in tokens if token]\n\n" * 8)
            write_draft(folder / "draft", folder / "checkpoint", blocks=1)
            arguments = ["model", str(folder / "checkpoint"), "-o", str(folder / "artifact"), "--weight-format", "fp32"]
            arguments += [
                "--check-text",
                str(text),
                "--draft",
                str(folder / "draft"),
                "--draft-weight-format",
                "float32",
            ]
            done = CliRunner().invoke(dovetail_export, arguments)
            assert done.exit_code == 0, done.output + str(done.exception)
            made[name] = Family(folder / "checkpoint", folder / "artifact")
        return made[name]

    return make


class Bushy:
    """Knows the text to come, and offers every token of it behind a wrong sibling: in a tree the right ones have other
    slots than positions. Where one child a node is wanted, that is the right one.
    """

    native_s = 0.0
    bytes_in = bytes_out = 0

    def __init__(self, text: list[int]) -> None:
        self._text, self._done = text, 0  # tokens written so far

    def propose(self, tokens: Int64s, features: Float32s, growth: Growth, foresight: Foresight = blind) -> Tree:
        self._done += len(tokens) if self._done else 1
        drafted, parents, node = [int(tokens[-1])], [-1], 0
        for depth, token in enumerate(self._text[self._done :]):
            if not growth.goes_on(depth, [0.0]):
                break
            siblings = [(token + 1 + i) % families.VOCAB for i in range(growth.width - 1)]
            drafted += [*siblings, token]
            parents += [node] * growth.width
            node = len(drafted) - 1
        return Tree(np.array(drafted), np.array(parents)) if len(drafted) > 1 else root_only(drafted[0])


def write(pipe: Pipeline, prompt: list[int], text: list[int]) -> tuple[list[int], list[int]]:
    """(the tokens behind `prompt` with a draft that knows `text`, accept lengths)"""
    target = pipe.target.sequence()
    loop = rounds(target, Bushy(text), FixedPolicy(TREE), lambda row: int(row.argmax()), np.array(prompt), NEW_TOKENS)
    done = list(loop)
    target.close()
    return [token for made in done for token in made.tokens], [made.accept_length for made in done]


@pytest.mark.parametrize("name", FAMILIES)
def test_tokens_are_those_of_transformers(name: str, family: Callable[[str], Family]) -> None:
    made = family(name)
    pipe = load(made.artifact, draft="lookup", numerics="exact", ctx_size=families.CONTEXT)
    assert pipe.artifact.manifest.target.sliding_window == (WINDOW if name in WINDOWED else None)
    for prompt, text in zip(PROMPTS, made.texts, strict=True):
        tokens, lengths = write(pipe, prompt, text)
        assert tokens == text, f"with a tree draft, {len(prompt)} tokens of prompt"
        assert np.mean(lengths) > 2, "what is drafted is right, but where a tree is cut to a chain at the window"
    checks = pipe.artifact.manifest.checks
    assert checks.target_kl_mean is not None
    assert checks.target_kl_mean < 1e-6
    pipe.close()
    SUPPORT[name]["fp32"] = "the same tokens"


@pytest.mark.parametrize("kind", DRAFTS)
@pytest.mark.parametrize("name", FAMILIES)
def test_tokens_are_the_same_with_drafts_of_every_kind(name: str, kind: str, family: Callable[[str], Family]) -> None:
    """A `dgf` draft of random weights, and matches in the text."""
    made = family(name)
    with load(
        made.artifact,
        draft="lookup" if kind == "lookup" else "artifact",
        draft_device="cpu",
        numerics="exact",
        ctx_size=families.CONTEXT,
    ) as pipe:
        agreement = pipe.artifact.manifest.checks.draft_argmax_agreement
        assert agreement is not None
        assert agreement > 0.97, "the draft's graph is torch's draft"
        for prompt, text in zip(PROMPTS, made.texts, strict=True):
            done = pipe.generate(prompt, temperature=0, max_new_tokens=NEW_TOKENS, ignore_eos=True)
            assert done.token_ids == text
            assert done.draft_failure is None
    SUPPORT[name][kind] = "yes"


@pytest.mark.parametrize("name", FAMILIES)
def test_every_weight_format(name: str, family: Callable[[str], Family], tmp_path: Path) -> None:
    """The float32 target, compressed as the command does, stays near itself."""
    artifact = open_artifact(family(name).artifact)
    info, config = artifact.manifest.target, AutoConfig.from_pretrained(family(name).checkpoint)
    text = np.array(PROMPTS[2])

    def read(path: Path, weight_format: str) -> list[Float64s]:
        target = dataclasses.replace(info, weight_format=weight_format)
        model = TargetModel(path, target, numerics="exact", threads=2, cache_tokens=families.CONTEXT)
        return list(log_probs(model, text))

    expected = read(artifact.file(TARGET_MODEL), "fp32")
    for weight_format in WEIGHT_FORMATS:
        if weight_format == "fp32":
            continue
        with quiet_torch():
            model = compress(read_ir(artifact.file(TARGET_MODEL)), Compression(weight_format), matrix_widths(config))
        path = tmp_path / weight_format / "openvino_model.xml"
        path.parent.mkdir()
        ov.save_model(model, path, compress_to_fp16=weight_format == "fp16")
        divergence = Divergence()
        for ours, theirs in zip(read(path, weight_format), expected, strict=True):
            divergence.add(ours, theirs, np.zeros(len(ours), np.int64))
        assert 0 < divergence.kl_mean < (1.0 if weight_format == "int4" else 0.05), weight_format
        SUPPORT[name][weight_format] = "yes"


@pytest.mark.parametrize("name", sorted(WINDOWED))
def test_trees_beyond_the_window_would_be_wrong(
    name: str, family: Callable[[str], Family], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same without the fall back to chains: other tokens come out, so the test above can fail."""
    made = family(name)
    pipe = load(made.artifact, draft="none", numerics="exact", ctx_size=families.CONTEXT)
    monkeypatch.setattr(engine, "propose", lambda draft, target, *rest: draft.propose(*rest))
    pipe.target.window = None
    assert [write(pipe, prompt, text)[0] for prompt, text in zip(PROMPTS, made.texts, strict=True)] != made.texts
    pipe.close()


@pytest.mark.parametrize("name", families.REFUSED)
def test_what_is_refused_says_why(name: str, tiny_checkpoint: Path, tmp_path: Path) -> None:
    model, special, reason = families.REFUSED[name]
    source = families.write_family(tmp_path / "source", tiny_checkpoint / "tokenizer.json", model, special)
    with pytest.raises(UserError, match=reason):
        write_artifact(source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_the_support_table(documented: Callable[[str, str, list[str]], None]) -> None:
    columns = [*WEIGHT_FORMATS, *DRAFTS]
    if any(set(row) != set(columns) for row in SUPPORT.values()):
        pytest.skip("not all of this file's tests were run, or some failed")
    rows = [f"| family | {' | '.join(columns)} | trees |", "|---" * (len(columns) + 2) + "|"]
    for name, row in SUPPORT.items():
        trees = "within the window, then chains" if name in WINDOWED else "everywhere"
        rows.append(f"| {name} | {' | '.join(row[column] for column in columns)} | {trees} |")
    documented("support.md", "families", rows)
    refused = [f"| {name} | {reason} |" for name, (_, _, reason) in families.REFUSED.items()]
    documented("support.md", "refused", ["| family | the reason given |", "|---|---|", *refused])
