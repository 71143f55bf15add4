"""The noise of torch, transformers, optimum and nncf while they trace and convert, silenced while they run and nowhere
else.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import warnings
from collections.abc import Iterator

_LOUD_LOGGERS = (
    "transformers",
    "optimum",
    "nncf",
    "openvino",
    "torch.onnx",
    "torch.export",
    "torch.utils.cpp_extension",
    "onnxscript",
    "onnx_ir",
)


@contextlib.contextmanager
def quiet_torch() -> Iterator[None]:
    """Inside: no warnings, no progress bars of theirs, log lines from errors up."""
    from transformers.utils import logging as transformers_logging

    loggers = [logging.getLogger(name) for name in _LOUD_LOGGERS]
    levels = [logger.level for logger in loggers]
    had_bars = transformers_logging.is_progress_bar_enabled()
    tqdm_before = os.environ.get("TQDM_DISABLE")
    os.environ["TQDM_DISABLE"] = "1"
    transformers_logging.disable_progress_bar()
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):  # nncf draws its bars on stdout
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if had_bars:
            transformers_logging.enable_progress_bar()
        if tqdm_before is None:
            del os.environ["TQDM_DISABLE"]
        else:
            os.environ["TQDM_DISABLE"] = tqdm_before
