"""A Python to start beside this one. Inside another program (an embedding server) `sys.executable` is that program."""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

_VERSION = f"{sys.version_info.major}.{sys.version_info.minor}"
_NAME = re.compile(r"(python|pypy)[\d.]*t?w?(\.exe)?", re.IGNORECASE)


def python_programs() -> Iterator[tuple[str, dict[str, str]]]:
    """Programs that may be a Python with our packages, the likeliest first, each with the environment to start it in.

    What `multiprocessing.set_executable` was told comes first: that is how an embedding program names its Python. A
    `sys.executable` that is not called a Python is never started.
    """
    from multiprocessing import spawn  # for chat templates only: its import costs some milliseconds

    told = os.fsdecode(spawn.get_executable() or "")
    own = sys.executable or ""
    if told and (told != own or _is_python(own)):
        yield told, dict(os.environ)
    folders = dict.fromkeys([sys.prefix, sys.exec_prefix, sys.base_prefix, sys.base_exec_prefix])
    names = (f"bin/python{_VERSION}", "bin/python3", "python.exe")
    beside = [str(Path(folder, name)) for name in names for folder in folders]
    found = [path for path in [*beside, shutil.which(f"python{_VERSION}")] if path and os.access(path, os.X_OK)]
    for path in dict.fromkeys(found):
        if path != told:
            yield path, os.environ | {"PYTHONPATH": os.pathsep.join(_folders_of_modules())}


def _is_python(path: str) -> bool:
    return _NAME.fullmatch(Path(path).name) is not None


def _folders_of_modules() -> list[str]:
    """Where this process finds modules, but for the folder that the user stands in; last, where it has found us."""
    import dovetail

    here = os.path.realpath(os.getcwd())
    found = [path for path in sys.path if os.path.isabs(path) and os.path.realpath(path) != here]
    return [*found, str(Path(dovetail.__file__).parent.parent)]
