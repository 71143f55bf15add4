"""A folder that appears whole or not at all: built beside its goal, locked while we live, then moved into place.

A killed run leaves the goal as it was, and a hidden neighbour whose lock died with it; the next run removes that.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import glob
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from dovetail.runtime.errors import UserError

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_FULL_BYTES = 1 << 20  # less than this left: native writers that do not say why they failed ran into it
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


def check_goal(goal: Path, force: bool) -> None:
    """Raise `UserError` if `goal` exists and `force` is not given, or can never be made."""
    if os.path.lexists(goal) and not force:
        raise UserError(
            f"expected a new folder, got {goal}, which exists; choose another name or give `force` to replace it"
        )
    if os.path.lexists(goal) and (goal.is_symlink() or not goal.is_dir()):
        raise UserError(f"expected a folder to replace, got {goal}, which is not one; choose another name")
    try:
        goal.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"expected a place for {goal}, got: {error.strerror}; choose another folder") from None


@contextlib.contextmanager
def appearing(goal: Path, force: bool = False) -> Iterator[Path]:
    """A temporary folder to fill, which becomes `goal` when the block ends well and is removed when it does not.

    With `force`, an existing `goal` is swapped out at the very end. Raises `UserError` when the disk is full.
    """
    goal = goal.absolute()
    check_goal(goal, force)
    _remove_leftovers(goal)
    with _full_disk_is_the_users(goal):
        folder, lock = _locked_folder(goal)
    try:
        with _full_disk_is_the_users(goal):  # asked while the folder is there: behind it there is room again
            yield folder
            _sync(folder)
            folder.chmod(0o755)
            _take_place(folder, goal, force)
    finally:
        shutil.rmtree(folder, ignore_errors=True)  # what is left: a failed build, or the old artifact
        os.close(lock)


def _prefix(goal: Path) -> str:
    return f".{goal.name}.partial-"


def _locked_folder(goal: Path) -> tuple[Path, int]:
    while True:
        folder = Path(tempfile.mkdtemp(prefix=_prefix(goal), dir=goal.parent))
        lock = _lock(folder)
        if lock is not None and folder.exists():  # else another run took it for a leftover before we had locked it
            return folder, lock


def _lock(folder: Path) -> int | None:
    """A descriptor that locks the folder for as long as it, or the process, lives; None if someone else does."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _remove_leftovers(goal: Path) -> None:
    for folder in goal.parent.glob(glob.escape(_prefix(goal)) + "*"):
        lock = _lock(folder)
        if lock is not None:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(lock)


def _sync(folder: Path) -> None:
    for root, _, names in os.walk(folder):
        for path in [Path(root), *(Path(root) / name for name in names)]:
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def _take_place(folder: Path, goal: Path, force: bool) -> None:
    if force and goal.exists():
        libc = ctypes.CDLL(None, use_errno=True)
        code = libc.renameat2(_AT_FDCWD, os.fsencode(folder), _AT_FDCWD, os.fsencode(goal), _RENAME_EXCHANGE)
        if code != 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(goal))
    else:
        if os.path.lexists(goal):  # made by someone else meanwhile; an empty folder would be replaced silently
            check_goal(goal, force)
        folder.rename(goal)
    descriptor = os.open(goal.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _full_disk_is_the_users(goal: Path) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        full = isinstance(error, OSError) and error.errno in _FULL
        if full or shutil.disk_usage(goal.parent).free < _FULL_BYTES:
            raise UserError(
                f"expected room for {goal.name} in {goal.parent}, got a full disk; free some space and run again"
            ) from error
        raise
