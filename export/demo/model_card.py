"""The model card of the demo artifact: what it was made from, how long, on what, and what was measured."""

from __future__ import annotations

import os
from collections.abc import Mapping

from dovetail.export.training.draft import DraftRecipe, DraftReport
from dovetail.export.training.target import TargetReport
from dovetail.runtime.artifact.manifest import Manifest
from dovetail.runtime.evaluation.standard_library import HELD_OUT_ONE_IN
from dovetail.runtime.hardware.cpu import processor_name


def _where_trained() -> str:
    """The processor, and the cores this process may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return f"{processor_name()}, {cores} core{'s' if cores != 1 else ''}"


def model_card(
    manifest: Manifest,
    target: TargetReport,
    draft: DraftReport,
    recipe: DraftRecipe,
    *,
    train_files: int,
    held_out_files: int,
    measured: Mapping[str, str],
) -> str:
    """The card's text. `measured` are further rows of the figures table, in order."""
    assert manifest.draft is not None
    ours, theirs, checks = manifest.target, manifest.draft, manifest.checks
    before = ""
    if target.warm_start_minutes:
        before = f", after {target.warm_start_minutes:g} minutes spent earlier on the weights it started from"
    rows = {
        "held-out loss of the target": f"{target.held_out_loss:.3f} nats a token (windows of {target.window} tokens)",
        "held-out bits per byte": f"{target.held_out_bits_per_byte:.3f}",
        f"{ours.weight_format} against float32, held out": checks.target_summary(),
    }
    for depth, share in enumerate(draft.agreement, 1):
        rows[f"draft's top choice is the target's, depth {depth}"] = f"{share:.3f}"
    rows |= dict(measured)
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    versions = ", ".join(f"{tool} {version}" for tool, version in manifest.tool_versions.items())
    return f"""# {manifest.name}

A small target and its draft, to show and to test Dovetail with. It has only ever read Python's standard library: it
writes text that looks like Python, and is no use as a programmer.

## What it is

- Target: {ours.architecture}, {ours.parameters / 1e6:.1f} M parameters ({ours.weight_format} weights),
  {ours.num_layers} layers of {ours.hidden_size}, vocabulary {ours.vocab_size} (byte-level BPE),
  context {ours.context_length}.
- Draft: DGF, {theirs.num_layers} blocks, {theirs.parameters / 1e6:.1f} M trained parameters ({theirs.precision}).

## Data and licence

- The Python source of the standard library of CPython {manifest.tool_versions["python"]}, de-duplicated: {train_files}
  files to train on ({target.train_tokens / 1e6:.2f} M tokens), {held_out_files} files held out (about 1 in
  {HELD_OUT_ONE_IN}, by the hash of their path; {target.held_out_tokens / 1e3:.0f} k tokens,
  {target.bytes_per_token:.2f} bytes a token). Nothing else was read.
- That text is under the Python Software Foundation License, version 2.

## Training

- {_where_trained()}.
- Target: {target.minutes:.0f} minutes, {target.steps} steps{before}.
- Draft: {draft.minutes:.0f} minutes, {draft.steps} steps.
- Muon for matrices, AdamW for the rest. The draft's loss is SmoothL1 on the feature plus {recipe.soft_weight:g} times
  the cross-entropy against the target's soft output, unrolled {recipe.unroll} levels over its own features.
- Made by `dovetail-export demo` with {versions}.

## Figures

| what | value |
|---|---|
{table}

All of them on files that neither model was trained on. Under greedy decoding a small target repeats itself, and
repetition is easy to draft: read the accept length beside the share of repeated 8-grams, and prefer the one at
temperature 1.
"""
