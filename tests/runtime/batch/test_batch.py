"""Proves `dovetail batch` as a user meets it: an answer for every line, in order, exactly once, however often the
command is killed; OpenAI's shape for OpenAI's lines; one clear line and exit 2 for every mistake.
"""

from __future__ import annotations

import fcntl
import json
import os
import pty
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from dovetail.runtime import load
from dovetail.runtime.commands import cli

DOVETAIL = Path(sys.executable).with_name("dovetail")
STARTS = ("import os\n", "def main(argv):\n    ", "class Reader:\n", "for name in names:\n")
# Some lines are slow, and held up by nobody's speed: the others are done first and wait for their turn.
LENGTHS = (40, 3, 12, 5)
CONTROLS = ("--temperature", "0.8", "--seed", "11", "--exact", "--ctx-size", "128", "--sequences", "4")

Documents = list[dict[str, Any]]


def body_line(number: int, **body: Any) -> dict[str, Any]:
    body = {"model": "any", "prompt": STARTS[number % 4] + f"# {number}\n", **body}
    return {"custom_id": f"request-{number}", "method": "POST", "url": "/v1/completions", "body": body}


def write(path: Path, entries: list[Any]) -> Path:
    path.write_text("".join((e if isinstance(e, str) else json.dumps(e)) + "\n" for e in entries))
    return path


def read(path: Path) -> Documents:
    return [json.loads(line) for line in path.read_text().splitlines()]


def timeless(documents: Documents) -> Documents:
    """Without the seconds at which OpenAI's answers were made."""
    for document in documents:
        if document.get("response"):
            del document["response"]["body"]["created"]
    return documents


class Outcome:
    def __init__(self, code: object, out: str, err: str) -> None:
        self.code, self.out, self.err = code or 0, out, err

    @property
    def mistake(self) -> str:
        """The one line that tells a user's mistake."""
        assert self.code == 2, self.err
        assert "Traceback" not in self.err
        lines = [line for line in self.err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1, self.err
        assert self.err.splitlines()[-1] == lines[0]
        return lines[0]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], shipped_artifact: Path) -> Any:
    def command(*words: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["dovetail", "batch", *map(str, (shipped_artifact, *words))])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        done = capfd.readouterr()
        return Outcome(ended.value.code, done.out, done.err)

    return command


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """26 lines, two of which can't be done."""
    entries: list[Any] = [body_line(i, max_tokens=LENGTHS[i % 4]) for i in range(24)]
    entries.insert(5, '{"custom_id": "broken')
    entries.insert(17, body_line(99, frobnicate=1))
    return write(tmp_path_factory.mktemp("batch") / "lines.jsonl", entries)


@pytest.fixture(scope="module")
def undisturbed(lines: Path, shipped_artifact: Path) -> Documents:
    """What a run that nobody disturbs makes of them."""
    out = lines.with_name("undisturbed.jsonl")
    done = subprocess.run(command(shipped_artifact, lines, out), capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert "error: 2 of 26 lines were not done: lines 6, 18" in done.stderr
    return timeless(read(out))


def command(*words: object) -> list[str]:
    artifact, lines, out, *further = words
    return [str(word) for word in (DOVETAIL, "batch", artifact, lines, "-o", out, *CONTROLS, *further)]


def test_answers_are_those_of_generate_in_order(run: Any, tmp_path: Path, shipped_artifact: Path) -> None:
    prompts = [start + f"# {i}\n" for i in range(3) for start in STARTS]
    file = write(tmp_path / "in.jsonl", [{"prompt": prompt} for prompt in prompts])
    done = run(file, "-o", tmp_path / "out.jsonl", *CONTROLS, "-n", 12, "--stop", "import", "--json")
    assert done.code == 0
    documents = read(tmp_path / "out.jsonl")
    with load(shipped_artifact, numerics="exact", ctx_size=128) as pipe:
        for number, (prompt, document) in enumerate(zip(prompts, documents, strict=True), 1):
            controls = {"max_new_tokens": 12, "stop_strings": ["import"], "temperature": 0.8, "seed": 10 + number}
            alone = pipe.generate(prompt, **controls)
            assert document == {
                "id": number,
                "text": alone.text,
                "finish_reason": alone.finish_reason,
                "prompt_tokens": alone.prompt_tokens,
                "completion_tokens": alone.completion_tokens,
                "seed": 10 + number,
            }
    assert {document["finish_reason"] for document in documents} == {"stop", "length"}
    summary = json.loads(done.out.splitlines()[-1])
    assert (summary["lines"], summary["failed"], summary["seed"]) == (12, 0, 11)
    assert summary["tokens"] == sum(document["completion_tokens"] for document in documents)
    assert 0 < summary["passes"] < summary["tokens"] / 2
    assert summary["tokens_per_second"] == pytest.approx(summary["tokens"] / summary["seconds"])
    assert "12 lines" in done.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]


def test_openai_lines_get_openai_answers(undisturbed: Documents) -> None:
    ids: list[Any] = [f"request-{i}" for i in range(24)]
    ids.insert(5, None)
    ids.insert(17, "request-99")
    assert [document["custom_id"] for document in undisturbed] == ids
    assert len({document["id"] for document in undisturbed}) == 26
    assert undisturbed[5]["error"]["message"].startswith("line 6: expected one strict JSON document")
    assert undisturbed[17]["error"]["code"] == "invalid_request"
    assert "line 18: " in undisturbed[17]["error"]["message"]
    assert "'frobnicate'" in undisturbed[17]["error"]["message"]
    for i, document in enumerate(undisturbed):
        assert set(document) == {"id", "custom_id", "response", "error"}
        assert (document["response"] is None) == (document["error"] is not None) == (i in (5, 17))
    done = undisturbed[0]["response"]
    assert done["status_code"] == 200
    assert done["body"]["object"] == "text_completion"
    assert done["body"]["usage"]["completion_tokens"] == 40
    assert done["body"]["usage"]["total_tokens"] == done["body"]["usage"]["prompt_tokens"] + 40
    assert done["body"]["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize("seed", range(2))
def test_killed_at_any_moment_it_goes_on(
    seed: int, lines: Path, undisturbed: Documents, shipped_artifact: Path, tmp_path: Path
) -> None:
    out, chance = tmp_path / "out.jsonl", random.Random(seed)
    words = command(shipped_artifact, lines, out)
    kills = 0
    while True:
        running = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        assert running.stderr is not None
        size = out.stat().st_size if out.exists() else 0
        while kills < 4 and running.poll() is None and (not out.exists() or out.stat().st_size == size):
            time.sleep(0.005)
        if kills < 4:
            time.sleep(chance.random() * 0.15)
        is_killed = kills < 4 and running.poll() is None
        if is_killed:
            running.kill()
        err = running.stderr.read()
        running.stderr.close()
        running.wait()
        if not is_killed:
            break
        kills += 1
        if [path.name for path in tmp_path.iterdir()] == ["out.jsonl"]:  # the kill came behind the last line
            assert timeless(read(out)) == undisturbed
            return
        *whole, half = out.read_bytes().split(b"\n")
        assert half == b"", "a line is written at once"
        assert timeless([json.loads(line) for line in whole]) == undisturbed[: len(whole)]
        if chance.random() < 0.7:  # as if it had not been
            end = undisturbed[len(whole) :][:1]
            with out.open("ab") as torn:
                torn.write(json.dumps(end).encode()[1 : chance.randrange(2, 60)])
    assert kills
    assert running.returncode == 2, err
    assert "going on: " in err
    assert "2 of 26 lines were not done: lines 6, 18" in err
    assert timeless(read(out)) == undisturbed
    assert [path.name for path in tmp_path.iterdir()] == ["out.jsonl"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_it_ends_behind_a_whole_line(
    number: int, lines: Path, undisturbed: Documents, shipped_artifact: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.jsonl"
    words = command(shipped_artifact, lines, out)
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
        while not (out.exists() and out.stat().st_size):
            time.sleep(0.005)
        running.send_signal(number)
        printed, err = running.communicate(timeout=60)
    assert running.returncode == 130
    assert printed == ""
    assert "Traceback" not in err
    documents = timeless(read(out))
    assert 0 < len(documents) < 26
    assert documents == undisturbed[: len(documents)]
    count = "1 line" if len(documents) == 1 else f"{len(documents)} lines"
    assert err.splitlines()[-1] == f"stopped: {count} written to {out}; the same command goes on behind them"
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert timeless(read(out)) == undisturbed


def test_interrupted_before_the_first_line_it_leaves_nothing(
    lines: Path, shipped_artifact: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.jsonl"
    words = command(shipped_artifact, lines, out)
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
        while not out.exists():
            time.sleep(0.005)
        running.send_signal(signal.SIGTERM)
        _, err = running.communicate(timeout=60)
    assert running.returncode == 130
    assert err.splitlines()[-1] == f"stopped: 0 lines written to {out}"
    assert list(tmp_path.iterdir()) == []


def stopped(lines: Path, shipped_artifact: Path, out: Path, *further: object) -> None:
    """An output that a killed run has left behind."""
    words = command(shipped_artifact, lines, out, *further)
    with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as running:
        while not (out.exists() and out.stat().st_size):
            time.sleep(0.005)
        running.kill()


def test_an_output_of_another_batch_is_left_alone(
    run: Any, lines: Path, undisturbed: Documents, shipped_artifact: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.jsonl"
    stopped(lines, shipped_artifact, out)
    before = out.read_bytes()
    other = write(tmp_path / "other.jsonl", [body_line(i) for i in range(30)])
    template = tmp_path / "template.jinja"
    template.write_text("{{ messages[0].content }}")
    words: tuple[Any, ...]
    for words, name in (
        ((other, *CONTROLS), "(input_sha256 '"),
        ((lines, *CONTROLS, "--seed", 12), "(seed 12), got one of another (seed 11)"),
        ((lines, *CONTROLS, "--top-k", 5), "(controls {"),
        ((lines, *CONTROLS, "--ctx-size", 64), "(--ctx-size 64), got one of another (--ctx-size 128)"),
        ((lines, *CONTROLS, "--chat-template", template), "(--chat-template '"),
        ((lines, *CONTROLS[:4]), "(numerics 'fast'), got one of another (numerics 'exact')"),
    ):
        mistake = run(*words, "-o", out).mistake
        assert f"{out}: expected the output of this batch {name}" in mistake
        assert mistake.endswith("; remove it, or give another -o")
    rows = before.splitlines(keepends=True)
    out.write_bytes(b"{}\n" + before)
    assert (
        "expected the answer to line 1 ('request-0') in its line 1, got '{}" in run(lines, "-o", out, *CONTROLS).mistake
    )
    out.write_bytes(rows[0] + before)
    assert "expected the answer to line 2" in run(lines, "-o", out, *CONTROLS).mistake
    out.write_bytes(before)
    with out.open("rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert "expected a file for this process alone" in run(lines, "-o", out, *CONTROLS).mistake
    assert out.read_bytes() == before
    out.with_name("out.jsonl.progress.json").write_text("{")
    assert "out.jsonl.progress.json: expected one strict JSON document" in run(lines, "-o", out, *CONTROLS).mistake
    out.with_name("out.jsonl.progress.json").unlink()
    assert "expected no file yet" in run(lines, "-o", out, *CONTROLS).mistake
    assert out.read_bytes() == before


def test_it_goes_on_with_other_engine_settings_and_the_seed_that_it_had(
    run: Any, shipped_artifact: Path, tmp_path: Path
) -> None:
    file = write(tmp_path / "in.jsonl", [{"prompt": STARTS[i % 4]} for i in range(12)])
    out = tmp_path / "out.jsonl"
    controls = ("--temperature", "1", "-n", "24")
    words = [str(word) for word in (DOVETAIL, "batch", shipped_artifact, file, "-o", out, *controls)]
    with subprocess.Popen([*words, "--sequences", "1"], stderr=subprocess.DEVNULL) as running:
        while not (out.exists() and out.stat().st_size):
            time.sleep(0.005)
        running.kill()
    seed = read(out)[0]["seed"]
    done = run(file, "-o", out, *controls, "--sequences", 3, "--no-draft", "-t", 1, "--json")
    assert done.code == 0
    assert [document["seed"] for document in read(out)] == list(range(seed, seed + 12))
    assert json.loads(done.out)["seed"] == seed
    assert json.loads(done.out)["lines"] == 12


def test_a_batch_that_was_killed_behind_its_last_line_is_finished(
    run: Any, lines: Path, undisturbed: Documents, shipped_artifact: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.jsonl"
    stopped(lines, shipped_artifact, out)
    out.write_bytes(lines.with_name("undisturbed.jsonl").read_bytes())
    assert "2 of 26 lines were not done: lines 6, 18; line 6: " in run(lines, "-o", out, *CONTROLS).mistake
    assert [path.name for path in tmp_path.iterdir()] == ["out.jsonl"]


def test_lines_that_cannot_be_done(run: Any, tmp_path: Path) -> None:
    entries: list[Any] = [
        {"prompt": "import os\n", "id": "a"},
        '{"prompt": "import',
        {"prompt": "import os\n" * 200},
        {"messages": [{"role": "user", "content": "Hello"}]},
        {"prompt": "\ud800", "id": "\ud800"},
        {"prompt": "import sys\n", "id": "z"},
    ]
    file = write(tmp_path / "in.jsonl", entries)
    done = run(file, "-o", tmp_path / "out.jsonl", *CONTROLS, "-n", 4, "--json")
    assert "4 of 6 lines were not done: lines 2, 3, 4, 5; line 2: expected one strict JSON" in done.mistake
    assert json.loads(done.out)["failed_lines"] == [2, 3, 4, 5]
    documents = read(tmp_path / "out.jsonl")
    assert [document["id"] for document in documents] == ["a", None, 3, 4, "\ud800", "z"]
    assert [document["error"]["code"] if "error" in document else None for document in documents] == [
        None,
        "invalid_request",
        "context_length_exceeded",
        "invalid_request",
        "invalid_request",
        None,
    ]
    assert "context of 128 tokens, got" in documents[2]["error"]["message"]
    assert "expected a model with a chat template" in documents[3]["error"]["message"]
    one = run(write(file, entries[:2]), "-o", tmp_path / "one.jsonl", *CONTROLS, "-n", 4)
    assert "error: 1 of 2 lines was not done: line 2: expected one strict JSON document" in one.mistake


def test_variables_of_the_chat_template(run: Any, tmp_path: Path, shipped_artifact: Path) -> None:
    """A body's own win over the flag's, and what is a text to continue has none."""
    template = tmp_path / "template.jinja"
    template.write_text("# {{ name }}{{ mark }}: {{ messages[0].content }}\nimport ")
    user = [{"role": "user", "content": "Go."}]
    chat = {"custom_id": "c", "method": "POST", "url": "/v1/chat/completions"}
    entries = [chat | {"body": {"messages": user, "chat_template_kwargs": {"name": "own"}, "max_tokens": 6}}]
    file = write(tmp_path / "in.jsonl", [*entries, {"messages": user, "id": "m"}, {"prompt": "Why?"}])
    words = ["--chat-template", template, "--chat-template-kwargs", '{"name": "n", "mark": 2}']
    done = run(file, "-o", tmp_path / "out.jsonl", *CONTROLS, "-n", 6, *words)
    assert done.code == 0, done.err
    first, second, third = read(tmp_path / "out.jsonl")
    with load(shipped_artifact, numerics="exact", ctx_size=128, chat_template=template.read_text()) as pipe:
        lengths = [len(pipe.encode(user, None, {"name": name, "mark": 2})) for name in ("own", "n")]
        assert first["response"]["body"]["usage"]["prompt_tokens"] == lengths[0]
        assert (second["prompt_tokens"], third["prompt_tokens"]) == (lengths[1], len(pipe.encode("Why?")))
    for words, message in ((["[]"], "expected a JSON object"), (["{a}"], "expected one strict JSON document")):
        mistake = run(file, "-o", tmp_path / "two.jsonl", "--chat-template-kwargs", *words).mistake
        assert f"--chat-template-kwargs: {message}" in mistake


def test_chats(run: Any, tmp_path: Path, shipped_artifact: Path) -> None:
    template = tmp_path / "template.jinja"
    template.write_text("{% for m in messages %}# {{ m.role }}: {{ m.content }}\n{% endfor %}import ")
    messages = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Go."}]
    controls = {"max_tokens": 4, "logprobs": True, "top_logprobs": 2, "n": 2, "seed": 5, "temperature": 1}
    chat = {"custom_id": "c", "method": "POST", "url": "/v1/chat/completions", "body": {"messages": messages}}
    chat["body"] |= controls  # type: ignore[operator]  # a dictionary
    legacy = body_line(0, max_tokens=4, logprobs=2)
    entries = [chat, {"question": "Why?", "id": "q"}, {"messages": messages, "id": "m"}, {"prompt": "Why?"}, legacy]
    file = write(tmp_path / "in.jsonl", entries)
    done = run(file, "-o", tmp_path / "out.jsonl", *CONTROLS, "-n", 6, "--chat-template", template)
    assert done.code == 0, done.err
    answers = read(tmp_path / "out.jsonl")
    with load(shipped_artifact, numerics="exact", ctx_size=128, chat_template=template.read_text()) as pipe:
        base = {"max_new_tokens": 6, "temperature": 0.8}
        said = pipe.generate([{"role": "user", "content": "Why?"}], seed=12, **base)
        assert answers[1]["text"] == said.text
        assert answers[1]["prompt_tokens"] == said.prompt_tokens
        assert answers[2]["text"] == pipe.generate(messages, seed=13, **base).text
        assert answers[3]["text"] == pipe.generate("Why?", seed=14, **base).text
        both = pipe.generate(messages, max_new_tokens=4, temperature=1, seed=5, num_return_sequences=2, logprobs=2)
    body = answers[0]["response"]["body"]
    assert body["object"] == "chat.completion"
    assert body["seed"] == 5
    assert body["usage"]["completion_tokens"] == sum(answer.completion_tokens for answer in both)
    assert [choice["message"]["content"] for choice in body["choices"]] == [answer.text for answer in both]
    assert [choice["index"] for choice in body["choices"]] == [0, 1]
    content = body["choices"][1]["logprobs"]["content"]
    assert [entry["logprob"] for entry in content] == pytest.approx([p.logprob for p in both[1].logprobs], abs=1e-3)
    assert all(len(entry["top_logprobs"]) == 2 for entry in content)
    assert "".join(entry["token"] for entry in content).strip() == both[1].text.strip()
    logprobs = answers[4]["response"]["body"]["choices"][0]["logprobs"]
    assert len(logprobs["tokens"]) == len(logprobs["token_logprobs"]) == len(logprobs["text_offset"]) == 4


def test_several_answers_and_logprobs(run: Any, tmp_path: Path) -> None:
    file = write(tmp_path / "in.jsonl", [{"prompt": STARTS[0]}, {"prompt": STARTS[1]}])
    run(file, "-o", tmp_path / "out.jsonl", *CONTROLS, "-n", 3, "--num-return-sequences", 3, "--logprobs", 1)
    for document in read(tmp_path / "out.jsonl"):
        assert len(document["sequences"]) == 3
        assert document["sequences"][0]["text"] == document["text"]
        assert len(document["logprobs"]) == len(document["token_ids"]) == 3


def test_stdin_is_taken_and_goes_on_too(
    lines: Path, undisturbed: Documents, shipped_artifact: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.jsonl"
    stopped(lines, shipped_artifact, out)
    with lines.open() as given:
        piped = subprocess.run(
            command(shipped_artifact, "-", out), input=given.read(), capture_output=True, text=True, check=False
        )
    assert piped.returncode == 2
    assert "going on: " in piped.stderr
    assert timeless(read(out)) == undisturbed


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere.jsonl", "-o", "out.jsonl"], "nowhere.jsonl: expected a readable file, got No such file"),
        (["empty.jsonl", "-o", "out.jsonl"], "empty.jsonl: expected a JSON object a line, got an empty file"),
        (["twins.jsonl", "-o", "out.jsonl"], "got 2 in lines 1 and 2"),
        (["text.txt", "-o", "out.jsonl"], "got none that can be read: line 1"),
        (["good.jsonl"], "Missing option '-o'"),
        (["good.jsonl", "-o", "nowhere/out.jsonl"], "nowhere/out.jsonl: expected a file to write, got No such file"),
        (["good.jsonl", "-o", "."], "expected a file to write, got Is a directory"),
        (["good.jsonl", "-o", "/dev/null"], "/dev/null: expected a regular file"),
        (["good.jsonl", "-o", "-"], "-: expected a file, which can be gone on with, got stdout"),
        (["good.jsonl", "-o", "good.jsonl"], "good.jsonl: expected no file yet"),
        (["good.jsonl", "-o", "out.jsonl", "--sequences", "0"], "sequences: expected an integer from 1 to 4096, got 0"),
        (["good.jsonl", "-o", "out.jsonl", "--temperature", "-1"], "temperature: expected a number from 0"),
        (["good.jsonl", "-o", "out.jsonl", "--num-return-sequences", "2"], "greedy answers are all the same"),
        (["good.jsonl", "-o", "out.jsonl", "-c", "100000"], "--ctx-size: expected an integer from 2 to 2048"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty.jsonl").touch()
    Path("text.txt").write_text("import os\n")
    write(Path("twins.jsonl"), [{"id": 2, "prompt": "a"}, {"prompt": "b"}])
    write(Path("good.jsonl"), [{"prompt": "a"}])
    before = sorted(tmp_path.iterdir())
    done = run(*words)
    assert message in done.mistake
    assert done.out == ""
    assert sorted(tmp_path.iterdir()) == before
    assert read(Path("good.jsonl")) == [{"prompt": "a"}]


def test_a_cache_beyond_the_memory_names_the_flag(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dovetail.runtime.targets.openvino.engine.available_memory", lambda: 10**9)
    file = write(tmp_path / "in.jsonl", [{"prompt": "a"}])
    mistake = run(file, "-o", tmp_path / "out.jsonl", "--sequences", 1000).mistake
    assert "error: --sequences 1000: expected memory for a cache of " in mistake
    assert "got 1.0 GB; lower sequences or --ctx-size" in mistake


def test_a_full_disk(lines: Path, undisturbed: Documents, shipped_artifact: Path, tmp_path: Path) -> None:
    """With a limit on the size of files, which stops a line in its middle."""
    import resource

    out = tmp_path / "out.jsonl"
    words = command(shipped_artifact, lines, out)
    done = subprocess.run(
        words,
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: (
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN),
            resource.setrlimit(resource.RLIMIT_FSIZE, (1500, 1500)),
        ),
    )
    assert done.returncode == 2
    assert "expected room for a line more, got File too large; make some, then run the same command" in done.stderr
    assert out.stat().st_size == 1500
    assert subprocess.run(words, capture_output=True, check=False).returncode == 2
    assert timeless(read(out)) == undisturbed


def test_a_bar_on_a_terminal_only(lines: Path, shipped_artifact: Path, tmp_path: Path) -> None:
    main, side = pty.openpty()
    words = command(shipped_artifact, lines, tmp_path / "out.jsonl")
    subprocess.run(words, stdout=subprocess.DEVNULL, stderr=side, check=False, env={**os.environ, "COLUMNS": "120"})
    os.close(side)
    shown = b""
    while True:
        try:
            piece = os.read(main, 65536)
        except OSError:
            break
        if not piece:
            break
        shown += piece
    os.close(main)
    assert b"26/26" in shown
    assert b"tokens/s" in shown
    assert b" left" in shown
