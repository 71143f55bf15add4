"""Writing the artifact: target, draft, tokenizer, checks against torch, manifest; frozen, and there whole or not at
all.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import logging
import platform
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tokenizers import Tokenizer

from dovetail.export.artifact import comparison as checks
from dovetail.export.artifact.atomic_folder import appearing, check_goal
from dovetail.export.artifact.chat_examples import write_chat_examples
from dovetail.export.sources.base import Source, find_source
from dovetail.export.sources.checkpoint import read_sizes
from dovetail.export.target.compression import Compression
from dovetail.export.target.optimum_export import export_target, import_target
from dovetail.runtime.artifact import manifest as manifests
from dovetail.runtime.artifact.manifest import DraftInfo, FileEntry, Manifest
from dovetail.runtime.artifact.opening import open_artifact
from dovetail.runtime.errors import ArtifactError, UserError
from dovetail.runtime.text import tokenizer_check as tokenizer_file
from dovetail.runtime.trees.shape import TreeShape

if TYPE_CHECKING:
    from dovetail.export.draft.graph_builder import WeightFormat
    from dovetail.export.draft.writing import DraftPlan, ExportedDraft

_log = logging.getLogger(__name__)

DEFAULT_TREE = TreeShape(nodes=12, depth=5, width=4)
NO_TREE = TreeShape(nodes=1, depth=0, width=1)
MODEL_CARD = "README.md"
_TOOLS = ("dovetail", "nncf", "onnx", "openvino", "optimum-intel", "tokenizers", "torch", "transformers")
_READ_ONLY = 0o444

# From the artifact's folder, complete but for its card, and the manifest so far -> the card's text.
CardWriter = Callable[[Path, Manifest], str]


def write_artifact(
    source: Path | str,
    out: Path,
    *,
    revision: str | None = None,
    allow_pickle: bool = False,
    draft: Path | None = None,
    weight_format: str | None = None,
    group_size: int | None = None,
    int8_share: float = 0.0,
    calibration_text: str | None = None,
    draft_weight_format: WeightFormat = "int8",
    draft_vocab: int | None = None,
    draft_vocab_texts: Sequence[Path] = (),
    tree: TreeShape | None = None,
    check_text: str | None = None,
    card: CardWriter | None = None,
    name: str | None = None,
    force: bool = False,
) -> Manifest:
    """Compile `source` (and its `draft`) to the artifact folder `out`; returns the manifest.

    `source` is a checkpoint folder, the folder of an OpenVINO IR, whose weights stay as they are (torch is needed for
    its `draft` alone), or a hub id (at `revision`); see `find_source`. `weight_format` (None: int8), `group_size`,
    `int8_share` and `calibration_text` are those of `Compression`. `draft_vocab` keeps that many tokens' rows of the
    draft's LM head, the most frequent ones of `draft_vocab_texts` (see `draft_vocabulary`). `check_text` is what the
    export is compared with its source on (default: held-out files of this interpreter's standard library). Raises
    `UserError` for what the caller can mend; `out` is then as it was before.
    """
    check_goal(out, force)
    how = Compression(weight_format or "int8", group_size, int8_share)
    found = find_source(source, revision, allow_pickle)
    tokenizer_text = _tokenizer_text(found.folder)
    if calibration_text is not None:
        ids = Tokenizer.from_str(tokenizer_text).encode(calibration_text).ids
        how = dataclasses.replace(how, calibration_ids=tuple(ids))
    if found.is_ir and weight_format is not None:
        raise UserError(
            f"expected no `weight_format` with an IR, got one for {found.folder}; give the checkpoint instead"
        )
    plan = None
    if draft is not None:
        plan = _draft_plan(found, draft, draft_weight_format, draft_vocab, tuple(draft_vocab_texts))
    with appearing(out, force) as folder:
        (folder / "tokenizer").mkdir()
        (folder / manifests.TOKENIZER).write_text(tokenizer_text, encoding="utf-8")
        _write_settings(found.folder, folder)
        if (folder / manifests.CHAT_TEMPLATE).is_file():
            write_chat_examples(found.folder, folder, by_transformers=not found.is_ir)
        ids = checks.held_out_ids(folder, check_text)
        info: DraftInfo | None = None
        exported: ExportedDraft | None = None
        scratch = folder / "scratch"
        if found.is_ir:
            _log.info(f"target: taking the IR in {found.folder}, weights as they are")
            if plan is not None:
                exported = _draft_of_ir(found.folder, folder, ids, plan)
            info, taps = (None, None) if exported is None else (exported.info, exported.taps)
            target = import_target(found.folder, folder, taps)
            length = checks.window_length(target.context_length, target.sliding_window)
            agreement = None if exported is None else exported.agreement
            reading = checks.Reading(ids, length, draft_agreement=agreement)
        else:
            parameters, exported, reading = _torch_side(found, folder, ids, plan, scratch)
            _log.info(f"target: exporting {found.folder} as {how.weight_format}")
            info, taps = (None, None) if exported is None else (exported.info, exported.taps)
            target = export_target(found.folder, folder, how, allow_pickle, taps)
            target = dataclasses.replace(target, parameters=parameters)
        measured = checks.compare(folder, target, reading)
        scratch.unlink(missing_ok=True)
        chosen_tree = NO_TREE if info is None else tree or DEFAULT_TREE
        manifest = Manifest(
            format_version=manifests.FORMAT_VERSION,
            name=name or out.name,
            target=target,
            draft=info,
            default_tree=chosen_tree,
            checks=measured,
            tool_versions=tool_versions(),
            files=_entries(folder),
        )
        if card is not None:
            _write_manifest(folder, manifest)
            (folder / MODEL_CARD).write_text(card(folder, manifest), encoding="utf-8")
            manifest = dataclasses.replace(manifest, files=_entries(folder))
        _write_manifest(folder, manifest)
        for path in folder.rglob("*"):
            path.chmod(0o755 if path.is_dir() else _READ_ONLY)
        open_artifact(folder)
    return manifest


def _draft_plan(
    found: Source, draft: Path, weight_format: WeightFormat, vocab: int | None, texts: tuple[Path, ...]
) -> DraftPlan:
    from dovetail.export.draft.layouts import check_draft
    from dovetail.export.draft.writing import DraftPlan

    read_sizes(found.folder)
    check_draft(draft, found.folder)
    return DraftPlan(draft, weight_format, vocab, texts, found.allow_pickle)


def _torch_side(
    found: Source, folder: Path, ids: checks.Ids, plan: DraftPlan | None, scratch: Path
) -> tuple[int, ExportedDraft | None, checks.Reading]:
    """All that needs the torch model, which is gone when this returns: (its number of weights, the draft as exported,
    what torch makes of `ids`).
    """
    from dovetail.export.sources.checkpoint import load_torch

    model = load_torch(found.folder, as_stored=True, allow_pickle=found.allow_pickle)
    parameters = sum(weight.numel() for weight in model.parameters())
    length = checks.window_length(model.config.max_position_embeddings, getattr(model.config, "sliding_window", None))
    logits = checks.torch_logits(model, ids, length, scratch)
    exported = None
    if plan is not None:
        import torch

        from dovetail.export.draft.layouts import Target
        from dovetail.export.draft.target_features import target_features
        from dovetail.export.draft.writing import write_draft
        from dovetail.export.sources.checkpoint import body_and_head

        def features(ids: checks.Ids, layers: tuple[int, ...]) -> checks.Logits:
            read: checks.Logits = target_features(model, torch.from_numpy(ids)[None], layers)[0].numpy()
            return read

        _log.info("draft: exporting to ONNX")
        target = Target(found.folder, model.config, *body_and_head(model)[1:])
        exported = write_draft(plan, folder / manifests.DRAFT_MODEL, target, features, ids)
    agreement = None if exported is None else exported.agreement
    return parameters, exported, checks.Reading(ids, length, logits, agreement)


def _draft_of_ir(source: Path, folder: Path, ids: checks.Ids, plan: DraftPlan) -> ExportedDraft:
    """The draft for a target whose weights and features are read off its graph."""
    import torch
    from transformers import AutoConfig

    from dovetail.export.draft.layouts import Target
    from dovetail.export.draft.writing import write_draft
    from dovetail.export.target.ir_features import embedding_and_head, features
    from dovetail.export.target.optimum_export import read_source_ir

    model = read_source_ir(source)
    config = AutoConfig.from_pretrained(source, local_files_only=True, trust_remote_code=False)
    _log.info("draft: exporting to ONNX")
    target = Target(source, config, *map(torch.from_numpy, embedding_and_head(model)))
    return write_draft(
        plan, folder / manifests.DRAFT_MODEL, target, lambda ids, layers: features(model, ids, layers), ids
    )


def _tokenizer_text(source: Path) -> str:
    text = (source / "tokenizer.json").read_text(encoding="utf-8")
    try:
        document = json.loads(text)
    except ValueError as error:
        raise UserError(f"expected {source}/tokenizer.json to be JSON, got {error}; save the tokenizer again") from None
    try:
        tokenizer_file.check(document)
    except ArtifactError as error:
        raise UserError(str(error)) from None
    return text


def _write_settings(source: Path, folder: Path) -> None:
    """generation_config.json (with the ids that end a text, wherever the checkpoint keeps them) and the chat template,
    if any.
    """
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    path = source / "generation_config.json"
    settings = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    for key in ("bos_token_id", "eos_token_id"):
        if settings.get(key) is None and config.get(key) is not None:
            settings[key] = config[key]
    (folder / manifests.GENERATION_CONFIG).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    template = source / "chat_template.jinja"
    if template.is_file():
        shutil.copyfile(template, folder / manifests.CHAT_TEMPLATE)
        return
    settings_path = source / "tokenizer_config.json"  # where older checkpoints keep it
    inline = (
        json.loads(settings_path.read_text(encoding="utf-8")).get("chat_template") if settings_path.is_file() else None
    )
    if isinstance(inline, str):
        (folder / manifests.CHAT_TEMPLATE).write_text(inline, encoding="utf-8")


def tool_versions() -> dict[str, str]:
    """Of what made the artifact."""
    tools = {}
    for tool in _TOOLS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # an IR needs few of them
            tools[tool] = importlib.metadata.version(tool)
    return {"python": platform.python_version()} | tools


def _entries(folder: Path) -> dict[str, FileEntry]:
    entries = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = path.relative_to(folder).as_posix()
        if name != manifests.MANIFEST_NAME:
            with path.open("rb") as file:
                entries[name] = FileEntry(path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest())
    return entries


def _write_manifest(folder: Path, manifest: Manifest) -> None:
    (folder / manifests.MANIFEST_NAME).write_text(manifests.dumps(manifest), encoding="utf-8")
