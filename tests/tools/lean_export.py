"""Run by `make lean` where only the built wheel with the extra `export` is installed. Proves that a real model, from
its GGUF file to an answer, needs nothing of torch's family, and that the extra is small.

Usage: python lean_export.py
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import re
import sys
import tempfile
import time
from pathlib import Path

import real_models

ABSENT = ("torch", "torchvision", "transformers", "optimum", "nncf", "onnxscript")
MAX_EXTRA_BYTES = 300_000_000


def main() -> None:
    from dovetail.export.commands import cli

    assert "site-packages" in Path(cli.__file__).parts, f"expected the installed wheel, got {cli.__file__}"
    for package in ABSENT:
        assert importlib.util.find_spec(package) is None, f"expected no {package} beside the export"
    extra = sum(size_of(name) for name in needed("dovetail", {"export"}) - needed("dovetail", set()))
    print(f"the extra `export` adds {extra / 1e6:.0f} MB to the runtime")
    assert extra < MAX_EXTRA_BYTES, "the extra `export` has grown"
    with tempfile.TemporaryDirectory() as folder:
        out, started = Path(folder) / "smollm2", time.perf_counter()
        sys.argv = ["dovetail-export", "model", str(real_models.smollm2_gguf()), "-o", str(out)]
        with contextlib.suppress(SystemExit):
            cli.main()
        print(f"exported in {time.perf_counter() - started:.1f} s")
        answer(out)
    loaded = [name for name in ABSENT if name in sys.modules]
    assert not loaded, f"expected nothing of torch's family loaded, got {loaded}"


def answer(artifact: Path) -> None:
    """A chat's answer by the artifact."""
    from dovetail.runtime import load

    # The first token is nearly a tie ("The", "L'"), which activations in 8 bits turn the other way.
    with load(artifact, numerics="exact") as pipe:
        question = {"role": "user", "content": "What is the capital of France?"}
        done = pipe.generate([question], temperature=0, max_new_tokens=32)
    print(f"answer: {done.text}")
    assert "Paris" in done.text


def needed(package: str, extras: set[str]) -> set[str]:
    """The names of all packages that a package with these extras needs, itself among them."""
    found: set[str] = set()
    waiting = [(package, extras)]
    while waiting:
        name, wanted = waiting.pop()
        name = re.sub(r"[-_.]+", "-", name).lower()
        if name in found and not wanted:
            continue
        try:
            requirements = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:  # for another system
            continue
        found.add(name)
        for requirement in requirements:
            text, _, marker = requirement.partition(";")
            extra = re.search(r"extra\s*==\s*['\"]([^'\"]+)", marker)
            if extra is None or extra[1] in wanted:
                match = re.match(r"\s*([A-Za-z0-9._-]+)(?:\[([^\]]*)\])?", text)
                assert match is not None, requirement
                waiting.append((match[1], set(filter(None, (match[2] or "").split(",")))))
    return found


def size_of(package: str) -> int:
    """Bytes of an installed package's files."""
    files = importlib.metadata.files(package) or []
    return sum(path.stat().st_size for file in files if (path := Path(str(file.locate()))).is_file())


if __name__ == "__main__":
    main()
