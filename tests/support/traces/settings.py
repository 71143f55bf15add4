"""How hypothesis draws the laws' long traces."""

from __future__ import annotations

from hypothesis import HealthCheck, Phase, settings

TRACE_SETTINGS = settings(
    deadline=None,
    database=None,
    derandomize=True,
    phases=[Phase.generate],  # a trace shrinks slowly
    report_multiple_bugs=False,
    suppress_health_check=list(HealthCheck),
)
