"""Coverage-guided fuzzing (atheris, which is libFuzzer) of one reader of tests/support/untrusted_readers.py.

Usage: PYTHONPATH=.:tests/support python tests/tools/fuzz_readers.py READER --seconds S [--corpus DIR] [--keep FILE]

Needs `pip install atheris`, beside what the tests need. It begins with the reader's seeds, its kept inputs in
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
import re
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

_CORPUS = Path(__file__).resolve().parents[1] / "corpus"
_MAX_BYTES = 20_000
_KEPT_BYTES, _KEPT_OF_ALL = 4000, 12_000
_DEEP = (30, 90, 50_000)
_MARK = "\ue0ff"  # in a mutated document, where text that json.dumps would not write is to stand
_RAW = (
    *("NaN", "1e999", "-0", "1e-400", "9" * 25, "9" * 5000, '"\\ud800"', '"\\u0000"', "1.0", "1e2", "0.1e1"),
    *("[" * depth + "]" * depth for depth in _DEEP),
    *('{"a":' * depth + "1" + "}" * depth for depth in _DEEP),
)
_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 0.5, -0.0, 1e-9, 1e300, 2**31, 2**32 - 1, 2**53 + 1, 2**63, 2**64 - 1, 10**18),
    *(
        "",
        " ",
        "x",
        "\n",
        "a\nb",
        "\x1b[2J",
        "\x7f",
        "\u202e",
        "é",
        "東",
        "x" * 70,
        "x" * 3000,
        "</s>",
        "05",
        "-1",
        "auto",
    ),
    *([], {}, [[]], [None], [0], [1, 1], ["x"], {"": 0}, {"a\nb": 1}, {"x": {}}, [{}], {"type": "text", "text": "a"}),
)

_TEMPLATE_WORDS = """
abs batch capitalize center default dictsort filesizeformat first float format groupby indent int items join last
length list lower map max min pprint random reject rejectattr replace reverse round select selectattr slice sort string
striptags sum title trim truncate unique upper urlize wordcount wordwrap xmlattr tojson split strip lstrip rstrip
startswith endswith partition rpartition splitlines find removeprefix zfill ljust rjust expandtabs translate swapcase
casefold encode isdigit count index loop.index0 messages content role continue break recursive
"""


def places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths to all values of a document."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [at, *(path for key, item in items for path in places(item, (*at, key)))]


def changed_document(document: Any, dice: random.Random) -> str:
    """JSON with one to three changes."""
    root, raw = [document], ""
    for _ in range(dice.choice((1, 1, 1, 2, 3))):
        *before, key = dice.choice(places(root)[1:])
        holder: Any = root
        for step in before:
            holder = holder[step]
        kind = dice.randrange(8)
        if kind == 0 and holder is not root:
            del holder[key]
        elif kind == 1 and isinstance(holder, dict):
            holder[dice.choice([*map(str, _VALUES[17:33]), key + "2", key.upper()])] = holder.pop(key)
        elif kind == 2:  # a value of another place
            other = dice.choice(places(root)[1:])
            value: Any = root
            for step in other:
                value = value[step]
            holder[key] = json.loads(json.dumps(value))
        elif kind == 3 and isinstance(holder, list) and holder is not root:
            holder.insert(key, json.loads(json.dumps(holder[key])))
        elif kind == 4 and type(holder[key]) in (int, float):
            holder[key] = dice.choice((-1, 2, 0.5, 1000, 1e30)) * holder[key] + dice.choice((0, 0, 1, -1))
        elif kind == 5 and not raw:
            holder[key], raw = _MARK, dice.choice(_RAW)
        elif kind == 6 and isinstance(holder, dict):
            holder[dice.choice(["new", key + " ", "id", "error", "type", "input"])] = dice.choice(_VALUES)
        else:
            alike = [value for value in _VALUES if type(value) is type(holder[key])]
            holder[key] = dice.choice(alike if alike and dice.random() < 0.6 else _VALUES)
    return _written(root[0], raw, dice)


def _written(document: Any, raw: str, dice: random.Random) -> str:
    """As JSON, with `raw` in its place."""
    if raw[:2] == "[[" and dice.random() < 0.5:
        depth = dice.randrange(80, 1000)
        raw = "[" * depth + "]" * depth
    text = json.dumps(document, ensure_ascii=dice.random() < 0.5)
    if dice.random() < 0.05 and text.startswith("{") and len(text) > 2:
        text = text[:-1] + ", " + text[1:]  # every key twice
    return text.replace('"\ue0ff"', raw).replace('"\\ue0ff"', raw)


_ATOMS = (
    "messages[1].content",
    "messages[2].content",
    "bos_token",
    "messages[0].role",
    "tools[0].name",
    "'aB\\n '",
    "eos_token",
)
_TEXTS = (  # of texts T and lists L
    *(
        "(T)|trim",
        "(T)|upper",
        "(T)|lower",
        "(T)|title",
        "(T)|capitalize",
        "(T)|reverse",
        "(T)|indent",
        "(T)|center(40)",
    ),
    *(
        "(T)|replace(T, T)",
        "(none or T)|default(T)",
        "(T)|string",
        "(T)|wordwrap(9)",
        "(T)|truncate(9)",
        "(T)|first",
        "(T)|last",
    ),
    *(
        "(T).strip()",
        "(T).strip(T)",
        "(T).replace(T, T, 1)",
        "(T).zfill(40)",
        "(T).ljust(40, 'x')",
        "(T).expandtabs(3)",
    ),
    *(
        "(T).swapcase()",
        "(T).casefold()",
        "(T).removeprefix(T)",
        "(T).rstrip(T)",
        "(T).translate({97: 'bc'})",
        "(T).title()",
    ),
    *(
        "(T).rpartition(T)[2]",
        "(T).partition(T)[0]",
        "(T).rjust(40)",
        "(T).lstrip()",
        "(T).lower()",
        "(T).capitalize()",
    ),
    *(
        "(T) ~ (T)",
        "(T) + (T)",
        "(T) * 2",
        "2 * (T)",
        "(T)[1:]",
        "(T)[::-1]",
        "(T)[0]",
        "(T)[-2:5]",
        "(T)[1:][:3]",
        "(T)|max",
    ),
    *(
        "(T) if (T) else (T)",
        "(T) if (T) in (T) else (T)",
        "(T) or (T)",
        "(L)|join",
        "(L)|join(T)",
        "(T).join(L)",
        "(L)[0]",
        "(L)[-1]",
    ),
    *(
        "(L)|string",
        "(L)|first",
        "(L)|last",
        "(L)|max",
        "(L)|sum(start='')",
        "{T: T}|string",
        "(T)|string|length|string",
        "(T).upper()",
    ),
)
_LISTS = (
    *(
        "[T, T]",
        "(T)|list",
        "(T).split()",
        "(T).split(T)",
        "(T).rsplit(T, 1)",
        "(T).splitlines()",
        "(T).splitlines(true)",
    ),
    *(
        "(T).partition(T)",
        "(L)|map('upper')|list",
        "(L)|unique|list",
        "(L)|sort",
        "(L) + (L)",
        "(L)[1:]",
        "(L)|reverse|list",
    ),
    *("(L)|map('trim')|list", "(T)|slice(2)|map('join')|list", "(T)|batch(3)|map('join')|list", "(L)|select|list"),
    *("messages|map(attribute='content')|list", "{T: T}|list", "(L)|reject('in', L)|list"),
)
_PLACES = (
    "{{ raise_exception(T) }}",
    *(
        "{{ T }}",
        "{% for x in L %}{{ x }}{% endfor %}",
        "{% if T %}a{{ T }}{% endif %}",
        "{% set v = T %}{{ v }}",
        "{{ L }}",
    ),
    *(
        "{% macro m(x) %}{{ x }}{% endmacro %}{{ m(T) }}",
        "{%- set n = namespace(a=T) -%}{{ n.a }}",
        "{% set v = L %}{{ v[0] }}",
    ),
    *(
        "{% filter upper %}{{ T }}{% endfilter %}",
        "{% set v %}{{ T }}b{% endset %}{{ v }}",
        "{% for x in T %}{{ x ~ T }}{% endfor %}",
    ),
    "{% set n = namespace(a=T) %}{% for x in L %}{% set n.a = n.a + x %}{% endfor %}{{ n.a }}",
    "{% macro m(x) %}{{ caller(x) }}{% endmacro %}{% call(y) m(T) %}{{ y }}{% endcall %}",
)


def expression(dice: random.Random, form: str, depth: int) -> str:
    """`form`, each T in it a text and each L a list, of what a chat template has."""

    def one(found: re.Match[str]) -> str:
        if found[0] == "L":
            return expression(dice, dice.choice(_LISTS if depth > 0 else ("[T, T]", "(T).split(T)")), depth - 1)
        return expression(dice, dice.choice(_TEXTS), depth - 1) if depth > 0 else dice.choice(_ATOMS)

    return re.sub(r"\b[TL]\b", one, form)


def changed_template(source: str, dice: random.Random) -> str:
    """A template with one more expression, or with more in one."""
    found = list(re.finditer(r"\{\{(.*?)\}\}", source))
    if found and dice.random() < 0.5:
        one = dice.choice(found)
        form = dice.choice([text for text in _TEXTS if text.startswith("(T)")]).replace("T", "\ue000", 1)
        inner = expression(dice, form, dice.randrange(2)).replace("\ue000", one[1])
        return f"{source[: one.start()]}{{{{ {inner} }}}}{source[one.end() :]}"
    new = expression(dice, dice.choice(_PLACES), dice.randrange(3))
    at = dice.choice([0, len(source), *(one.end() for one in found)])
    return source[:at] + new + source[at:]


def changed(kind: str, data: bytes, dice: random.Random) -> bytes | None:
    """`data` changed as what it is; None where it is none of that kind."""
    try:
        if kind == "json":
            return changed_document(json.loads(data), dice).encode("utf-8", "surrogatepass")
        if kind == "template":
            return changed_template(data.decode() if dice.random() < 0.8 else "", dice).encode()
        if kind == "lines":
            lines = data.split(b"\n")
            at = dice.randrange(len(lines))
            action = dice.randrange(8)
            if action == 0:
                del lines[at]
            elif action == 1:
                lines.insert(at, dice.choice(lines))
            elif action == 2:
                lines[at] = dice.choice((b"", b"\r", b" ", b"\xef\xbb\xbf", b"{}", b"[]", b"\xff"))
            else:
                lines[at] = changed_document(json.loads(lines[at]), dice).encode("utf-8", "surrogatepass")
            return b"\n".join(lines)
        if kind == "header":  # of safetensors
            length = int.from_bytes(data[:8], "little")
            text = changed_document(json.loads(data[8 : 8 + length]), dice).encode("utf-8", "surrogatepass")
            return len(text).to_bytes(8, "little") + text + data[8 + length :]
    except (ValueError, RecursionError, IndexError, TypeError, KeyError, OverflowError):
        pass
    return None


def dictionary(seeds: list[bytes]) -> list[str]:
    """The words of the seeds, and some that mean something in a file that is read here."""
    words = {word for seed in seeds for word in re.findall(rb"[A-Za-z_.]{3,30}", seed)}
    words |= {
        b"{{",
        b"}}",
        b"{%",
        b"%}",
        b"|",
        b"for",
        b"in",
        b"endfor",
        b"set",
        b"macro",
        b"call",
        b"filter",
        b"namespace",
    }
    words |= {(1 << bits).to_bytes(8, "little") for bits in (16, 31, 32, 40, 62, 63)} | {b"\xff" * 8, b"null", b"\r\n"}
    if any(b"{%" in seed for seed in seeds):
        words |= {word.encode() for word in _TEMPLATE_WORDS.split()}
    return ['"' + "".join(f"\\x{byte:02x}" for byte in word) + '"' for word in sorted(words)]


class Campaign:
    """What is judged while libFuzzer runs; nothing that it finds ends it."""

    def __init__(self, name: str, folder: Path) -> None:
        from untrusted_readers import READERS, complaint

        self._reader, self._complaint, self._faults = READERS[name], complaint, folder / "faults"
        self._faults.mkdir(exist_ok=True)
        self._log = folder / "figures.jsonl"
        self._begin, self._runs, self._seen = time.monotonic(), 0, set[str]()

    def try_one(self, data: bytes) -> None:
        """Judge one input."""
        self._runs += 1
        found = self._complaint(self._reader, data)
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
    (folder / "words").write_text("\n".join(dictionary(seeds)) + "\n")
    (folder / "figures.jsonl").touch()
    end = time.monotonic() + given.seconds
    while (rest := int(end - time.monotonic())) > 2:  # a crash of a native library ends the process: begin another
        command = [sys.executable, __file__, given.reader, "--within", f"--seconds={rest}", f"--corpus={folder}"]
        done = subprocess.run(command, check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
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
