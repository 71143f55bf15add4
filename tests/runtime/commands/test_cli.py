"""Proves the commands as a user meets them: text on stdout and nothing else, notices on stderr, `--json` last, one
clear line and exit 2 for every mistake, no colours off a terminal.
"""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dovetail.runtime import load
from dovetail.runtime.artifact.opening import open_artifact
from dovetail.runtime.commands import cli, generate
from dovetail.runtime.errors import UserError
from dovetail.runtime.hardware.devices import cuda_driver
from dovetail.runtime.text.tokenizer import load_tokenizer

JSON_FIELDS = {
    *("text", "token_ids", "finish_reason", "prompt_tokens", "completion_tokens", "rounds", "accept_length_mean"),
    *("accept_histogram", "drafted_tokens", "accepted_tokens", "prefill_ms", "decode_ms", "draft_ms", "verify_ms"),
    *("host_ms", "tokens_per_second", "bytes_to_draft", "bytes_from_draft", "target_device", "draft_device"),
    *("numerics", "seed"),
}
PROMPT = "def main(argv):\n    return"
DOVETAIL = Path(sys.executable).with_name("dovetail")


class Outcome:
    def __init__(self, code: object, out: str, err: str) -> None:
        self.code, self.out, self.err = code or 0, out, err

    @property
    def mistake(self) -> str:
        """The one line that tells a user's mistake."""
        assert self.code == 2, self.err
        assert self.out == ""
        assert "Traceback" not in self.err
        lines = [line for line in self.err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1, self.err
        assert self.err.splitlines()[-1] == lines[0]
        return lines[0]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Any:
    def command(*words: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["dovetail", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        done = capfd.readouterr()
        return Outcome(ended.value.code, done.out, done.err)

    return command


def test_text_goes_to_stdout_and_all_else_to_stderr(run: Any, tiny_artifact: Path) -> None:
    words = (tiny_artifact, PROMPT, "-n", 16, "--temperature", 1, "--seed", 5, "--exact", "--ignore-eos")
    done = run("generate", *words, "--stats")
    expected = load(tiny_artifact, numerics="exact").generate(
        PROMPT, max_new_tokens=16, temperature=1.0, seed=5, ignore_eos=True
    )
    assert done.code == 0
    assert done.out == expected.text + "\n"
    assert "threads" in done.err
    assert "seed 5" in done.err
    assert "host_ms" in done.err
    assert "\x1b" not in done.out + done.err
    plain = run("generate", *words, "--no-draft")
    assert plain.out == done.out
    assert "draft: none" in plain.err


def test_json_is_the_last_line_and_has_every_field(run: Any, tiny_artifact: Path) -> None:
    done = run("generate", tiny_artifact, PROMPT, "-n", 8, "--json", "--ignore-eos")
    document = json.loads(done.out.splitlines()[-1])
    assert set(document) >= JSON_FIELDS
    assert document["completion_tokens"] == 8
    assert str(document["seed"]) in done.err, "a random seed is reported"
    several = run("generate", tiny_artifact, PROMPT, "-n", 4, "--json", "--temperature", 1, "--num-return-sequences", 3)
    assert len(json.loads(several.out.splitlines()[-1])["sequences"]) == 3


def test_prompts_come_from_files_and_stdin_too(tiny_artifact: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompt.txt"
    file.write_text(PROMPT)
    base = [DOVETAIL, "generate", tiny_artifact, "-n", "8", "--ignore-eos", "--temperature", "0"]
    texts = [
        subprocess.run([*base, *words], input=given, capture_output=True, text=True, check=True).stdout
        for words, given in (
            ([PROMPT], ""),
            (["--file", file], ""),
            ([], PROMPT + "\n"),
            (["-f", "-"], PROMPT + "\r\n"),
            (["-"], PROMPT),
        )
    ]
    assert len(set(texts)) == 1


def test_one_line_end_of_a_prompt_file_is_dropped(tmp_path: Path) -> None:
    for data, prompt in (("a", "a"), ("a\n", "a"), ("a\r\n", "a"), ("a\n\n", "a\n"), (" a \n", " a "), ("a\r", "a\r")):
        (tmp_path / "prompt").write_bytes(data.encode())
        assert generate._prompt(None, str(tmp_path / "prompt")) == prompt
        assert generate._prompt(data, None) == data
    (tmp_path / "prompt").write_text("\n")
    with pytest.raises(UserError, match="empty"):
        generate._prompt(None, str(tmp_path / "prompt"))


def test_control_tokens_of_a_prompt_are_meant_with_a_flag(run: Any, tiny_artifact: Path) -> None:
    words = ["generate", tiny_artifact, "def<|endoftext|>", "-n", "1", "--json", "--ignore-eos"]
    counts = [json.loads(run(*words, *more).out.splitlines()[-1])["prompt_tokens"] for more in ([], ["--special"])]
    assert counts[0] > counts[1] == len(load_tokenizer(open_artifact(tiny_artifact)).encode("def")) + 1


def test_special_tokens_are_shown_with_a_flag(run: Any, tiny_artifact: Path) -> None:
    words = [
        "generate",
        tiny_artifact,
        "def",
        "-n",
        "3",
        "--ignore-eos",
        "--logit-bias",
        "0=1000",
        "--temperature",
        "0",
    ]
    assert run(*words).out.strip() == ""
    assert run(*words, "--no-skip-special-tokens").out.strip() == 3 * "<|endoftext|>"
    stopped = run(*words, "--stop", "<|endoftext|>", "--json")
    assert json.loads(stopped.out.splitlines()[-1])["completion_tokens"] == 1


def test_minus_one_generates_to_the_end_of_the_context(run: Any, tiny_artifact: Path) -> None:
    words = (tiny_artifact, PROMPT, "-n", "-1", "--ignore-eos", "-c", 64, "--json", "--no-draft")
    document = json.loads(run("generate", *words).out.splitlines()[-1])
    assert document["prompt_tokens"] + document["completion_tokens"] == 64


def test_a_name_that_others_have_is_answered_by_ours(run: Any, tiny_artifact: Path, tmp_path: Path) -> None:
    file = tmp_path / "controls.json"
    for name, ours in (("max_tokens", "max_new_tokens"), ("do_sample", "temperature"), ("ctx_sizes", "ctx_size")):
        file.write_text(json.dumps({name: 1}))
        mistake = run("generate", tiny_artifact, PROMPT, "--config", file).mistake
        assert re.search(rf"got '{name}'; use (--)?{ours.replace('_', '.')} \(", mistake), mistake


def test_controls_from_a_file_stand_behind_flags(run: Any, tiny_artifact: Path, tmp_path: Path) -> None:
    file = tmp_path / "controls.json"
    file.write_text(json.dumps({"max_new_tokens": 3, "seed": 9, "logit_bias": {"7": 100}, "ignore_eos": True}))
    words = ("generate", tiny_artifact, PROMPT, "--json", "--config", file)
    document = json.loads(run(*words).out)
    assert document["token_ids"] == [7, 7, 7]
    assert document["seed"] == 9
    assert json.loads(run(*words, "-n", 2, "--seed", 4).out)["seed"] == 4
    file.write_text(json.dumps({"max_tokens": 3}))
    assert "got 'max_tokens'" in run(*words).mistake


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--temperature", "-1"], "--temperature: expected a number from 0"),
        (["--temperature", "warm"], "not a valid float"),
        (["--top-k", "-1"], "--top-k: expected"),
        (["--top-p", "0"], "--top-p: expected"),
        (["--seed", "-1"], "--seed: expected"),
        (["-n", "0"], "--max-new-tokens: expected"),
        (["-n", "100000"], r"context of 512 tokens, got \d+ of prompt and 100000 to generate; 500 are left"),
        (["-c", "100000"], "--ctx-size: expected an integer from 2 to 512"),
        (["-t", "0"], "--threads: expected"),
        (["--logit-bias", "x=1"], "expected TOKEN_ID=NUMBER"),
        (["--stop", ""], "--stop-strings: expected"),
        (["--min-new-tokens", "9", "-n", "8"], "--min-new-tokens <= --max-new-tokens"),
        (["--draft-device", "tpu"], "--draft-device: expected auto, cpu, cuda"),
        (["--draft-memory-limit", "1MB"], "--draft-memory-limit: expected .* or lower --ctx-size"),
        (
            ["--draft-device", "openvino:CPU", "--no-draft"],
            "--draft-device 'openvino:CPU': expected a draft to put there",
        ),
        (["--profile", "nowhere.json"], "--profile 'nowhere.json': expected a readable file"),
        (["--bad-words-ids", "999"], "--bad-words-ids: expected token ids below 512"),
        (["--tree-nodes", "0"], "not in the range"),
        (["--frobnicate"], "No such option"),
        (["--file", "nowhere.txt"], "expected one prompt, got both"),
        (["--config", "nowhere.json"], "expected a readable file"),
        (["--chat-template", "nowhere.jinja"], "expected a readable text file"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(run: Any, tiny_artifact: Path, words: list[str], message: str) -> None:
    assert re.search(message, run("generate", tiny_artifact, PROMPT, *words).mistake)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["generate", "ARTIFACT", ""], "expected a prompt, got an empty one"),
        (["generate", "ARTIFACT", "--file", "nowhere.txt"], "expected a readable file"),
        (["generate", "ARTIFACT", "--file", "binary"], "expected a prompt in UTF-8"),
        (["generate", "nowhere", PROMPT], "expected an artifact folder, got nothing there"),
        (["generate"], "Missing argument 'ARTIFACT'"),
        (["inspect", "nowhere"], "expected an artifact folder"),
        (["inspect", "binary"], "expected an artifact folder, got something else"),
        (["frobnicate"], "No such command"),
        (["chat", "ARTIFACT"], "expected a model with a chat template"),
    ],
)
def test_missing_things_are_one_line_and_exit_2(
    run: Any, tiny_artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("binary").write_bytes(b"\xff\xfe\x00")
    assert message in run(*[str(tiny_artifact) if word == "ARTIFACT" else word for word in words]).mistake


def test_cuda_without_cuda_is_refused(run: Any, tiny_artifact: Path) -> None:
    if cuda_driver():
        pytest.skip("this machine has an NVIDIA driver")
    refused = run("generate", tiny_artifact, PROMPT, "--draft-device", "cuda")
    assert "--draft-device 'cuda': no NVIDIA GPU with its driver on this machine" in refused.mistake
    assert refused.mistake.endswith("or use --draft-device cpu")


def test_inspect_shows_sizes_and_verifies(run: Any, tiny_artifact: Path) -> None:
    done = run("inspect", tiny_artifact)
    assert done.code == 0
    for shown in ("int8", "dgf", "vocabulary 512", "every hash matches"):
        assert shown in done.out
    document = json.loads(run("inspect", tiny_artifact, "--json").out.splitlines()[-1])
    assert document["verified"] is True
    assert document["target"]["hidden_size"] == 64
    trusted = run("inspect", tiny_artifact, "--trust")
    assert "hashes are not checked" in trusted.err
    assert "every hash matches" not in trusted.out


def test_chat_keeps_the_cache_of_earlier_turns(tiny_artifact: Path, tmp_path: Path) -> None:
    template = tmp_path / "template.jinja"
    template.write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    words = [
        DOVETAIL,
        "chat",
        tiny_artifact,
        "--chat-template",
        template,
        "-n",
        "6",
        "--temperature",
        "0",
        "--ignore-eos",
    ]
    lines = "hello\nand more\n/stats\n/reset\nhello\n/help\n/exit\nnever read\n"
    done = subprocess.run(words, input=lines, capture_output=True, text=True, check=True)
    reused = re.search(r"(\d+) of \d+ prompt tokens were in the cache", done.stderr)
    assert reused is not None
    assert int(reused[1]) > 0
    with load(tiny_artifact, chat_template=template.read_text()) as pipe:
        asked = [{"role": "user", "content": "hello"}]
        answer = pipe.generate(asked, max_new_tokens=6, temperature=0, ignore_eos=True).text + "\n"
    assert done.stdout.startswith(answer)
    assert done.stdout.endswith(answer), "after /reset the same question gets the same answer"
    assert len(done.stdout) > 2 * len(answer), "and one answer stands between"
    assert "forgotten" in done.stderr
    assert done.stderr.count("/reset forgets") == 2


def test_chat_says_all_lines_that_are_no_commands(tiny_artifact: Path, tmp_path: Path) -> None:
    template = tmp_path / "template.jinja"
    template.write_text("{{ name }}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    words = [DOVETAIL, "chat", tiny_artifact, "--chat-template", template, "-n", "4", "--temperature", "0"]
    words += ["--ignore-eos", "--chat-template-kwargs", '{"name": "n"}']
    lines = "/etc/hosts - what is in it?\n/reset\n /exit\n  \n/reset\n/exit now\n"
    done = subprocess.run(words, input=lines, capture_output=True, text=True, check=True)
    with load(tiny_artifact, chat_template=template.read_text()) as pipe:
        settings = {"max_new_tokens": 4, "temperature": 0, "ignore_eos": True, "chat_template_kwargs": {"name": "n"}}
        said = ["/etc/hosts - what is in it?", " /exit", "/exit now"]
        answers = [pipe.generate([{"role": "user", "content": text}], **settings).text for text in said]
    assert done.stdout == "".join(f"{answer}\n" for answer in answers)


@pytest.mark.parametrize(("no_color", "coloured"), [("", True), ("1", False)])
def test_the_drafts_guesses_are_coloured_on_a_terminal_only(
    tiny_artifact: Path, no_color: str, coloured: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tree of 100 nodes holds the next token sooner or later, even with a draft of random weights."""
    words = [
        DOVETAIL,
        "generate",
        tiny_artifact,
        PROMPT,
        "-n",
        "48",
        "--show-draft",
        "--ignore-eos",
        "--temperature",
        "0",
    ]
    words += ["--tree-nodes", "100", "--tree-depth", "2", "--tree-width", "10"]
    environment = {**os.environ, "NO_COLOR": no_color}
    main, side = pty.openpty()
    done = subprocess.run(words, stdout=side, stderr=subprocess.DEVNULL, env=environment, check=True)
    os.close(side)
    shown = b""
    while True:
        try:
            piece = os.read(main, 65536)
        except OSError:  # Linux: the other side is closed
            break
        if not piece:
            break
        shown += piece
    os.close(main)
    assert done.returncode == 0
    assert (b"\x1b[32m" in shown) == coloured


def test_a_reader_that_goes_away_is_no_crash(tiny_artifact: Path) -> None:
    command = f"{DOVETAIL} generate {tiny_artifact} 'def' -n 200 --ignore-eos | head -c 1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr


def test_completion_is_there_for_every_shell() -> None:
    for shell in ("bash", "zsh", "fish"):
        environment = {**os.environ, "_DOVETAIL_COMPLETE": f"{shell}_source"}
        done = subprocess.run([DOVETAIL], capture_output=True, text=True, env=environment, check=False)
        assert "_dovetail_completion" in done.stdout
