"""Proves that the table of losslessness counts what departs: all texts of a real artifact are plain decoding's in every
cell, planted bugs show in the cells that they concern and in no others, and what an engine lacks is named.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from campaign import played

from dovetail.calibration.bench import lossless
from dovetail.calibration.bench.lossless import WAYS, Cell, ChildWriter, Engine, Written, make_texts, measure, rows
from dovetail.calibration.bench.pipeline_writer import PipelineWriter
from dovetail.calibration.bench.runner_process import RunnerError
from dovetail.runtime import load
from dovetail.runtime.artifact.opening import open_artifact
from dovetail.runtime.commands import cli
from dovetail.runtime.decoding import sequence as decoding
from dovetail.runtime.decoding.sequence import Sequence as TextSequence
from dovetail.runtime.evaluation.standard_library import held_out_files
from dovetail.runtime.text.tokenizer import load_tokenizer
from dovetail.runtime.trees.acceptance import Accepted, Draw
from dovetail.runtime.trees.shape import TreeShape
from dovetail.runtime.trees.tree import Float32s, Tree

TOKENS, ROOM = 33, 300  # more than a page of the cache holds
TEXTS = played(5, of=8)
GENAI = (sys.executable, "-m", "dovetail.calibration.bench.peers.genai_writer")


def questions(artifact: Path, count: int) -> list[list[int]]:
    encode = load_tokenizer(open_artifact(artifact)).encode
    return [encode(text[: 100 + 60 * i]) for i, (_, text) in zip(range(count), held_out_files(), strict=False)]


def ours(artifact: Path, *drafts: str) -> Engine:
    def open_with(draft: str) -> PipelineWriter:
        tree = TreeShape(8, 4, 2) if draft == "artifact" else None
        return PipelineWriter(load(artifact, draft=draft, tree=tree, ctx_size=512, sequences=8, profile=None))

    return Engine("ours", drafts, open_with)


def cells_of(artifact: Path, *drafts: str, count: int = TEXTS) -> list[Cell]:
    advanced: list[None] = []
    texts = make_texts(questions(artifact, count), ROOM)
    cells = measure([ours(artifact, *drafts)], texts, tokens=TOKENS, seed=3, advance=lambda: advanced.append(None))
    assert len(advanced) == len(cells)
    return cells


def only(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Some of the controls, which is enough where a bug is planted."""
    every = lossless.make_controls

    def few(texts: Any) -> dict[str, dict[str, Any]]:
        return {name: every(texts)[name] for name in names}

    monkeypatch.setattr(lossless, "make_controls", few)


def test_every_cell_of_ours_is_whole(shipped_artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch, "T = 0.8", "stop strings")
    cells = cells_of(shipped_artifact, "none", "lookup", "artifact")
    assert len(cells) == 3 * 2 * len(WAYS)
    assert [cell for cell in cells if cell.equal != TEXTS or cell.texts != TEXTS or cell.reason] == []
    assert not any(cell.preemptions for cell in cells if cell.way != lossless.PREEMPTED)
    for draft in ("none", "lookup", "artifact"):  # which of their texts fill the cache is up to what is drawn
        assert any(cell.preemptions for cell in cells if cell.draft == draft), f"nothing was preempted with {draft}"
    for cell in cells:
        assert bool(cell.accepted) <= (cell.draft != "none")
    trained = [cell for cell in cells if cell.draft == "artifact" and cell.controls != "T = 0.8"]
    assert all(cell.accepted for cell in trained), "a draft that is never believed proves nothing"


def departing(cells: list[Cell], value: Callable[[Cell], str]) -> set[str]:
    return {value(cell) for cell in cells if cell.equal != cell.texts}


def test_a_draft_that_is_believed_shows_where_there_is_one(
    shipped_artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    only(monkeypatch, "greedy", "penalties")
    accept = decoding.accept

    def believing(
        tree: Tree, logits: Float32s, draw: Draw, limit: int | None = None, ends: frozenset[int] = frozenset()
    ) -> Accepted:
        """Takes the draft's first token for the target's."""
        if len(tree) > 1 and limit != 1:
            draw(logits[0])
            return Accepted([0, 1], [int(tree.tokens[1]), draw(logits[1])])
        return accept(tree, logits, draw, limit, ends)

    monkeypatch.setattr(decoding, "accept", believing)
    cells = cells_of(shipped_artifact, "none", "artifact", count=3)
    assert departing(cells, lambda cell: cell.draft) == {"artifact"}
    assert departing(cells, lambda cell: cell.way) == set(WAYS)


def test_a_text_that_goes_on_wrongly_behind_a_preemption_shows_there_alone(
    shipped_artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    only(monkeypatch, "greedy", "penalties")
    preempt = TextSequence.preempt

    def forgetful(self: TextSequence) -> None:
        preempt(self)
        self.text[0] = self.text[1]

    monkeypatch.setattr(TextSequence, "preempt", forgetful)
    cells = cells_of(shipped_artifact, "none", "lookup", count=8)  # fewer push no text out that departs
    assert departing(cells, lambda cell: cell.way) == {lossless.PREEMPTED}


class Fake:
    """Writes the way's number, or fails as it is told to."""

    def __init__(self, draft: str) -> None:
        self.draft = draft
        if draft == "lost":
            raise RunnerError("could not be started")

    def write(self, way: str, texts: Any, controls: dict[str, Any], tokens: int, seed: int) -> Written:
        if "logit_bias" in controls:
            raise RunnerError("has no such thing")
        made: list[Any] = [[i] for i in range(len(texts))]
        if self.draft == "wrong" and way == lossless.CACHED:
            made[1] = [7]
        if self.draft == "failing" and way == lossless.TOGETHER_WAY:
            return Written([None] * len(texts), errors=["boom", "boom"])
        return Written(made)

    def close(self) -> None:
        pass


def test_what_departs_fails_or_is_absent() -> None:
    engine = Engine("fake", ["plain", "wrong", "failing", "lost"], Fake)
    cells = measure([engine], make_texts([[1, 2]] * 3, 99), tokens=4, seed=0, advance=lambda: None)
    found = {(cell.draft, cell.controls, cell.way): cell for cell in cells}
    assert found["wrong", "greedy", lossless.CACHED].departed == [1]
    assert found["failing", "greedy", lossless.TOGETHER_WAY].reason == "boom"
    assert found["lost", "greedy", lossless.ALONE].reason == "could not be started"
    head, *table = rows(cells)
    assert head == ["engine", "draft", "greedy", "T = 0.8", "penalties", "logit bias", "stop strings"]
    dash = "\u2013"
    assert [row[1:] for row in table] == [
        ["plain", "3", "3", "3", dash, "3"],
        ["wrong", *["3 / 3 / 3 / 2 / 3"] * 3, dash, "3 / 3 / 3 / 2 / 3"],
        ["failing", *["3 / 0 / 3 / 3 / 3"] * 3, dash, "3 / 0 / 3 / 3 / 3"],
        ["lost", *[dash] * 5],
    ]


def test_texts_fit_and_are_what_was_asked() -> None:
    asked = [list(range(begin, begin + 90)) for begin in (0, 100, 200)]
    texts = make_texts(asked, 2000)
    assert [text.question for text in texts] == asked
    assert texts[2].follow_up == asked[0]
    assert texts[1].long[:180] == asked[1] + asked[2]
    assert {len(text.long) for text in texts} == {lossless.LONG_TOKENS}
    for text in make_texts(asked, 80):
        assert len(text.question) + len(text.follow_up) <= 80
        assert len(text.long) <= 80


@pytest.fixture
def genai(tiny_artifact_fp32: Path) -> Iterator[ChildWriter]:
    pytest.importorskip("openvino_genai")
    options = {"artifact": str(tiny_artifact_fp32), "threads": 2, "numerics": "exact", "draft": "none"}
    writer = ChildWriter(GENAI, options, 60)
    yield writer
    writer.close()


def test_openvino_genai_writes_what_we_write(genai: ChildWriter, tiny_artifact_fp32: Path) -> None:
    texts = make_texts(questions(tiny_artifact_fp32, 3), ROOM)
    with load(tiny_artifact_fp32, draft="none", numerics="exact", ctx_size=512, sequences=8) as pipe:
        for way in {*WAYS, *WAYS.values()}:
            made = genai.write(way, texts, {}, TOKENS, 0)
            expected = PipelineWriter(pipe).write(way, texts, {}, TOKENS, 0)
            turns = [[tokens for tokens, _ in text] for text in expected.texts]
            assert made.texts == [text if len(text) == 2 else text[0] for text in turns], way
            assert made.errors == []
    with pytest.raises(RunnerError, match="no logit bias"):
        genai.write(lossless.ALONE, texts, {"logit_bias": {1: 1.0}}, TOKENS, 0)


def command(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    monkeypatch.setattr(sys, "argv", ["dovetail", "bench", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


def test_the_command(
    tiny_artifact: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    only(monkeypatch, "greedy", "T = 0.8")
    prompts, page = tmp_path / "prompts.jsonl", tmp_path / "page.md"
    prompts.write_text('{"prompt": "def main(argv):"}\n{"prompt": "import os"}\n')
    page.write_text("before\n<!-- lossless -->\nold\n<!-- /lossless -->\nbehind\n")
    words = [tiny_artifact, "--lossless", "--prompts", prompts, "-n", 6, "--threads", 2, "--report", page, "--json"]
    assert command(monkeypatch, *words) == 0
    out, _ = capfd.readouterr()
    document = json.loads(out.splitlines()[-1])
    assert document["departed"] == 0
    assert {cell["engine"] for cell in document["cells"]} == {
        *("Dovetail, `fast`", "Dovetail, `exact`", "OpenVINO GenAI, its defaults", "OpenVINO GenAI, float32")
    }
    written = page.read_text()
    assert written.startswith("before\n<!-- lossless -->\n")
    assert written.endswith("<!-- /lossless -->\nbehind\n")
    assert "old" not in written
    assert "| Dovetail, `exact` | trained (dgf) | 2 | 2 |" in written
    assert document["command"] in written


@pytest.mark.parametrize("flag", [["--growth"], ["--temperature", "1"], ["--runners", "plain"]])
def test_flags_of_times_are_refused(
    flag: list[str], tiny_artifact: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert command(monkeypatch, tiny_artifact, "--lossless", *flag) == 2
    assert f"error: {flag[0]}: expected it without --lossless" in capfd.readouterr().err
