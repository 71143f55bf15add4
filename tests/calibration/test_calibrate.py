"""Proves that `dovetail calibrate` decides as theory says where costs and acceptance are planted, and the command as a
user meets it: a profile that generate then uses, JSON, a report, and one clear line for every mistake.
"""

from __future__ import annotations

import dataclasses
import json
import math
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from fakes import planted
from models import plain_artifact

from dovetail.calibration.choose import calibration as decision
from dovetail.calibration.choose.calibration import Calibration, Effort, calibrate
from dovetail.calibration.choose.comparison import Compared, compare
from dovetail.calibration.measure.pair import Run
from dovetail.calibration.measure.prompts import Prompts, passages, passages_of
from dovetail.runtime.artifact.manifest import TARGET_MODEL, TARGET_WEIGHTS, TOKENIZER
from dovetail.runtime.commands import cli
from dovetail.runtime.policies import host_profile as profile
from dovetail.runtime.policies.base import Policy
from dovetail.runtime.trees.shape import TreeShape

SMALL = Effort(
    latency_s=0.5,
    nodes=(1, 2, 3, 4, 6, 8, 10, 12, 16),
    contexts=(40, 100),
    questions=8,
    conversations=4,
    passages=4,
    passage_tokens=24,
    new_tokens=30,
    positions=60,
    records_s=0.5,
    compared_texts=3,
    compared_tokens=40,
    compared_s=60,
)
DEFAULT = TreeShape(16, 7, 4)
PROMPTS = passages_of("a plan", planted.tokens(200), SMALL.passages, SMALL.passage_tokens)


@pytest.fixture
def own_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    planted.use_own_clock(monkeypatch)


def decided(pair: planted.PlantedPair, temperature: float = 0.0) -> tuple[Calibration, decision.Decision]:
    result = calibrate(pair, PROMPTS, effort=SMALL, default=DEFAULT, temperatures=(temperature,))
    assert result.too_noisy is None
    return result, result.decisions[0]


def step(at: int) -> Any:
    return lambda nodes: 4.0 if nodes <= at else 12.0


@pytest.mark.usefixtures("own_clock")
@pytest.mark.parametrize("at", [3, 8])
def test_the_step_of_the_curve_is_the_size_of_the_tree(at: int) -> None:
    pair = planted.PlantedPair(step(at), lambda rows: 0.3)
    _, found = decided(pair)
    assert found.choice.kind in ("fixed", "adaptive")
    assert found.candidates.fixed.tree.nodes <= at
    assert found.candidates.by_rank.tree.nodes <= at
    replay = found.candidates.adaptive.replay
    assert replay.nodes / replay.rounds <= at + 0.5
    gain = found.compared[found.choice.kind].over(found.compared["plain"])[0]
    foretold = found.choice.predicted / found.choice.plain_predicted
    assert gain > 1.2
    assert foretold == pytest.approx(gain, rel=0.15)
    assert found.choice.break_even_accept_length < found.choice.accept_length


@pytest.mark.usefixtures("own_clock")
def test_more_nodes_for_nothing_make_the_tree_larger() -> None:
    small = decided(planted.PlantedPair(step(3), lambda rows: 0.3))[1].candidates
    large = decided(planted.PlantedPair(step(10), lambda rows: 0.3))[1].candidates
    assert large.fixed.tree.nodes > small.fixed.tree.nodes
    assert (
        large.adaptive.replay.nodes / large.adaptive.replay.rounds
        > small.adaptive.replay.nodes / small.adaptive.replay.rounds
    )


@pytest.mark.usefixtures("own_clock")
@pytest.mark.parametrize(
    "pair",
    [
        planted.PlantedPair(step(8), lambda rows: 0.3, skill=0.0, width=2),
        planted.PlantedPair(step(8), lambda rows: 5.0),
    ],
    ids=["a draft that is never right", "a draft dearer than the target"],
)
def test_a_hopeless_draft_ends_in_plain_decoding(pair: planted.PlantedPair) -> None:
    _, found = decided(pair)
    assert found.choice.kind == "plain"
    assert found.choice.tree == TreeShape(1, 0, 1)
    assert found.choice.predicted == found.choice.plain_predicted
    assert found.choice.break_even_accept_length > found.candidates.fixed.replay.accept_length


@pytest.mark.usefixtures("own_clock")
def test_a_machine_too_noisy_decides_nothing() -> None:
    rng = random.Random(0)
    pair = planted.PlantedPair(lambda nodes: rng.lognormvariate(1.5, 1.5), lambda rows: 0.3)
    result = calibrate(pair, PROMPTS, effort=SMALL, default=DEFAULT)
    assert result.decisions == ()
    assert result.too_noisy is not None
    assert "uncertain by" in result.too_noisy
    document = decision.as_dict(result, 0.0)
    assert "chosen" not in document
    assert document["spread"]


@pytest.mark.usefixtures("own_clock")
def test_texts_that_end_are_as_many_as_are_needed() -> None:
    pair = planted.PlantedPair(step(8), lambda rows: 0.3, ends=frozenset({7}))
    prompts = Prompts("talk", "", passages(planted.tokens(800), 30, 24))
    result = calibrate(pair, prompts, effort=SMALL, default=DEFAULT, temperatures=(0.0,))
    (found,) = result.decisions
    assert sum(map(len, found.texts)) >= SMALL.positions
    runs = found.compared["plain"].runs
    wanted = SMALL.compared_texts * (SMALL.compared_tokens - 1)
    assert sum(run.tokens for run in runs) >= wanted > sum(run.tokens for run in runs[:-1])
    assert SMALL.compared_texts < len(runs) < 30
    for name, compared in found.compared.items():
        assert [run.tokens for run in compared.runs] == [run.tokens for run in runs], name
    assert result.text == f"{min(30, len(found.texts) + len(runs))} talks"
    assert decision.as_dict(result, 0.0)["text"] == result.text


def test_a_comparison_stops_in_time() -> None:
    pair = planted.PlantedPair(lambda nodes: 0.0, lambda rows: 0.0)
    prompts = passages(planted.tokens(400), 10, 24)
    policies = {"plain": Policy("plain"), "lookup": Policy("lookup")}
    found = compare(pair, policies, prompts, temperature=0.0, new_tokens=8, texts=10, seconds=0)
    assert [len(one.runs) for one in found.values()] == [3, 3], "at least so many"


def test_faster_over_all_texts_together() -> None:
    long, short, nothing = Run(100, 1000.0, 100), Run(1, 10.0, 1), Run(0, 0.0, 0)
    plain = Compared((long, short, nothing))
    twice = Compared((Run(100, 500.0, 50), Run(1, 10.0, 1), nothing))
    ratio, error = twice.over(plain)
    assert ratio == pytest.approx(1010 / 510)
    assert 0 < error < 0.05, "the short text weighs little"
    assert plain.over(plain) == (1.0, 0.0)
    assert Compared((long,)).over(Compared((long,))) == (1.0, math.inf)


@pytest.mark.usefixtures("own_clock")
def test_few_or_unsteady_measurements_weigh_little() -> None:
    """One candidate: foretold twice as fast as plain decoding, measured half as fast."""
    _, found = decided(planted.PlantedPair(step(8), lambda rows: 0.3))
    plain, fixed = found.candidates.plain, found.candidates.fixed
    foretold = fixed.replay.tokens_per_second / plain.replay.tokens_per_second

    def combined(ratios: list[float]) -> float:
        runs = {
            "plain": Compared(tuple(Run(100, 100.0, 100) for _ in ratios)),
            "fixed": Compared(tuple(Run(100, 100.0 / ratio, 20) for ratio in ratios)),
        }
        return decision.gain(fixed, plain, runs)

    assert combined([0.5]) == pytest.approx(foretold, rel=1e-6)
    assert combined([0.5, 4.0, 0.2]) > 0.8 * foretold
    assert combined([0.5] * 10) == pytest.approx(0.5, rel=0.15)


# The command.


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Any:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(decision, "QUICK", dataclasses.replace(SMALL, nodes=(1, 2, 4, 8), contexts=(40,)))
    monkeypatch.setattr(decision, "MAX_ERROR", 10.0)  # tests share their machine

    def command(*words: object) -> tuple[object, str, str]:
        monkeypatch.setattr(sys, "argv", ["dovetail", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        done = capfd.readouterr()
        return ended.value.code or 0, done.out, done.err

    return command


def test_the_command_writes_a_profile_that_generate_uses(run: Any, tiny_artifact: Path, tmp_path: Path) -> None:
    report = tmp_path / "report.html"
    code, out, err = run("calibrate", tiny_artifact, "--quick", "--json", "--report", report)
    assert code == 0, err
    document = json.loads(out.splitlines()[-1])
    for name in ("chosen", "t_verify_ms", "t_draft_ms", "acceptance", "predicted_tokens_per_second"):
        assert document[name], name
    assert document["plain_tokens_per_second"] > 0
    assert document["break_even_accept_length"] >= 0
    assert {"policy", "nodes", "depth", "width"} <= set(document["chosen"])
    assert {"1", "2", "4", "8"} < set(document["t_verify_ms"]), "and rows of several texts"
    assert [one["temperature"] for one in document["by_temperature"]] == [0.0, 1.0]
    assert {"plain", "lookup", "fixed", "adaptive", "default"} == set(document["compared"])
    path = Path(document["profile"])
    found = profile.read(path)
    assert found.text == document["text"] == "4 passages of Python's standard library"
    assert path.is_relative_to(tmp_path / "cache")
    assert [choice.temperature for choice in found.choices] == [0.0, 1.0]

    code, _, err = run("generate", tiny_artifact, "def main(", "-n", "4", "--temperature", "0")
    assert code == 0
    assert f"profile: {found.summary}" in err
    code, out, _ = run("inspect", tiny_artifact)
    assert found.summary in out
    code, out, _ = run("inspect", tiny_artifact, "--json")
    assert json.loads(out)["profiles"][0]["artifact"] == found.artifact

    page = report.read_text(encoding="utf-8")
    assert page.count("<svg") == 2 + 4 * 2
    assert "4 passages of Python&#x27;s standard library" in page
    assert not re.search(r"(?:src|href)=\"(?!#|data:)", page), "nothing is loaded from elsewhere"
    assert not re.findall(r">(?:nan|inf|None)<", page)


def test_a_given_profile_path_and_a_text_of_ones_own(run: Any, tiny_artifact: Path, tmp_path: Path) -> None:
    text, kept = tmp_path / "text.txt", tmp_path / "kept.json"
    text.write_text("import os\n\ndef main(argv):\n    return os.path.join(*argv)\n" * 40)
    words = ("--quick", "--text", text, "--profile", kept, "--temperature", "0.7", "--threads", "1")
    code, out, err = run("calibrate", tiny_artifact, *words)
    assert code == 0, err
    assert "temperature 0.7" in out
    assert " passages of text.txt" in out
    found = profile.read(kept)
    assert [choice.temperature for choice in found.choices] == [0.7]
    assert found.engines.threads == 1
    assert not (tmp_path / "cache" / "dovetail" / "profiles").exists()
    code, _, err = run("generate", tiny_artifact, "def", "-n", "4", "--profile", kept)
    assert code == 0, err
    assert f"profile: {found.summary}" in err


def test_a_chat_model_is_calibrated_on_what_it_answers(run: Any, chat_artifact: Path, tmp_path: Path) -> None:
    file = tmp_path / "q.jsonl"
    file.write_text("".join(json.dumps({"question": f"What is {i}?"}) + "\n" for i in range(20)))
    words = ("--quick", "--temperature", "1", "--profile", tmp_path / "asked", "--prompts", file, "--json")
    code, out, err = run("calibrate", chat_artifact, *words)
    assert code == 0, err
    document = json.loads(out.splitlines()[-1])
    assert re.fullmatch(r"[1-8] questions of q\.jsonl", document["text"])
    assert document["texts"] <= 8
    assert profile.read(tmp_path / "asked").text == document["text"]


def test_an_unwritable_cache_folder_is_warned_of_once(run: Any, tiny_artifact: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where the folder would be")
    code, out, err = run("calibrate", tiny_artifact, "--quick", "--temperature", "0", "--json")
    assert code == 0, err
    assert json.loads(out.splitlines()[-1])["profile"] is None
    assert err.count("the profile is not kept") == 1


MISTAKES = [
    (["--text", "{tmp}/short.txt"], "expected at least 96 tokens"),
    (["--text", "{tmp}/nothing.txt"], "expected a readable file"),
    (["--text", "{tmp}/binary.txt"], "expected text in UTF-8"),
    (["--text", "{tmp}/empty.txt"], "expected some text"),
    (["--prompts", "{tmp}/nothing.jsonl"], "expected a readable file"),
    (["--prompts", "{tmp}/short.txt"], "short.txt, line 1: expected "),
    (["--prompts", "{tmp}/short.txt", "--text", "{tmp}/short.txt"], "expected one of --prompts and --text, got both"),
    (["--temperature", "-1"], "expected a number from 0 to 100"),
    (["--quality"], "expected --quality and --reference together"),
    (["--reference", "{tmp}"], "expected --quality and --reference together"),
    (["--quality", "--reference", "{tmp}/nothing"], "expected an artifact or an OpenVINO IR"),
    (["--draft-device", "toaster"], "--draft-device: expected auto"),
]


@pytest.mark.parametrize(("words", "expected"), MISTAKES, ids=[" ".join(words) for words, _ in MISTAKES])
def test_mistakes_are_one_line(run: Any, tiny_artifact: Path, tmp_path: Path, words: list[str], expected: str) -> None:
    (tmp_path / "short.txt").write_text("too short")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "empty.txt").write_text("")
    code, out, err = run("calibrate", tiny_artifact, "--quick", *(word.format(tmp=tmp_path) for word in words))
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code == 2, err
    assert out == ""
    assert len(lines) == 1
    assert expected in lines[0]
    assert "Traceback" not in err


def test_an_artifact_without_a_draft_has_nothing_to_decide(run: Any, tmp_path: Path) -> None:
    files = {TARGET_MODEL: b"x", TARGET_WEIGHTS: b"y", TOKENIZER: b"{}"}
    code, _, err = run("calibrate", plain_artifact.write_artifact(tmp_path / "bare", files), "--quick")
    assert code == 2
    assert "expected an artifact with a draft" in err


def test_importing_the_command_does_no_work() -> None:
    code = (
        "import sys, dovetail.calibration.commands.calibrate\n"
        "print(sorted({'numpy', 'openvino', 'onnxruntime', 'matplotlib', 'rich', 'platformdirs'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
