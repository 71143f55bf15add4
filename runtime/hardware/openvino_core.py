"""The one `openvino.Core` of this process."""

from __future__ import annotations

import functools
from typing import Any


@functools.cache
def openvino_core() -> Any:
    """Made at the first call, and kept to the end.

    Several must not overlap. OpenVINO 2026.4 gives the thread that makes one a stack for signals, and at its end puts
    back what was there before: of two Cores, the first of which ends first, that is a stack which is gone. The next
    signal that Python handles, a Ctrl-C, then ends the process with a segmentation fault.
    """
    import openvino as ov

    return ov.Core()
