"""Python in a process of its own that lacks some packages, whatever is installed here."""

from __future__ import annotations

import subprocess
import sys

TORCH_FAMILY = ("torch", "torchvision", "transformers", "optimum", "nncf")

_WITHOUT = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {missing!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Missing())
"""
EXPORT = "from dovetail.export.commands.cli import main\nmain()"


def run_without(missing: tuple[str, ...], program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """What `program` with these arguments did where the packages `missing` are not there."""
    command = [sys.executable, "-c", _WITHOUT.format(missing=missing) + program, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=180)
