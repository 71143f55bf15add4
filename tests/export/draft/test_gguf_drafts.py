"""Proves that a GGUF file of a small language model is a draft: its graph is that of the checkpoint which it was made
of, to the rounding of its blocks, the words stay the target's, all without torch; and that one with other tokens or of
another family is refused in a line.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from models.draft_kinds import write_kind
from oracles.torch_drafts import drafted_target
from processes.lean_process import EXPORT, TORCH_FAMILY, run_without

from dovetail.export.draft.layouts import read_draft
from dovetail.export.target.gguf_writer import write_gguf
from dovetail.runtime import load
from dovetail.runtime.errors import UserError

TEXT = "def parse(text):\n    return text.split()\n\n" * 20


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model of one layer with the tokens of `tiny_checkpoint`."""
    return write_kind(tmp_path_factory.mktemp("small") / "checkpoint", tiny_checkpoint, "lm")


@pytest.fixture(scope="module")
def gguf(checkpoint: Path) -> Path:
    """The same in Q8_0."""
    path = checkpoint.with_name("small.gguf")
    write_gguf(checkpoint, path)
    return path


def test_it_is_the_checkpoint(gguf: Path, checkpoint: Path, tiny_checkpoint: Path) -> None:
    target = drafted_target(tiny_checkpoint)
    ours, theirs = read_draft(gguf, target), read_draft(checkpoint, target)
    assert ours.config.kind == "lm"
    np.testing.assert_allclose(ours.config.rope_frequencies, theirs.config.rope_frequencies, rtol=1e-6)
    assert ours.tensors.keys() == theirs.tensors.keys()
    pairs = [(ours.tensors[name], theirs.tensors[name]) for name in ours.tensors]
    for mine, other in [*pairs, (ours.embedding, theirs.embedding), (ours.lm_head, theirs.lm_head)]:
        np.testing.assert_allclose(mine, other, atol=np.abs(other).max() / 200)  # a step of Q8_0 is at most 1 / 127


def test_an_artifact_of_two_files_without_torch(gguf: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Target and draft."""
    text, out = tmp_path / "text", tmp_path / "out"
    text.write_text(TEXT)
    write_gguf(tiny_checkpoint, tmp_path / "big.gguf")
    arguments = ["model", str(tmp_path / "big.gguf"), "-o", str(out), "--draft", str(gguf), "--check-text", str(text)]
    done = run_without(TORCH_FAMILY, EXPORT, *arguments)
    assert done.returncode == 0, done.stderr
    with (
        load(out, numerics="exact", draft_device="cpu") as pipe,
        load(out, numerics="exact", draft="none") as plain,
    ):
        assert pipe.draft_kind == "lm"
        for prompt in ("def f(x):", "import os\n"):
            ours, theirs = (
                p.generate(prompt, max_new_tokens=24, temperature=0, ignore_eos=True) for p in (pipe, plain)
            )
            assert ours.token_ids == theirs.token_ids
            assert ours.totals.drafted_tokens > 0


def test_with_other_tokens(checkpoint: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(checkpoint, other)
    document = json.loads((other / "tokenizer.json").read_text())
    vocabulary = document["model"]["vocab"]
    vocabulary["!"], vocabulary["#"] = vocabulary["#"], vocabulary["!"]
    (other / "tokenizer.json").write_text(json.dumps(document))
    write_gguf(other, tmp_path / "other.gguf")
    with pytest.raises(UserError, match=r"the target's tokenizer .* got another in .*other\.gguf .* token '[!#]'"):
        read_draft(tmp_path / "other.gguf", drafted_target(tiny_checkpoint))


def test_what_is_no_draft(gguf: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"a draft folder with config.json or a .gguf file"):
        read_draft(tmp_path / "missing.gguf", drafted_target(tiny_checkpoint))
    (tmp_path / "cut.gguf").write_bytes(gguf.read_bytes()[:5000])
    with pytest.raises(UserError) as refused:
        read_draft(tmp_path / "cut.gguf", drafted_target(tiny_checkpoint))
    assert "\n" not in str(refused.value)
