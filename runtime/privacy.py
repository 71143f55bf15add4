"""No usage reports: what the engines would tell their makers stays on this machine, unless the user wants otherwise.

OpenVINO reports every import to Google Analytics, and ONNX Runtime (since 1.29) every session to Microsoft; both write
an id into the user's home. `dovetail/__init__.py` calls `send_no_reports` before anything else of ours is imported, so
it holds for the commands, for the library, for an export, and for the processes that these start.
"""

from __future__ import annotations

import os
import sys
from typing import Any

OPT_IN = "DOVETAIL_USAGE_REPORTS"
"""The environment variable that lets the packages report as they do by themselves, if it is 1."""

# Each names the switch that its package reads. They are inherited by the processes that we start.
_SWITCHES = ("ORT_DISABLE_TELEMETRY", "HF_HUB_DISABLE_TELEMETRY")


def send_no_reports() -> None:
    """Switch off the reports of the packages that we run. What the user has set for one of them himself stays."""
    if os.environ.get(OPT_IN) == "1":
        return
    for name in _SWITCHES:
        os.environ.setdefault(name, "1")
    if "onnxruntime" in sys.modules:  # it read its switch when it was imported, by the caller
        sys.modules["onnxruntime"].disable_telemetry_events()
    # OpenVINO and nncf have no switch but a file in the user's home. Where the package that sends for them is missing,
    # they send nothing, so for this process it is.
    sender = sys.modules.get("openvino_telemetry.utils.sender")
    if sender is None:
        sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]  # Python's way to say "not there"
    else:  # imported by the caller, before us
        sender.TelemetrySender.send = _send_nothing


def _send_nothing(*_: Any) -> None:
    """In place of a sender."""
