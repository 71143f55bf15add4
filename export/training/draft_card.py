"""The README.md of a trained draft: what it is for, what it has learnt from, for how long, and how well."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from dovetail.export.sources.base import Source
from dovetail.export.training.material import Split
from dovetail.runtime.evaluation.standard_library import HELD_OUT_ONE_IN
from dovetail.runtime.hardware.cpu import processor_name

if TYPE_CHECKING:
    from dovetail.export.training.draft import DraftRecipe, DraftReport
    from dovetail.export.training.draft_model import DraftModel


def draft_card(source: Source, draft: DraftModel, recipe: DraftRecipe, report: DraftReport, material: Split) -> str:
    """Markdown."""
    config, target = draft.config, source.path.name
    head = f"the {config.head_size:,} tokens that it has learnt most often" if config.head_size else "all tokens"
    whose = "its own" if draft.kind.has_own_head(config) else "the target's"
    depths = range(1, len(report.agreement) + 1)
    return f"""# A draft for {target}

    dovetail-export model {target} --draft THIS_FOLDER -o ARTIFACT

- Kind `{config.kind}`, {config.num_layers} block{"s" if config.num_layers > 1 else ""} of {config.hidden_size}, \
{report.parameters / 1e6:.1f} M trained weights. Its LM head is {whose}, for {head}.
- Learnt from: {material.about}. {len(material.train.ids):,} tokens; what the target itself did not say counts less.
- {report.minutes:.0f} minutes, {report.steps:,} steps of {recipe.windows} windows of {recipe.window} tokens, unrolled \
over {recipe.unroll} levels; {processor_name()}, {len(os.sched_getaffinity(0))} cores.

How often its first choice is the target's, on {len(material.held_out.ids):,} tokens held out by a hash (one in \
{HELD_OUT_ONE_IN}), fed its own features from the second level on:

| level | {" | ".join(map(str, depths))} |
| --- | {" | ".join("---:" for _ in depths)} |
| share | {" | ".join(f"{share:.3f}" for share in report.agreement)} |
"""
