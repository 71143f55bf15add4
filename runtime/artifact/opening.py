"""The artifact on disk: open it, hold it against its manifest, and refuse it before any native parser has seen a byte.

Links are followed once, at the beginning: hub clients, volumes of Kubernetes and installers lay files out with them.
What is verified is then the very path that is used, so a link that changes meanwhile changes nothing. What is checked
is the content as it lies there at opening time; whoever can write to it afterwards wins, so artifacts are read-only.
"""

from __future__ import annotations

import hashlib
import logging
import os
import stat
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from dovetail.runtime.artifact import manifest as manifest_format
from dovetail.runtime.artifact.manifest import DRAFT_MODEL, MANIFEST_NAME, MAX_MANIFEST_BYTES, Manifest
from dovetail.runtime.errors import ArtifactError

_CHUNK_BYTES = 1 << 20
_MOST_NAMED = 3
_EXTERNAL = f"{DRAFT_MODEL}.data"  # weights that the draft's graph finds by itself, beside its own file
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Artifact:
    """An opened artifact. `digest` is the sha256 of `dovetail.json`, holding all other hashes: it names the content.
    `places`: where each listed file lies, links followed.
    """

    path: Path
    manifest: Manifest
    digest: str
    places: Mapping[str, Path]

    def has(self, name: str) -> bool:
        """Whether the manifest lists the file `name`."""
        return name in self.manifest.files

    def file(self, name: str) -> Path:
        """Where the listed file `name` lies. Raises `ArtifactError` when the manifest does not list it."""
        if not self.has(name):
            raise ArtifactError(
                f"{self.path}: expected a file {name}, got an artifact without it; export the artifact again"
            )
        return self.places[name]


def open_artifact(
    path: str | os.PathLike[str], *, trust: bool = False, progress: Callable[[int], object] | None = None
) -> Artifact:
    """Read and verify the artifact in the folder `path`; `trust` skips the hashes (sizes and names are still checked).

    `progress` is called with the bytes hashed since its last call; they add up to the sizes of all listed files.
    Raises `ArtifactError` unless the folder holds the listed files, regular (or links to such) and of the listed size
    and hash. What lies there besides is never read; where hashes are checked, the log names it.
    """
    root = Path(path)
    try:
        if not root.exists():
            raise ArtifactError(f"{root}: expected an artifact folder, got nothing there; check the path")
        if not root.is_dir():
            raise ArtifactError(
                f"{root}: expected an artifact folder, got something else; pass the folder that holds {MANIFEST_NAME}"
            )
        data = _read_manifest(root / MANIFEST_NAME)
        manifest = manifest_format.loads(data)
        places = {name: _place(root, name) for name in manifest.files}
        _check_external(places)
        for name, entry in manifest.files.items():
            _check_size(places[name], entry.bytes)
        if not trust:
            for name, entry in manifest.files.items():
                _check_hash(places[name], entry.sha256, entry.bytes, progress)
            _tell_unlisted(root, manifest)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise ArtifactError(
            f"{root}: expected a readable artifact, got {_reason(error)}; check the path and its permissions"
        ) from None
    return Artifact(root, manifest, hashlib.sha256(data).hexdigest(), places)


def _reason(error: Exception) -> str:
    if isinstance(error, OSError):
        return f"{error.strerror} ({Path(os.fsdecode(error.filename)).name})" if error.filename else str(error.strerror)
    return str(error)


def _read_manifest(path: Path) -> bytes:
    try:
        place = Path(os.path.realpath(path, strict=True))
    except FileNotFoundError:
        raise ArtifactError(
            f"{path}: expected an artifact's manifest, got nothing there; is {path.parent} an artifact?"
        ) from None
    status = place.lstat()
    _require_regular(place, status.st_mode)
    if status.st_size > MAX_MANIFEST_BYTES:
        raise ArtifactError(
            f"{path}: expected at most {MAX_MANIFEST_BYTES} bytes, got {status.st_size}; export the artifact again"
        )
    with open(_open_regular(place), "rb") as file:
        return file.read(MAX_MANIFEST_BYTES + 1)


def _place(root: Path, name: str) -> Path:
    """Where the listed file `name` is, links followed."""
    try:
        place = Path(os.path.realpath(root / name, strict=True))
    except FileNotFoundError:
        raise ArtifactError(
            f"{root}: expected the listed file {name}, got nothing there; copy the artifact again, links followed "
            "(cp -rL)"
        ) from None
    _require_regular(place, place.lstat().st_mode)
    return place


def _check_external(places: Mapping[str, Path]) -> None:
    """The draft's graph names its external weights itself: they must lie beside it under their own name."""
    if _EXTERNAL in places and places[_EXTERNAL] != places[DRAFT_MODEL].with_name(Path(_EXTERNAL).name):
        raise ArtifactError(
            f"{_EXTERNAL}: expected it beside {DRAFT_MODEL}, got links to other names or folders; copy the artifact, "
            "links followed (cp -rL)"
        )


def _kind(mode: int) -> str:
    kinds = ((stat.S_ISREG, "a file"), (stat.S_ISLNK, "a link"), (stat.S_ISDIR, "a folder"))
    return next((kind for test, kind in kinds if test(mode)), "a special file")


def _require_regular(path: Path, mode: int) -> None:
    if not stat.S_ISREG(mode):
        raise ArtifactError(f"{path}: expected a regular file, got {_kind(mode)}; copy the artifact again")


def _open_regular(path: Path) -> int:
    """A descriptor of the regular file `path`, or `ArtifactError`; never waits for a pipe's other end."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW)
    try:
        _require_regular(path, os.fstat(descriptor).st_mode)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _tell_unlisted(root: Path, manifest: Manifest) -> None:
    """Log what lies beside the listed files. Hidden names are those of tools: version control, hub clients, volumes."""
    folders = manifest_format.folders_of(manifest.files)
    names = sorted(name for name in _walk(root, "", folders) if name not in manifest.files and name != MANIFEST_NAME)
    if names:
        shown = ", ".join(f"{name!r:.100}" for name in names[:_MOST_NAMED])
        more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
        _log.info("%s lists no %s%s: not read", MANIFEST_NAME, shown, more)


def _walk(folder: Path, prefix: str, folders: set[str]) -> Iterator[str]:
    """Names (relative to the artifact) of all below `folder` that is not hidden. Enters only `folders`, so it is
    bounded.
    """
    with os.scandir(folder) as entries:
        for entry in entries:
            name = prefix + entry.name
            if name in folders:
                yield from _walk(folder / entry.name, name + "/", folders)
            elif not entry.name.startswith("."):
                yield name


def _check_size(path: Path, expected: int) -> None:
    size = path.lstat().st_size
    if size != expected:
        raise ArtifactError(f"{path}: expected {expected} bytes, got {size}; copy the artifact again")


def _check_hash(path: Path, expected: str, size: int, progress: Callable[[int], object] | None) -> None:
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(min(_CHUNK_BYTES, size + 1)))
    total = 0
    with open(_open_regular(path), "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
            total += count
            if total > size:  # it grows under our hands: no need to follow it to its end
                break
            if progress is not None:
                progress(count)
    if digest.hexdigest() != expected:
        raise ArtifactError(
            f"{path}: expected sha256 {expected[:12]}…, got {digest.hexdigest()[:12]}…; copy the artifact again"
        )
