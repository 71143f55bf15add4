"""Proves that a benchmark's runners take turns in processes of their own, that one that dies, hangs, lies or lacks
something is named while the others go on, that the figures are what planted samples say, and that the command works on
a real artifact.
"""

from __future__ import annotations

import collections
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from dovetail.calibration.bench.figures import figures
from dovetail.calibration.bench.markdown import by_category
from dovetail.calibration.bench.runner_process import Child, RunnerError
from dovetail.calibration.bench.runners import RUNNERS, Models, Runner, chosen_runners
from dovetail.calibration.bench.schedule import Measured, Task, make_tasks, measure, memory_groups
from dovetail.calibration.bench.workload import GROWTH, Prompt
from dovetail.runtime.commands import cli
from dovetail.runtime.errors import UserError

FAKE = Path(__file__).resolve().parents[2] / "support" / "fakes" / "peer.py"
RUNNER_FIELDS = {
    *("name", "available", "tokens_per_second", "ms_per_token", "ttft_ms", "peak_rss_mb", "accept_length_mean"),
    *("draft_ms", "verify_ms", "host_ms", "gb_per_s", "tokens_match"),
}
DOCUMENT_FIELDS = {
    *("machine", "versions", "seed", "model", "runners", "fastest_plain", "speedup_over_fastest_plain"),
    "read_bandwidth_gb_per_s",
}
PROMPTS = [Prompt("complete", "a", [1] * 5), Prompt("complete", "b", [1] * 6), Prompt("copy-edit", "c", [1] * 7)]


def fake(name: str, draft: str = "none", **part: Any) -> Runner:
    return Runner(name, "fake", draft, (sys.executable, str(FAKE), json.dumps({"name": name, **part})))


def run(runners: list[Runner], tasks: list[Task], timeout_s: float = 30) -> Measured:
    return measure([runners], tasks, lambda runner: {"threads": 2}, timeout_s=timeout_s)


def tasks_of(*prompts: Prompt, temperatures: tuple[float, ...] = (0.0,), growth: tuple[Prompt, ...] = ()) -> list[Task]:
    return make_tasks(prompts, growth, max_new_tokens=9, temperatures=temperatures, repeats=1, seed=3)


def row(document: dict[str, Any], name: str) -> dict[str, Any]:
    found: dict[str, Any] = next(entry for entry in document["runners"] if entry["name"] == name)
    return found


def test_runners_take_turns_at_every_task(tmp_path: Path) -> None:
    log = tmp_path / "log"
    runners = [fake(name, log=str(log)) for name in "xyz"]
    run(runners, tasks_of(*PROMPTS, temperatures=(0.0, 1.0)))
    lines = [line.split() for line in log.read_text().splitlines()]
    assert [line[0] for line in lines[:3]] == ["x", "y", "z"], "a warm-up each"
    turns = [lines[i : i + 3] for i in range(3, len(lines), 3)]
    assert len(turns) == 6
    for turn in turns:
        assert {line[0] for line in turn} == set("xyz")
        assert len({tuple(line[1:]) for line in turn}) == 1, "all make the same text"
    assert ["".join(line[0] for line in turn) for turn in turns[:3]] == ["xyz", "yzx", "zxy"]
    seeds = {(line[1], line[3]) for line in lines[3:]}
    assert seeds == {("5", "3"), ("6", "4"), ("7", "5")}, "a seed for each prompt"


@pytest.mark.parametrize(
    ("part", "line"),
    [
        ({"die_at": 0}, "died of signal 6: last words"),
        ({"die_at": 2}, "died of signal 6: last words"),
        ({"hang_at": 1}, "no answer in 2 s"),
        ({"garbage_at": 1}, "not JSON"),
        ({"short_at": 1}, "expected 9 tokens, got 8"),
        ({"refuse": "expected a thing, got none; fetch one"}, "expected a thing, got none; fetch one"),
    ],
)
def test_a_broken_runner_is_named_and_the_others_go_on(
    part: dict[str, Any], line: str, told: pytest.LogCaptureFixture
) -> None:
    runners = [fake("plain"), fake("broken", **part), fake("third")]
    measured = run(runners, tasks_of(*PROMPTS), timeout_s=2 if "hang_at" in part else 30)
    assert line in measured.failed["broken"]
    assert any(word.startswith("broken: ") for word in told.messages)
    counts = collections.Counter(sample.runner for sample in measured.samples)
    assert counts == {"plain": 3, "third": 3}
    document = figures(runners, measured, {}, read_bandwidth_gb_per_s=10)
    assert line in row(document, "broken")["reason"]
    assert [entry["available"] for entry in document["runners"]] == [True, False, True]


def test_a_program_that_is_not_there() -> None:
    with pytest.raises(RunnerError, match="could not be started"):
        Child(["/nowhere/at-all"], 5)


def test_figures_are_what_the_samples_say() -> None:
    runners = [
        fake("plain", round_ms=10.0, draft_ms=0.0, verify_ms=9.0, bytes=90_000_000),
        fake("dovetail", "artifact", round=4, round_ms=20.0, draft_ms=5.0, verify_ms=12.0, bytes=90_000_000),
        fake("other", round_ms=8.0, tokens=[1, 2, 9], bytes=40_000_000),
    ]
    measured = run(runners, tasks_of(*PROMPTS, temperatures=(0.0, 1.0)))
    document = figures(runners, measured, {"absent": "why"}, read_bandwidth_gb_per_s=20)
    plain, ours, other = (row(document, name) for name in ("plain", "dovetail", "other"))
    assert plain["ms_per_token"] == pytest.approx(10)
    assert plain["ttft_ms"] == pytest.approx(100)
    assert plain["accept_length_mean"] is None
    assert (plain["gb_per_s"], plain["bandwidth_share"]) == (pytest.approx(10), pytest.approx(0.5))
    # Nine tokens: one behind the prompt, then two rounds of four: 40 ms for eight tokens.
    assert ours["ms_per_token"] == pytest.approx(5)
    assert ours["tokens_per_second"] == pytest.approx(200)
    assert (ours["accept_length_mean"], ours["accept_histogram"]) == (3, [0, 0, 0, 6])
    assert [ours[key] for key in ("draft_ms", "verify_ms", "host_ms")] == pytest.approx([5, 12, 3])
    assert other["gb_per_s"] == pytest.approx(5), "without times of its own, a plain round is a pass"
    assert document["fastest_plain"] == "other"
    assert document["speedup_over_fastest_plain"] == ours["speedup_over_fastest_plain"] == pytest.approx(8 / 5)
    assert (plain["tokens_match"], ours["tokens_match"], other["tokens_match"]) == (True, True, False)
    assert other["texts_departed"] == other["texts_compared"] == 3, "sampled texts are not compared"
    assert other["first_divergence"] == {"prompt": "a", "position": 2, "margin": 0.5}
    kinds = {(cell["temperature"], cell["category"]) for cell in document["cells"]}
    assert kinds == {(t, c) for t in (0.0, 1.0) for c in ("all", "complete", "copy-edit", "mean")}


def test_the_mean_counts_every_category_alike() -> None:
    prompts = [Prompt("short", "a", [1], 9), Prompt("short", "b", [1], 9), Prompt("long", "c", [1], 17)]
    runners = [fake("plain"), fake("dovetail", "artifact", round=8, tokens=[1, 2])]
    measured = run(runners, tasks_of(*prompts))
    assert [len(sample.token_ids) for sample in measured.samples if sample.runner == "plain"] == [9, 9, 17]
    document = figures(runners, measured, {}, read_bandwidth_gb_per_s=1)
    cells = {(cell["category"], cell["runner"]): cell for cell in document["cells"]}
    ours = [cells[name, "dovetail"] for name in ("short", "long", "mean", "all")]
    assert [cell["speedup_over_fastest_plain"] for cell in ours] == pytest.approx([8, 8, 8, 8])
    assert [cell["accept_length_mean"] for cell in ours] == [7] * 4
    # Texts of period two: of 2 and of 10 8-grams all but two are repeated.
    assert [cell["repeated_8grams"] for cell in ours] == pytest.approx([0, 0.8, 0.4, 8 / 14])
    assert cells["mean", "plain"]["accept_length_mean"] is None
    (rows,) = by_category(document).values()
    assert rows[0] == ["category", "plain", "dovetail"]
    assert [row[0] for row in rows[1:]] == ["short", "long", "mean of categories", "all prompts"]
    assert rows[2] == ["long", "100.0 (1.00), 70%", "800.0 (8.00) 7.00, 80%"]


def test_growth_is_apart() -> None:
    growth = tuple(Prompt(GROWTH, str(n), [1] * n) for n in (20, 40))
    runners = [fake("plain")]
    measured = run(runners, tasks_of(PROMPTS[0], growth=growth))
    document = figures(runners, measured, {}, read_bandwidth_gb_per_s=1)
    assert [entry["context"] for entry in document["growth"]] == [20, 40]
    assert {cell["category"] for cell in document["cells"]} == {"all"}


def test_memory_that_holds_some_at_a_time() -> None:
    runners = [RUNNERS[name] for name in ("plain", "dovetail", "genai", "llamacpp")]
    sizes = {"plain": 2, "dovetail": 3, "genai": 4, "llamacpp": 20}
    together, refused = memory_groups(runners, lambda runner: sizes[runner.name], 29)
    assert (len(together), refused) == (1, {})
    groups, refused = memory_groups(runners, lambda runner: sizes[runner.name], 6)
    assert [[runner.name for runner in group] for group in groups] == [["plain", "dovetail"], ["plain", "genai"]]
    assert list(refused) == ["llamacpp"]
    assert "beside plain" in refused["llamacpp"]
    with pytest.raises(UserError, match="of memory"):
        memory_groups(runners, lambda runner: sizes[runner.name], 1)


def test_the_reference_of_every_group_is_counted_once() -> None:
    plain, second, third = fake("plain"), fake("second"), fake("third", tokens=[1, 5])
    tasks = tasks_of(*PROMPTS)
    measured = measure([[plain, second], [plain, third]], tasks, lambda _: {"threads": 2}, timeout_s=30)
    assert collections.Counter(sample.runner for sample in measured.samples) == {"plain": 3, "second": 3, "third": 3}
    assert set(measured.margins) == {0, 1, 2}, "asked for in the group where somebody departed"


@pytest.mark.parametrize(
    ("names", "line"), [("plain,vllm", "got 'vllm'"), ("plain,plain", "every name once"), ("", "got ''")]
)
def test_runner_names(names: str, line: str) -> None:
    with pytest.raises(UserError, match=line):
        chosen_runners(names)


@pytest.mark.parametrize("runner", RUNNERS.values(), ids=lambda runner: runner.name)
def test_every_runner_has_its_program(runner: Runner) -> None:
    assert importlib.util.find_spec(runner.command[2]) is not None


def test_checkpoints_must_fit(tiny_artifact: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    from dovetail.runtime.artifact.opening import open_artifact

    artifact = open_artifact(tiny_artifact)
    models = Models(artifact, tiny_artifact, None, None, tmp_path)
    assert "`checkpoint`" in str(models.lacking(RUNNERS["llamacpp"]))
    assert "`assistant`" in str(models.lacking(RUNNERS["genai-draft"]))
    assert models.lacking(RUNNERS["genai"]) is None
    with pytest.raises(UserError, match=r"^checkpoint: expected a checkpoint folder with config.json or a GGUF"):
        Models(artifact, tiny_artifact, tmp_path, None, tmp_path)
    other = tmp_path / "other"
    other.mkdir()
    config = json.loads((tiny_checkpoint / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "vocab_size": 600}))
    with pytest.raises(UserError, match=r"^assistant: expected a model of 512 tokens"):
        Models(artifact, tiny_artifact, tiny_checkpoint, other, tmp_path)
    (other / "config.json").write_text(json.dumps({**config, "hidden_size": 128}))
    with pytest.raises(UserError, match=r"^checkpoint: expected the artifact's own checkpoint"):
        Models(artifact, tiny_artifact, other, None, tmp_path)


def command(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    monkeypatch.setattr(sys, "argv", ["dovetail", "bench", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


def test_the_command_on_a_real_artifact(
    tiny_artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "def main(argv):"}\n{"prompt": "import os"}\n')
    words = ["--prompts", prompts, "--runners", "plain,dovetail,llamacpp", "-n", 8, "--work", tmp_path / "work"]
    words += ["--plots", tmp_path / "plots", "--report", tmp_path / "report.md", "--growth", "--threads", 2, "--json"]
    assert command(monkeypatch, tiny_artifact, *words) == 0
    out, err = capfd.readouterr()
    document = json.loads(out.splitlines()[-1])
    assert set(document) >= DOCUMENT_FIELDS
    assert all(set(entry) >= RUNNER_FIELDS for entry in document["runners"])
    assert document["model"]["parameters"] > 0
    plain, ours, llamacpp = document["runners"]
    assert (plain["available"], ours["available"], llamacpp["available"]) == (True, True, False)
    assert "--checkpoint" in llamacpp["reason"]
    assert "llamacpp is left out" in err
    assert plain["tokens_match"] is True
    assert ours["accept_length_mean"] is not None
    assert 0 < ours["verify_ms"] < 1e4
    assert plain["peak_rss_mb"] > 50
    assert {path.name for path in (tmp_path / "plots").iterdir()} == {"speed.png", "round.png", "growth.png"}
    report = (tmp_path / "report.md").read_text()
    assert "| plain |" in report or "| **plain** |" in report
    assert document["command"] in report


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--runners", "vllm"], "--runners: expected some of plain"),
        (["--temperature", "-1"], "--temperature"),
        (["--checkpoint", "/nowhere"], "--checkpoint: expected a checkpoint folder"),
        (["--runners", "llamacpp"], "give --checkpoint"),
        (["--prompts", "/nowhere"], "/nowhere: expected a readable file"),
        (["-n", "4000"], "--max-new-tokens"),
        (["--num-prompts", "2"], "--num-prompts"),
    ],
)
def test_mistakes_are_one_line(
    words: list[str],
    line: str,
    tiny_artifact: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    assert command(monkeypatch, tiny_artifact, *words) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert "Traceback" not in err
    assert line in err.splitlines()[-1]
    assert err.splitlines()[-1].startswith("error: ")


def test_a_report_says_what_an_inflated_model_is(tmp_path: Path) -> None:
    from dovetail.calibration.bench.markdown import like_sentence

    sentence = like_sentence({"like": "llama-1b"})
    assert "trained pair" in sentence
    assert "llama-1b" in sentence
