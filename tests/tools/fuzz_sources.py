"""Damages the given GGUF and safetensors files at random, for some seconds each, and reads them: what the tests do for
240 seeds (test_damaged_files.py), for as many as there is time for.

Usage: PYTHONPATH=tests/support python tests/tools/fuzz_sources.py SECONDS FILE ...
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

from faults.damage import damaged, survives

from dovetail.export.sources.finding import find_source
from dovetail.export.sources.safetensors_file import read_safetensors


def read_all(path: Path) -> None:
    """All numbers in a file."""
    tensors = find_source(path).tensors if path.suffix == ".gguf" else read_safetensors([path])
    for tensor in tensors.values():
        tensor.read()


def main(seconds: float, paths: list[Path]) -> None:
    """Fuzz each file; the first one that is not survived ends the campaign and is kept."""
    for path in paths:
        data, taken, seed, slowest = path.read_bytes(), 0, 1000, 0.0
        # the numbers of a GGUF are behind the last name; those of safetensors behind the header's length
        names = (data.rfind(b".weight") + 100) if path.suffix == ".gguf" else int.from_bytes(data[:8], "little") + 8
        end = time.monotonic() + seconds
        with tempfile.TemporaryDirectory() as folder:
            while time.monotonic() < end:
                case = Path(folder, path.name)
                case.write_bytes(damaged(data, names, seed))
                begin = time.monotonic()
                try:
                    taken += survives(case, read_all)
                except BaseException:
                    Path(f"damaged-{seed}{path.suffix}").write_bytes(case.read_bytes())
                    print(f"{path}: seed {seed}")
                    raise
                slowest = max(slowest, time.monotonic() - begin)
                seed += 1
        print(f"{path.name}: {seed - 1000} damaged files, {taken} read whole, the slowest {slowest:.2f} s", flush=True)


if __name__ == "__main__":
    main(float(sys.argv[1]), [Path(name) for name in sys.argv[2:]])
