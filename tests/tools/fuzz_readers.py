"""Coverage-guided fuzzing (atheris, which is libFuzzer) of one reader of tests/support/untrusted_readers.py.

Usage: PYTHONPATH=.:tests/support python tests/tools/fuzz_readers.py READER --seconds S [--corpus DIR] [--keep FILE]

Needs `pip install atheris` beside what the tests need. It begins with the reader's seeds, its kept inputs in
tests/corpus and those in DIR, where what it finds stays for the next time. A fault does not end it: the first input of
each kind lies in DIR/faults with what happened. At its end it counts the arcs (pairs of lines in a function) that all
inputs take, and with --keep writes to FILE a small set of small ones that takes as many, and those that went wrong
once, with what they did.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

from changed_inputs import changed, dictionary

_CORPUS = Path(__file__).resolve().parents[1] / "corpus"
_MEMORY = Path("/dev/shm")
_MAX_BYTES = 20_000
_KEPT_BYTES, _KEPT_OF_ALL = 4000, 12_000


class Campaign:
    """What is judged while libFuzzer runs; nothing that it finds ends it."""

    def __init__(self, name: str, folder: Path) -> None:
        from untrusted_readers import READERS, judged

        self._reader, self._judged, self._faults = READERS[name], judged, folder / "faults"
        self._faults.mkdir(exist_ok=True)
        self._log = folder / "figures.jsonl"
        self._begin, self._runs, self._seen = time.monotonic(), 0, set[str]()

    def try_one(self, data: bytes) -> None:
        """Judge one input."""
        self._runs += 1
        _, found = self._judged(self._reader, data)
        if found is not None and found[0] not in self._seen:
            self._seen.add(found[0])
            name = hashlib.sha256(found[0].encode()).hexdigest()[:10]
            if not (self._faults / f"{name}.txt").exists():
                (self._faults / f"{name}.bin").write_bytes(data)
                (self._faults / f"{name}.txt").write_text(
                    f"{found[0]}\n{data[:1500]!r}\n{found[1]}\n", errors="replace"
                )
                print(f"FAULT {name} {found[0]}", flush=True)
        if self._runs % 500 == 0:
            self.tell()

    def tell(self) -> None:
        """Keep what has been done; the process may be ended at any time."""
        line = {"pid": os.getpid(), "runs": self._runs, "seconds": round(time.monotonic() - self._begin, 1)}
        with self._log.open("a") as file:
            file.write(json.dumps(line) + "\n")


def fuzz(name: str, folder: Path, seconds: int) -> None:
    """Run libFuzzer in this process."""
    import atheris

    with atheris.instrument_imports(include=["dovetail"], enable_loader_override=False):
        campaign = Campaign(name, folder)
    from untrusted_readers import READERS

    kind = READERS[name].kind

    def mutate(data: bytes, max_size: int, seed: int) -> bytes:
        dice = random.Random(seed)
        made = changed(kind, data, dice) if dice.random() < 0.6 else None
        if made is None or len(made) > max_size:
            made = atheris.Mutate(data, len(data) if kind == "header" and dice.random() < 0.5 else max_size)
        return bytes(made)

    options = [f"-max_total_time={seconds}", f"-max_len={_MAX_BYTES}", "-timeout=25", "-rss_limit_mb=3000"]
    options += [f"-dict={folder / 'words'}", f"-artifact_prefix={folder / 'faults'}/native-", "-print_final_stats=1"]
    more: dict[str, Any] = {} if kind in ("text", "bytes") else {"custom_mutator": mutate}
    atheris.Setup([sys.argv[0], *options, str(folder / "inputs")], campaign.try_one, **more)
    atheris.Fuzz()


def arcs_of(read: Callable[[bytes], object], data: bytes) -> set[tuple[Any, ...]]:
    """The arcs in dovetail's functions that an input takes."""
    arcs: set[tuple[Any, ...]] = set()

    def within(frame: types.FrameType, event: str, _: Any) -> Any:
        nonlocal last
        arcs.add((frame.f_code.co_filename, frame.f_code.co_firstlineno, last, frame.f_lineno))
        last = frame.f_lineno
        return within

    def enter(frame: types.FrameType, event: str, argument: Any) -> Any:
        nonlocal last
        if "/dovetail/" not in frame.f_code.co_filename:
            return None
        last = 0
        return within(frame, event, argument)

    last = 0
    sys.settrace(enter)
    try:
        read(data)
    except BaseException:
        pass
    finally:
        sys.settrace(None)
    return arcs


def minimised(read: Callable[[bytes], object], inputs: list[bytes]) -> tuple[int, int, list[bytes]]:
    """(arcs of all inputs, arcs of the kept ones, these): small ones first, each for an arc that none before takes."""
    from untrusted_readers import packed

    inputs = sorted(set(inputs), key=lambda data: (len(data), data))
    taken = [arcs_of(read, data) for data in inputs]
    known, kept, size = set[Any](), list[bytes](), 0
    sizes = [len(packed(data)) for data in inputs]
    left = {at for at, count in enumerate(sizes) if count <= _KEPT_BYTES}
    while left:
        best = max(left, key=lambda at: (len(taken[at] - known) / (200 + sizes[at]), -at))
        if not taken[best] - known:
            break
        left.discard(best)
        if size + sizes[best] <= _KEPT_OF_ALL:
            known |= taken[best]
            kept.append(inputs[best])
            size += sizes[best]
    return len(set().union(*taken)), len(known), kept


def wrong(name: str, folder: Path) -> list[str]:
    """Lines for what went wrong, now and before; a different input each."""
    from untrusted_readers import packed

    path = _CORPUS / f"{name}.jsonl"
    before = [line for line in (path.read_text().splitlines() if path.exists() else []) if "was" in json.loads(line)]
    found = sorted(folder.glob("faults*/*.bin"))
    new = [packed(path.read_bytes(), path.with_suffix(".txt").read_text().splitlines()[0]) for path in found]
    return before + [line for line in dict.fromkeys(new) if line not in before and len(line) <= _KEPT_BYTES]


def main() -> None:
    """See above."""
    parser = argparse.ArgumentParser(description="Fuzz one reader of untrusted bytes.")
    parser.add_argument("reader")
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--corpus", type=Path)
    parser.add_argument("--keep", type=Path)
    parser.add_argument("--within", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    folder = given.corpus or Path(tempfile.mkdtemp(prefix="fuzz-"))
    if given.within:
        fuzz(given.reader, folder, given.seconds)
        return
    from untrusted_readers import READERS, kept, packed

    reader = READERS[given.reader]
    (folder / "inputs").mkdir(parents=True, exist_ok=True)
    seeds = [*reader.seeds(), *kept(_CORPUS / f"{given.reader}.jsonl")]
    for seed in seeds:
        (folder / "inputs" / hashlib.sha256(seed).hexdigest()[:16]).write_bytes(seed)
    (folder / "words").write_text("\n".join(dictionary(reader.kind, seeds)) + "\n")
    (folder / "figures.jsonl").touch()
    end = time.monotonic() + given.seconds
    while (rest := int(end - time.monotonic())) > 2:  # a crash of a native library ends the process: begin another
        command = [sys.executable, __file__, given.reader, "--within", f"--seconds={rest}", f"--corpus={folder}"]
        with tempfile.TemporaryDirectory(
            dir=_MEMORY if _MEMORY.is_dir() else None
        ) as files:  # libFuzzer tidies nothing up
            environment = os.environ | {"TMPDIR": files}
            done = subprocess.run(
                command, check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment
            )
        (folder / "log.txt").write_bytes(done.stdout)
        if done.returncode:
            print(
                f"{given.reader}: ended with {done.returncode}", done.stdout[-600:].decode(errors="replace"), flush=True
            )
    last = {line["pid"]: line for line in map(json.loads, (folder / "figures.jsonl").read_text().splitlines())}
    inputs = [path.read_bytes() for path in (folder / "inputs").iterdir()]
    all_arcs, kept_arcs, chosen = minimised(reader.read, inputs)
    if given.keep:
        given.keep.parent.mkdir(parents=True, exist_ok=True)
        given.keep.write_text("".join(line + "\n" for line in [*map(packed, chosen), *wrong(given.reader, folder)]))
    figures = {
        "reader": given.reader,
        "runs": sum(line["runs"] for line in last.values()),
        "seconds": round(sum(line["seconds"] for line in last.values())),
        "inputs": len(inputs),
        "arcs": all_arcs,
        "kept": len(chosen),
        "kept_arcs": kept_arcs,
        "faults": len(list((folder / "faults").glob("*.txt"))),
    }
    print(json.dumps(figures), flush=True)


if __name__ == "__main__":
    main()
