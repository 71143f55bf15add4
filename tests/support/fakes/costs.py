"""Prices that no machine has."""

from __future__ import annotations

from dovetail.runtime.policies.costs import Costs

FREE = Costs(
    contexts=(1,),
    nodes=(1, 128),
    widths=(1, 64),
    plain_ms=(1.0,),
    verify_ms=((1.0, 1.0),),
    first_ms=(1e-9,),
    level_ms=((1e-9, 1e-9),),
    text_ms=(0.0,),
    host_ms=0.0,
    host_level_ms=0.0,
    host_node_ms=0.0,
)
"""Prices by which drafting costs nothing: no draft rests, and every tree grows as far as it may."""
