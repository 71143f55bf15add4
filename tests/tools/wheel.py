"""Run by `make wheel` where only the built wheel is installed. Proves that the runtime generates text
there, from its own files, with nothing of torch's family loaded or even installed.

Usage: python wheel.py ARTIFACT
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import sys
from pathlib import Path

TORCH_FAMILY = ("torch", "transformers", "optimum", "nncf", "onnx")


def main() -> None:
    from dovetail.runtime.commands import cli

    home = Path(cli.__file__)
    assert "site-packages" in home.parts, f"expected the installed wheel, got {home}"
    for package in TORCH_FAMILY:
        assert importlib.util.find_spec(package) is None, f"expected no {package} beside the runtime"
    checkout = Path(__file__).resolve().parents[2]
    sources = [path for folder in ("export", "runtime", "calibration") for path in (checkout / folder).rglob("*.py")]
    packed = {str(file) for file in importlib.metadata.files("dovetail") or []}
    missing = {f"dovetail/{path.relative_to(checkout)}" for path in sources} - packed
    assert not missing, f"expected every module in the wheel, missing {sorted(missing)}"
    sys.argv = [
        "dovetail",
        "generate",
        sys.argv[1],
        "--file",
        str(Path(sys.argv[1]).with_name("demo_prompt.txt")),
        "--max-new-tokens",
        "32",
        "--seed",
        "1",
        "--stats",
    ]
    code: object = 0
    try:
        cli.main()
    except SystemExit as done:
        code = done.code
    assert not code, f"expected exit 0, got {code}"
    loaded = sorted(set(TORCH_FAMILY) & set(sys.modules))
    assert not loaded, f"expected a run without them, got {loaded}"
    print(f"the wheel works: dovetail {importlib.metadata.version('dovetail')}, no torch")


if __name__ == "__main__":
    main()
