"""A GGUF file in another format of weights, made by llama.cpp itself, in a process of its own.

Usage: python -m dovetail.calibration.bench.gguf_quantizer SRC.gguf OUT.gguf TYPE
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

import click

from dovetail.runtime.errors import UserError
from dovetail.runtime.terminal.console import run


@click.command()
@click.argument("source", metavar="SRC.gguf", type=click.Path(path_type=Path))
@click.argument("out", metavar="OUT.gguf", type=click.Path(path_type=Path))
@click.argument("file_type", metavar="TYPE")
def quantize(source: Path, out: Path, file_type: str) -> None:
    """Write SRC.gguf as TYPE (Q8_0, Q4_0, Q4_K_M, ...), as llama-quantize does. Rows that the type's blocks do not
    divide become what llama.cpp has for them.
    """
    try:
        import llama_cpp
    except ImportError:
        raise UserError("expected the package llama-cpp-python, got none; pip install 'dovetail[bench]'") from None
    number = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{file_type}", None)
    if number is None:
        raise UserError(f"expected a type of llama.cpp, such as Q4_K_M, got {file_type!r:.40}; correct it")
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype, settings.nthread, settings.allow_requantize = number, os.cpu_count() or 1, True
    partial = out.with_name(f".{out.name}.partial")
    code = llama_cpp.llama_model_quantize(os.fsencode(source), os.fsencode(partial), ctypes.byref(settings))
    if code:
        partial.unlink(missing_ok=True)
        raise UserError(f"expected llama.cpp to write {source} as {file_type}, got its error {code}; see above")
    partial.replace(out)


if __name__ == "__main__":
    run(quantize, "python -m dovetail.calibration.bench.gguf_quantizer")
