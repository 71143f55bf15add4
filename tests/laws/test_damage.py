"""Proves: hundreds of damaged artifacts, each given to the real command in a process of its own, all end in exit 2 and
one line of error within seconds, before the library that would parse the damaged file is even imported.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import hashlib
import json
import os
import random
import select
import shutil
import signal
import subprocess
import sys
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from campaign import played
from models.plain_artifact import write_artifact
from models.tokenizer_files import ATTACKS, byte_level

from dovetail.runtime.artifact import manifest

SEED = 20260501
COUNT = played(300, of=500)
LIMIT_S = 20  # a guard against hanging, not a speed: machines that run tests are busy
EXTERNAL_DATA = "draft/model.onnx.data"
FILES = (
    manifest.TARGET_MODEL,
    manifest.TARGET_WEIGHTS,
    manifest.DRAFT_MODEL,
    EXTERNAL_DATA,
    manifest.TOKENIZER,
    manifest.GENERATION_CONFIG,
    manifest.MANIFEST_NAME,
)
# The command, in a process of its own for each line of requests [arguments, where its stdout and stderr go]: forked
# behind the imports that all need, so that these are done once and not 500 times. It tells at its end which native
# libraries it has imported since.
PROGRAM = """
import gc, importlib, json, os, sys
from dovetail.runtime.commands.cli import main

def native():
    return {"openvino", "onnxruntime", "tokenizers"} & set(sys.modules)

assert not native()
for name in sys.argv[1:]:
    importlib.import_module(name)
before = native()
gc.freeze()  # what is here now stays where it is: the processes share its pages
for line in sys.stdin:
    arguments, *files = json.loads(line)
    if child := os.fork():
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
        continue
    for number, path in enumerate(["/dev/null", *files]):
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT), number)
    sys.argv[:] = ["dovetail", *arguments]
    try:
        main()
    finally:
        print("IMPORTED", *sorted(native() - before))
"""

Damage = Callable[[Path, random.Random], object]


def flip(root: Path, rng: random.Random, name: str) -> None:
    data = bytearray((root / name).read_bytes())
    at = rng.randrange(len(data))
    # a manifest with another digit in it can be a valid one; with a byte beyond ASCII it never is
    data[at] ^= 0x80 if name == manifest.MANIFEST_NAME else 1 << rng.randrange(8)
    (root / name).write_bytes(data)


def truncate(root: Path, rng: random.Random, name: str) -> None:
    # two bytes at least: without its last newline the manifest is still whole
    os.truncate(root / name, rng.randrange((root / name).stat().st_size - 1))


def extend(root: Path, rng: random.Random, name: str) -> None:
    with open(root / name, "ab") as file:
        file.write(rng.choice([b"\0", b"x", b"{}", rng.randbytes(5000)]))


def empty(root: Path, rng: random.Random, name: str) -> None:
    (root / name).write_bytes(b"")


def delete(root: Path, rng: random.Random, name: str) -> None:
    (root / name).unlink()


def link(root: Path, rng: random.Random, name: str) -> None:
    (root / name).unlink()
    (root / name).symlink_to(rng.choice(["/dev/zero", "/dev/null", "/etc", "nowhere", root / name]))


def link_inside(root: Path, rng: random.Random, name: str) -> None:
    (root / name).unlink()
    (root / name).symlink_to((root / rng.choice([other for other in FILES if other != name])).resolve())


def directory(root: Path, rng: random.Random, name: str) -> None:
    (root / name).unlink()
    (root / name).mkdir()


def fifo(root: Path, rng: random.Random, name: str) -> None:
    (root / name).unlink()
    os.mkfifo(root / name)


def swap(root: Path, rng: random.Random, name: str) -> None:
    other = rng.choice([other for other in FILES if other != name])
    (root / name).rename(root / "between")
    (root / other).rename(root / name)
    (root / "between").rename(root / other)


def renamed(root: Path, rng: random.Random, name: str) -> None:
    (root / name).rename((root / name).with_name(rng.choice(["a\nerror: b", "x" * 250, "openvino_model.xml~"])))


def everything(root: Path, rng: random.Random) -> None:
    shutil.rmtree(root)
    if rng.random() < 0.5:
        root.touch()


def linked_folder(root: Path, rng: random.Random) -> None:
    folder = root / rng.choice(["target", "draft", "tokenizer"])
    folder.rename(root.parent / f"{root.name}.elsewhere")
    folder.symlink_to(rng.choice(["/etc", "nowhere", folder]))


ANY_FILE = (
    flip,
    flip,
    flip,
    truncate,
    truncate,
    extend,
    empty,
    delete,
    link,
    link_inside,
    directory,
    fifo,
    swap,
    renamed,
)


def file_damages() -> dict[str, Damage]:
    damages: dict[str, Damage] = {f"folder-{i}": change for i in range(3) for change in (everything, linked_folder)}
    for name in FILES:
        for i, change in enumerate(ANY_FILE):
            damages[f"{change.__name__}-{i}-{name}"] = functools.partial(change, name=name)
    return damages


def fields(value: Any, at: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    inner = value.items() if isinstance(value, dict) else ()
    return ([at] if at else []) + [path for key, item in inner for path in fields(item, (*at, key))]


def holder(document: Any, path: tuple[str, ...]) -> Any:
    return functools.reduce(lambda inner, key: inner[key], path[:-1], document)


RAW = {
    "null": "null",
    "wrong-type": '["x"]',
    "true": "true",
    "huge": "9" * 18,
    "endless": "9" * 5000,
    "infinite": "1e999",
    "negative": "-7",
    "nan": "NaN",
    "nested": "[" * 500 + "]" * 500,
    "long": json.dumps("x" * 5000),
    "nul": '"\\u0000"',
}
PARTS: dict[tuple[str, ...], type] = {
    (): manifest.Manifest,
    ("target",): manifest.TargetInfo,
    ("draft",): manifest.DraftInfo,
    ("checks",): manifest.ExportChecks,
}
NULLABLE = {
    (*path, name)
    for path, part in PARTS.items()
    for name, hint in typing.get_type_hints(part).items()
    if type(None) in typing.get_args(hint)
}
YOUNGER = {  # than some files of the format: may be missing
    (*path, field.name)
    for path, part in PARTS.items()
    for field in dataclasses.fields(part)
    if field.default is not dataclasses.MISSING
}
FREE_NAMES = {("tool_versions", "openvino")}  # any tool, or none, is fine


def set_raw(root: Path, rng: random.Random, path: tuple[str, ...], raw: str) -> None:
    document = json.loads((root / manifest.MANIFEST_NAME).read_text())
    holder(document, path)[path[-1]] = "\u2603 here"
    (root / manifest.MANIFEST_NAME).write_text(json.dumps(document, ensure_ascii=False).replace('"\u2603 here"', raw))


def rename_field(root: Path, rng: random.Random, path: tuple[str, ...]) -> None:
    document = json.loads((root / manifest.MANIFEST_NAME).read_text())
    inner = holder(document, path)
    value = inner.pop(path[-1])
    if path in YOUNGER or rng.random() < 0.5:
        inner[rng.choice([path[-1].upper(), path[-1] + "2", "../" + path[-1]])] = value
    (root / manifest.MANIFEST_NAME).write_text(json.dumps(document))


def double_field(root: Path, rng: random.Random, path: tuple[str, ...]) -> None:
    text = (root / manifest.MANIFEST_NAME).read_text()
    key = json.dumps(path[-1]) + ": "
    (root / manifest.MANIFEST_NAME).write_text(text.replace(key, f"{key}1, {key}", 1))


def field_damages(document: Any) -> dict[str, Damage]:
    damages: dict[str, Damage] = {}
    for path in fields(document):
        name = ".".join(path)
        for kind, raw in RAW.items():
            if kind != "null" or path not in NULLABLE:
                damages[f"{kind}-{name}"] = functools.partial(set_raw, path=path, raw=raw)
        if path not in FREE_NAMES:
            damages[f"rename-{name}"] = functools.partial(rename_field, path=path)
        damages[f"double-{name}"] = functools.partial(double_field, path=path)
    return damages


def rewrite(root: Path, rng: random.Random, change: Callable[[dict[str, Any], Path], object]) -> None:
    """An attacker's hand: a changed manifest that is well-formed."""
    document = json.loads((root / manifest.MANIFEST_NAME).read_text())
    change(document, root)
    (root / manifest.MANIFEST_NAME).write_text(json.dumps(document))


def move_entry(document: dict[str, Any], root: Path, to: str) -> None:
    document["files"][to.replace("ROOT", str(root.parent))] = document["files"].pop(EXTERNAL_DATA)
    (root / EXTERNAL_DATA).rename(root.parent / f"{root.name}.outside")


def consistent(root: Path, rng: random.Random, name: str, data: bytes) -> None:
    """A file and its entry changed together: every hash is right."""
    (root / name).write_bytes(data)
    entry = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    rewrite(root, rng, lambda document, _: document["files"].update({name: entry}))


def crafted_damages() -> dict[str, Damage]:
    damages: dict[str, Damage] = {}
    for version in (manifest.FORMAT_VERSION + 1, 99, 10**17):
        newer = functools.partial(lambda version, document, root: document.update(format_version=version), version)
        damages[f"version-{version}"] = functools.partial(rewrite, change=newer)
    for to in (
        "../x",
        "/etc/passwd",
        "ROOT/x",
        "draft/../../x",
        "draft//x",
        "draft/",
        "a\0b",
        "draft\\x",
        "DRAFT/model.onnx",
    ):
        damages[f"path-{to!r}"] = functools.partial(rewrite, change=functools.partial(move_entry, to=to))
    flood = functools.partial(lambda document, root: document["files"].update({f"f{i}": 1 for i in range(5000)}))
    damages["flood"] = functools.partial(rewrite, change=flood)
    for name, data in {
        "no-json": b"tokenizer",
        "nan": b'{"version": NaN}',
        "list": b"[]",
        "deep": b"[" * 200_000,
        "utf-16": json.dumps(byte_level()).encode("utf-16"),
        "empty-object": b"{}",
    }.items():
        damages[f"tokenizer-{name}"] = functools.partial(consistent, name=manifest.TOKENIZER, data=data)
    for attack, change in ATTACKS.items():
        if attack in ("regex that is none", "merge of unknown tokens", "half a character", "added token of another id"):
            continue  # refused by the library itself, with an ordinary error: test_text.py
        document = copy.deepcopy(byte_level())
        change(document)
        data = json.dumps(document).encode()
        damages[f"tokenizer-{attack}"] = functools.partial(consistent, name=manifest.TOKENIZER, data=data)
    for i, data in enumerate(
        (b"[]", b'{"eos_token_id": 1e5}', b'{"eos_token_id": [99999]}', b'{"do_sample": true, "temperature": "x"}')
    ):
        damages[f"generation-{i}"] = functools.partial(consistent, name=manifest.GENERATION_CONFIG, data=data)
    return damages


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = random.Random(SEED)
    files = {name: rng.randbytes(3000) for name in FILES if name != manifest.MANIFEST_NAME}
    files[manifest.TOKENIZER] = json.dumps(byte_level()).encode()
    files[manifest.GENERATION_CONFIG] = b'{"eos_token_id": 0}'
    return write_artifact(tmp_path_factory.mktemp("damage") / "whole", files)


def is_inner(name: str) -> bool:
    """A damage that the file's own reader finds, after all hashes proved right: the program has imported OpenVINO and
    said what it runs on.
    """
    return name.startswith(("tokenizer-", "generation-"))


def command_for(name: str, root: Path, index: int) -> list[str]:
    generate = is_inner(name) or index % 4 == 0
    return ["generate", str(root), "hi", "--max-new-tokens", "1"] if generate else ["inspect", str(root)]


class Commands:
    """Runs commands one after another, each in a process of its own."""

    def __init__(self, scratch: Path, *imports: str) -> None:
        self._files = [scratch / "stdout", scratch / "stderr"]
        program = [sys.executable, "-c", PROGRAM, *imports]
        self._server = subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)

    def run(self, arguments: list[str]) -> tuple[int, str, str] | None:
        """(exit status, stdout, stderr), or None without an answer in time; there are no more answers then."""
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        for file in self._files:
            file.unlink(missing_ok=True)
        self._server.stdin.write(json.dumps([arguments, *map(str, self._files)]).encode() + b"\n")
        self._server.stdin.flush()
        if not select.select([self._server.stdout], [], [], LIMIT_S)[0]:
            return None
        status = int(self._server.stdout.readline())
        stdout, stderr = (file.read_text(errors="replace") for file in self._files)
        return status, stdout, stderr

    def close(self) -> None:
        os.killpg(self._server.pid, signal.SIGKILL)
        self._server.communicate()


def complaint(name: str, damage: Damage, whole: Path, index: int, commands: Commands) -> str | None:
    """Run the command on a damaged copy; what was wrong with its answer, or None."""
    root = whole.parent / f"copy-{index}"
    shutil.copytree(whole, root)
    damage(root, random.Random(SEED + index))
    done = commands.run(command_for(name, root, index))
    shutil.rmtree(root, ignore_errors=True)
    if done is None:
        return f"{name}: no answer within {LIMIT_S} s"
    status, stdout, stderr = done
    errors = [line for line in stderr.splitlines() if line.startswith("error: ")]
    good = status == 2 and len(errors) == 1
    good &= stdout == "IMPORTED\n"
    good &= is_inner(name) or stderr.count("\n") == 1
    good &= "Traceback" not in stderr
    good &= len(stderr) < 2000 and "panicked" not in stderr
    return None if good else f"{name}: exit {status}, stdout {stdout!r}, stderr {stderr!r}"


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Commands]:
    running = Commands(tmp_path_factory.mktemp("commands"))
    yield running
    running.close()


@pytest.fixture(scope="module")
def behind_hashes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Commands]:
    running = Commands(tmp_path_factory.mktemp("commands"), "dovetail.runtime.pipeline")
    yield running
    running.close()


def test_the_whole_artifact_is_fine(whole: Path, commands: Commands) -> None:
    done = commands.run(["inspect", str(whole)])
    assert done is not None
    status, stdout, stderr = done
    assert status == 0
    assert stdout.endswith("IMPORTED\n")
    assert stderr == ""


def test_damages(whole: Path, commands: Commands, behind_hashes: Commands) -> None:
    rng = random.Random(SEED)
    document = json.loads((whole / manifest.MANIFEST_NAME).read_text())
    always = list((file_damages() | crafted_damages()).items())
    by_field = list(field_damages(document).items())
    damages = always + rng.sample(by_field, COUNT - len(always))
    assert len(dict(damages)) == COUNT
    assert len({name.partition("-")[2] for name, _ in damages} & {".".join(path) for path in fields(document)}) > 40
    found = [
        complaint(name, damage, whole, i, behind_hashes if is_inner(name) else commands)
        for i, (name, damage) in enumerate(damages)
    ]
    complaints = [text for text in found if text is not None]
    assert not complaints, f"{len(complaints)} of {COUNT}:\n" + "\n".join(complaints[:20])
