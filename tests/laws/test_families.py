"""Proves for every supported family: what the command exports from a checkpoint writes, with tree drafts, the tokens of
transformers' greedy `generate`, also past the length of an attention window; every weight format and every kind of
draft is exported and run; rows have the same bits in any company. Writes the tables of docs/support.md and
docs/lossless.md.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import campaign
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from models import families
from models.draft_kinds import write_kind
from models.families import FAMILIES, WINDOW, WINDOWED
from safetensors.torch import load_file
from texts.one_text import decode
from transformers import AutoModelForCausalLM

from dovetail.export.artifact.writing import write_artifact
from dovetail.export.commands.cli import dovetail_export
from dovetail.export.convert.torch_model import target_features
from dovetail.export.draft.kinds import KINDS
from dovetail.export.draft.kinds.eagle3 import default_feature_layers
from dovetail.runtime import GenerationConfig, load
from dovetail.runtime.drafts.base import Foresight, Grown, blind
from dovetail.runtime.errors import UserError
from dovetail.runtime.pipeline import Pipeline
from dovetail.runtime.policies.base import TreeBudget
from dovetail.runtime.sampling.sampler import Sampler, TokenLogprobs
from dovetail.runtime.targets.base import read
from dovetail.runtime.targets.row_check import check_rows
from dovetail.runtime.trees.shape import TreeShape
from dovetail.runtime.trees.tree import CandidateTree, Float32s
from dovetail.runtime.trees.verified import Verified

NEW_TOKENS = 40  # each text crosses a window
TREE = TreeShape(nodes=9, depth=4, width=2)
PROMPTS = [np.random.default_rng(7).integers(1, families.VOCAB, length).tolist() for length in (3, 30, 90)]
BESIDE = {"int8": "dgf", "int8_asym": "lm", "int4": "dgf", "fp16": "eagle", "fp32": "eagle3"}
"""The kind of draft that each format is exported with: every format and every kind once a family."""
NEAR = {"fp32": 1e-6, "fp16": 1e-3, "int8": 0.05, "int8_asym": 0.05, "int4": 1.0}
"""Nats between what is exported and its source."""
SAME_PLACE = {"fp32": 1e-6, "fp16": 1e-4, "int8": 0.02, "int8_asym": 0.02, "int4": 0.3}
"""How far, in mean cosine, the features that the draft is fed may be from torch's; the next position's are 0.48 off."""

WEIGHT_FORMATS = tuple(BESIDE)  # "keep" is for a GGUF
WHOLE = ("Llama 3", "Qwen3", "Qwen3-MoE")  # every pair, where tables are written and in a thorough run
OF_EACH_WAY = ("Llama 3", "Qwen3-MoE")  # a graph of our own and one by torch: all formats in every run of the tests
ALWAYS = ("fp32", "int8")  # for every family in every run
Pair = tuple[str, str, str]
"""Family, weight format, kind of draft."""
PAIRS: list[Pair] = [(name, weight_format, kind) for name in FAMILIES for weight_format, kind in BESIDE.items()]
OTHER_PAIRS: list[Pair] = [
    (name, weight_format, kind)
    for name, weight_format, kind in itertools.product(WHOLE, WEIGHT_FORMATS, KINDS)
    if BESIDE[weight_format] != kind
]

PROVEN: set[Pair] = set()
SAME_BYTES: dict[tuple[str, str], int] = {}
"""Family, weight format: how many rows were compared."""


def runs_always(pair: Pair) -> bool:
    """Whether every run of the tests has this one of `PAIRS`."""
    name, weight_format, _ = pair
    return name in OF_EACH_WAY or weight_format in ALWAYS


def rows_run_always(pair: Pair) -> bool:
    """Whether every run of the tests compares its rows."""
    name, weight_format, _ = pair
    return name in OF_EACH_WAY or weight_format == "int8"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "pair" in metafunc.fixturenames:
        everything = metafunc.config.getoption("--write-tables") or campaign.is_thorough
        runs = rows_run_always if metafunc.function is test_the_same_bytes else runs_always
        pairs = [*PAIRS, *OTHER_PAIRS] if everything else list(filter(runs, PAIRS))
        metafunc.parametrize("pair", pairs, ids="-".join)


class Family:
    """A checkpoint, what transformers writes behind each prompt and computes on the way, and the artifacts of it that
    the command exports.
    """

    def __init__(self, folder: Path, name: str, tokenizer: Path) -> None:
        self.checkpoint = families.write_family(folder / "checkpoint", tokenizer, *FAMILIES[name])
        self._text = folder / "text"
        self._text.write_text("def window(tokens):\n    return [token for token in tokens if token]\n\n" * 8)
        model = AutoModelForCausalLM.from_pretrained(self.checkpoint, dtype=torch.float32).eval()
        model.generation_config.eos_token_id = None  # all texts to their full length
        model.generation_config.pad_token_id = 0
        self.texts = []
        for prompt in PROMPTS:
            ids = torch.tensor([prompt])
            with torch.no_grad():
                out = model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=NEW_TOKENS,
                    do_sample=False,
                    use_cache=False,  # with one, its longrope goes on with keys from before the border
                )
            self.texts.append(out[0, len(prompt) :].tolist())
            assert len(set(self.texts[-1])) > 12, "a text that repeats itself would prove little"
        read = target_features(model, torch.tensor(PROMPTS[1:2]), default_feature_layers(2))[0]  # [T, 4 * D]
        self._layers, self._last = read[:, : -families.HIDDEN], read[:, -families.HIDDEN :].numpy()

    def artifact(self, weight_format: str, kind: str) -> Path:
        """In this format, with a random draft of this kind."""
        folder = self.checkpoint.parent / f"{weight_format}-{kind}"
        if not folder.exists():
            arguments = ["model", str(self.checkpoint), "-o", str(folder), "--weight-format", weight_format]
            arguments += ["--check-text", str(self._text), "--draft", str(self.draft(kind))]
            done = CliRunner().invoke(dovetail_export, [*arguments, "--draft-weight-format", "float32"])
            assert done.exit_code == 0, done.output + str(done.exception)
        return folder

    def draft(self, kind: str) -> Path:
        """A random one."""
        folder = self.checkpoint.parent / kind
        return folder if folder.exists() else write_kind(folder, self.checkpoint, kind)

    def features(self, kind: str) -> Float32s:
        """What a draft of this kind is fed of the second prompt, by torch: [T, D]."""
        if kind != "eagle3":
            return self._last
        projection = load_file(self.draft(kind) / "model.safetensors")["projection.weight"]
        return (self._layers @ projection.T).numpy()


@pytest.fixture(scope="session")
def family(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Family]:
    made: dict[str, Family] = {}

    def make(name: str) -> Family:
        if name not in made:
            made[name] = Family(tmp_path_factory.mktemp("family"), name, tiny_checkpoint / "tokenizer.json")
        return made[name]

    return make


class Bushy:
    """Knows the text to come, and offers every token of it behind a wrong sibling: in a tree the right ones have other
    slots than positions. Where one child a node is wanted, that is the right one.
    """

    def __init__(self, prompt: list[int], text: list[int]) -> None:
        self._prompt, self._text, self.known = prompt, text, 0

    def tell(self, verified: Verified) -> None:
        self.known = max(self.known, verified.end)

    def truncate(self, known: int) -> None:
        self.known = min(self.known, known)

    def close(self) -> None:
        self.known = 0

    def grow(self, root: int, budget: TreeBudget, foresight: Foresight = blind) -> Grown:
        candidates, node = CandidateTree(root), 0
        for token in self._text[self.known + 1 - len(self._prompt) :]:
            if not budget.wants_level(candidates.levels):
                break
            siblings = [(token + 1 + i) % families.VOCAB for i in range(budget.width - 1)]
            first = candidates.add_level([node] * budget.width, [*siblings, token], [0.0] * budget.width)
            node = first + budget.width - 1
        return Grown(candidates)


def write(pipe: Pipeline, prompt: list[int], text: list[int]) -> tuple[list[int], list[int]]:
    """(the tokens behind `prompt` with a draft that knows `text`, accept lengths)"""
    sampler = Sampler(GenerationConfig(), prompt, families.VOCAB)
    updates = decode(pipe.target, Bushy(prompt, text), TREE, sampler, prompt, NEW_TOKENS)
    return updates.tokens, updates.accept_lengths


@pytest.mark.parametrize("name", FAMILIES)
def test_tokens_are_those_of_transformers(name: str, family: Callable[[str], Family]) -> None:
    """In float32; with trees that are known to be right but for siblings, and with matches in the text."""
    made = family(name)
    with load(
        made.artifact("fp32", BESIDE["fp32"]), draft="lookup", numerics="exact", ctx_size=families.CONTEXT
    ) as pipe:
        assert pipe.artifact.manifest.target.sliding_window == (WINDOW if name in WINDOWED else None)
        for prompt, text in zip(PROMPTS, made.texts, strict=True):
            tokens, lengths = write(pipe, prompt, text)
            assert tokens == text, f"with a tree draft, {len(prompt)} tokens of prompt"
            assert np.mean(lengths) > 2, "what is drafted is right"
            done = pipe.generate(prompt, temperature=0, max_new_tokens=NEW_TOKENS, ignore_eos=True)
            assert done.token_ids == text
    PROVEN.add((name, "fp32", "lookup"))


def test_every_format_and_every_kind_of_draft(pair: Pair, family: Callable[[str], Family]) -> None:
    name, weight_format, kind = pair
    pair_works(family(name), weight_format, kind)
    PROVEN.add(pair)


def written(pipe: Pipeline, prompt: list[int], text: list[int] | None) -> tuple[list[int], list[TokenLogprobs]]:
    """The tokens behind `prompt` and their log-probabilities, with a draft that knows `text`, or without."""
    sampler = Sampler(GenerationConfig(logprobs=3), prompt, families.VOCAB)
    draft = None if text is None else Bushy(prompt, text)
    return decode(pipe.target, draft, TREE, sampler, prompt, NEW_TOKENS).tokens, sampler.logprobs


def test_the_same_bytes(pair: Pair, family: Callable[[str], Family]) -> None:
    """In `fast` and in `exact`, alone and with trees, through the length of a window, rows have the same bits."""
    name, weight_format, kind = pair
    if BESIDE[weight_format] != kind:
        pytest.skip("the target is that of another pair")
    artifact, compared = family(name).artifact(weight_format, kind), 0
    for numerics in ("fast", "exact"):
        with load(artifact, draft="none", numerics=numerics, ctx_size=families.CONTEXT) as pipe:
            found = check_rows(pipe.target)
            assert not found.differing, f"{numerics}: {found.summary}"
            compared += found.compared
            plain = written(pipe, PROMPTS[1], None)
            assert written(pipe, PROMPTS[1], plain[0]) == plain
    SAME_BYTES[name, weight_format] = compared


def pair_works(made: Family, weight_format: str, kind: str) -> None:
    """Assert that the artifact is near its source, that the draft is fed what torch says, and that with it, and with
    trees that are known to be right but for siblings, the text is the one that the same target writes without.
    """
    with load(
        made.artifact(weight_format, kind),
        draft="artifact",
        draft_device="cpu",
        numerics="exact",
        ctx_size=families.CONTEXT,
    ) as pipe:
        manifest = pipe.artifact.manifest
        assert manifest.draft is not None
        assert (manifest.target.weight_format, manifest.draft.kind) == (weight_format, kind)
        checks = manifest.checks
        assert checks.target_kl_mean is not None
        assert checks.draft_argmax_agreement is not None
        assert checks.target_kl_mean < NEAR[weight_format]
        assert checks.draft_argmax_agreement > 0.97, "the draft is written in float32"
        prompt = PROMPTS[1]
        if kind != "lm":
            sequence = pipe.target.sequence()
            fed = read(pipe.target, sequence, np.array(prompt)).features
            sequence.close()
            wanted = made.features(kind)
            cosine = (fed * wanted).sum(1) / np.linalg.norm(fed, axis=1) / np.linalg.norm(wanted, axis=1)
            assert cosine.mean() > 1 - SAME_PLACE[weight_format]
        text, _ = write(pipe, prompt, [])
        assert weight_format != "fp32" or text == made.texts[1]
        tokens, lengths = write(pipe, prompt, text)
        assert tokens == text
        assert np.mean(lengths) > 2
        done = pipe.generate(prompt, temperature=0, max_new_tokens=NEW_TOKENS, ignore_eos=True)
        assert done.token_ids == text
        assert done.draft_failure is None
        assert done.totals.drafted_tokens > 0


@pytest.mark.parametrize("name", sorted(WINDOWED))
def test_relaxed_trees_beyond_the_window_would_be_wrong(
    name: str, family: Callable[[str], Family], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one block with a mask, with acceptance `relaxed`: so they fall back to chains there, and without that other
    tokens come out.
    """
    made = family(name)
    artifact = made.artifact("fp32", BESIDE["fp32"])
    with load(artifact, draft="none", numerics="exact", acceptance="relaxed", ctx_size=families.CONTEXT) as pipe:
        assert pipe.target.window == WINDOW
        for window, is_right in ((WINDOW, True), (None, False)):
            monkeypatch.setattr(pipe.target, "window", window)
            texts = [write(pipe, prompt, text)[0] for prompt, text in zip(PROMPTS, made.texts, strict=True)]
            assert (texts == made.texts) == is_right


@pytest.mark.parametrize("name", families.REFUSED)
def test_what_is_refused_says_why(name: str, tiny_checkpoint: Path, tmp_path: Path) -> None:
    model, special, reason = families.REFUSED[name]
    source = families.write_family(tmp_path / "source", tiny_checkpoint / "tokenizer.json", model, special)
    with pytest.raises(UserError, match=reason):
        write_artifact(source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_the_table_of_bytes(documented: Callable[[str, str, list[str]], None], request: pytest.FixtureRequest) -> None:
    """As the one below."""
    pairs = PAIRS if request.config.getoption("--write-tables") else filter(rows_run_always, PAIRS)
    if {(name, weight_format) for name, weight_format, _ in pairs} - SAME_BYTES.keys():
        pytest.skip("not all of this file's tests were run, or some failed")
    rows = [f"| family | {' | '.join(WEIGHT_FORMATS)} |", "|---" * (len(WEIGHT_FORMATS) + 1) + "|"]
    rows += [f"| {name} {'| the same ' * len(WEIGHT_FORMATS)}|" for name in FAMILIES]
    documented("lossless.md", "rows", rows)


def test_the_support_table(documented: Callable[[str, str, list[str]], None], request: pytest.FixtureRequest) -> None:
    """Says what was proven: in the run that writes it all of it, in others the part that they run."""
    expected = {(name, "fp32", "lookup") for name in FAMILIES} | set(PAIRS)
    if request.config.getoption("--write-tables"):
        expected |= set(OTHER_PAIRS)
    else:
        expected -= {pair for pair in PAIRS if not runs_always(pair)}
    if expected - PROVEN:
        pytest.skip("not all of this file's tests were run, or some failed")
    columns = [*(f"{weight_format}, `{BESIDE[weight_format]}`" for weight_format in WEIGHT_FORMATS), "`lookup`"]
    rows = [f"| family | {' | '.join(columns)} | trees |", "|---" * (len(columns) + 2) + "|"]
    for name in FAMILIES:
        trees = "everywhere; with `relaxed` within the window, then chains" if name in WINDOWED else "everywhere"
        label = f"{name}, {families.PUBLISHED[name]}" if name in families.PUBLISHED else name
        rows.append(f"| {label} {'| yes ' * len(columns)}| {trees} |")
    documented("support.md", "families", rows)
    every = f"{', '.join(WEIGHT_FORMATS)} | {', '.join(f'`{kind}`' for kind in KINDS)}"
    rows = [f"| {name} | {every} |" for name in WHOLE]
    documented("support.md", "pairs", ["| family | each of | with each of |", "|---|---|---|", *rows])
    refused = [f"| {name} | {reason} |" for name, (_, _, reason) in families.REFUSED.items()]
    documented("support.md", "refused", ["| family | the reason given |", "|---|---|", *refused])
