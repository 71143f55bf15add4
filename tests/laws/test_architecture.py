"""Proves: runtime and calibration import nothing that the runtime install lacks, importing them does no work, and the
lint rule that guards this bites; and that what `dovetail-export model` is made of does without torch.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from processes.lean_process import TORCH_FAMILY as NOT_FOR_EXPORT
from processes.lean_process import run_without

ROOT = Path(__file__).resolve().parents[2]
TORCH_FAMILY = {"torch", "torchvision", "transformers", "optimum", "nncf", "onnx", "onnxscript", "safetensors"}
FORBIDDEN = {
    "runtime": TORCH_FAMILY | {"dovetail.export", "dovetail.calibration"},
    "calibration": TORCH_FAMILY | {"dovetail.export"},
    "export": {"dovetail.calibration"},
}
# What exports a checkpoint natively, with its draft. `export/convert`, which they may call, is where torch is.
LEAN = ("export/sources", "export/target/native", "export/draft")
# transformers is one of the engines that a benchmark measures; it runs in a process of its own.
MAY_IMPORT_TORCH = ROOT / "calibration" / "bench" / "peers" / "transformers.py"
HEAVY = {"numpy", "openvino", "onnxruntime", "tokenizers", "rich", "torch", "asyncio"}


def imports(tree: ast.AST, package: str) -> Iterator[str]:
    """Absolute names of all that a file of the folder `package` imports, at its top or anywhere inside."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = ".".join(
                filter(None, ["dovetail" if node.level else "", package if node.level == 1 else "", node.module])
            )
            yield from (f"{module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name | ast.Attribute):
            name = node.func.id if isinstance(node.func, ast.Name) else node.func.attr
            if name in ("import_module", "__import__") and node.args and isinstance(node.args[0], ast.Constant):
                yield str(node.args[0].value)


def is_under(name: str, forbidden: set[str]) -> bool:
    return any(name == root or name.startswith(root + ".") for root in forbidden)


@pytest.mark.parametrize("package", FORBIDDEN)
def test_imports_point_one_way(package: str) -> None:
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    for path in files:
        forbidden = FORBIDDEN[package] - (TORCH_FAMILY if path == MAY_IMPORT_TORCH else set())
        found = [name for name in imports(ast.parse(path.read_text()), package) if is_under(name, forbidden)]
        assert not found, f"{path.relative_to(ROOT)} imports {found}"


@pytest.mark.parametrize("folder", LEAN)
def test_the_export_does_without_torch(folder: str) -> None:
    """No file names a package of the torch family, and all of them can be imported where there is none."""
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files
    for path in files:
        found = [name for name in imports(ast.parse(path.read_text()), folder) if is_under(name, set(NOT_FOR_EXPORT))]
        assert not found, f"{path.relative_to(ROOT)} imports {found}"
    names = [".".join(("dovetail", *path.relative_to(ROOT).with_suffix("").parts)) for path in files]
    done = run_without(NOT_FOR_EXPORT, f"import {', '.join(names)}")
    assert done.returncode == 0, done.stderr


def test_the_lean_process_lacks_torch() -> None:
    done = run_without(NOT_FOR_EXPORT, "import dovetail.export.training.draft_model")
    assert done.stderr.endswith("ModuleNotFoundError: No module named 'torch'\n")


@pytest.mark.parametrize(
    "line",
    [
        "import torch",
        "def f():\n    from torch.nn import Linear",
        "import importlib\nimportlib.import_module('onnx')",
        "from dovetail import export",
        "from .. import export",
        "from ..export.cli import main",
    ],
)
def test_the_scan_sees_it(line: str) -> None:
    assert any(is_under(name, FORBIDDEN["runtime"]) for name in imports(ast.parse(line), "runtime"))


def test_the_scan_sees_no_ghosts() -> None:
    allowed = "import onnxruntime\nfrom dovetail.runtime import exporter\nfrom . import manifest"
    assert not any(is_under(name, FORBIDDEN["runtime"]) for name in imports(ast.parse(allowed), "runtime"))


@pytest.mark.parametrize("package", ["runtime", "calibration"])
@pytest.mark.parametrize("module", ["torch", "transformers", "optimum.intel", "nncf", "onnx"])
def test_the_lint_rule_bites(package: str, module: str) -> None:
    command = [sys.executable, "-m", "ruff", "check", "--stdin-filename", f"{package}/planted.py", "-"]
    done = subprocess.run(command, input=f"import {module}\n", capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 1
    assert "TID251" in done.stdout


@pytest.mark.parametrize("module", ["dovetail.runtime", "dovetail.runtime.commands.cli", "dovetail.calibration"])
def test_importing_does_no_work(module: str) -> None:
    code = f"import sys, {module}; print(sorted({HEAVY!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
    assert done.stderr == ""


def test_the_command_answers_without_the_engines() -> None:
    code = (
        "import sys\nfrom dovetail.runtime.commands.cli import main\nsys.argv = ['dovetail', '--help']\n"
        f"try:\n    main()\nfinally:\n    print(sorted({HEAVY!r} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("\n[]\n")
