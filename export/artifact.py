"""Writing the artifact: target, draft, tokenizer, checks against torch, manifest; frozen, and there whole or not at
all.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import platform
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from dovetail.export import checks
from dovetail.export.chat_examples import write_chat_examples
from dovetail.export.checkpoint import body_and_head, check_checkpoint, load_torch, read_sizes
from dovetail.export.draft_graph import WeightFormat
from dovetail.export.draft_model import DraftModel, check_fits, load_draft, read_config
from dovetail.export.draft_onnx import TOP_K, export_draft
from dovetail.export.draft_vocabulary import draft_vocabulary
from dovetail.export.folder import appearing, check_goal
from dovetail.export.target import check_weight_format, export_target
from dovetail.runtime import manifest as manifests
from dovetail.runtime import tokenizer_file
from dovetail.runtime.artifact import open_artifact
from dovetail.runtime.console import notice
from dovetail.runtime.errors import ArtifactError, UserError
from dovetail.runtime.manifest import DraftInfo, ExportChecks, FileEntry, Manifest, TargetInfo, TreeShape

DEFAULT_TREE = TreeShape(nodes=12, depth=5, width=4)
NO_TREE = TreeShape(nodes=1, depth=0, width=1)
MODEL_CARD = "README.md"
_TOOLS = ("dovetail", "nncf", "onnx", "openvino", "optimum-intel", "tokenizers", "torch", "transformers")
_READ_ONLY = 0o444

# From the artifact's folder, complete but for its card, and the manifest so far -> the card's text.
CardWriter = Callable[[Path, Manifest], str]


def write_artifact(
    source: Path,
    out: Path,
    *,
    draft: Path | None = None,
    weight_format: str = "int8",
    draft_weight_format: WeightFormat = "int8",
    draft_vocab: int | None = None,
    draft_vocab_texts: Sequence[Path] = (),
    tree: TreeShape | None = None,
    check_text: str | None = None,
    card: CardWriter | None = None,
    name: str | None = None,
    force: bool = False,
) -> Manifest:
    """Compile the checkpoint `source` (and its `draft`) to the artifact folder `out`; returns the manifest.

    `draft_vocab` keeps that many tokens' rows of the draft's LM head, the most frequent ones of `draft_vocab_texts`
    (see `draft_vocabulary`). `check_text` is what the export is compared with torch on (default: held-out files of this
    interpreter's standard library). Raises `UserError` for what the caller can mend; `out` is then as it was before.
    """
    check_checkpoint(source)
    check_weight_format(weight_format)
    check_goal(out, force)
    if draft is not None:
        check_fits(read_config(draft), *read_sizes(source))
    kept = None if draft is None or draft_vocab is None else draft_vocabulary(source, draft_vocab, draft_vocab_texts)
    tokenizer_text = _tokenizer_text(source)
    with appearing(out, force) as folder:
        notice(f"target: exporting {source} as {weight_format}")
        target = export_target(source, folder, weight_format)
        (folder / "tokenizer").mkdir()
        (folder / manifests.TOKENIZER).write_text(tokenizer_text, encoding="utf-8")
        _write_settings(source, folder)
        if (folder / manifests.CHAT_TEMPLATE).is_file():
            write_chat_examples(source, folder)
        model = load_torch(source)
        target = dataclasses.replace(target, parameters=sum(weight.numel() for weight in model.parameters()))
        trained = None if draft is None else _draft_for(model, draft)
        if trained is not None:
            notice("draft: exporting to ONNX")
            if kept is not None:
                trained.keep_tokens(torch.from_numpy(kept))
            (folder / "draft").mkdir()
            export_draft(
                trained,
                folder / manifests.DRAFT_MODEL,
                top_k=min(TOP_K, len(trained.lm_head)),
                weight_format=draft_weight_format,
            )
        notice("checking against torch")
        measured = checks.compare(folder, model, trained, check_text)
        chosen_tree = NO_TREE if trained is None else tree or DEFAULT_TREE
        manifest = _manifest(folder, name or out.name, target, trained, draft_weight_format, chosen_tree, measured)
        if card is not None:
            _write_manifest(folder, manifest)
            (folder / MODEL_CARD).write_text(card(folder, manifest), encoding="utf-8")
            manifest = dataclasses.replace(manifest, files=_entries(folder))
        _write_manifest(folder, manifest)
        for path in folder.rglob("*"):
            path.chmod(0o755 if path.is_dir() else _READ_ONLY)
        open_artifact(folder)
    return manifest


def _draft_for(model: Any, folder: Path) -> DraftModel:
    _, embedding, lm_head = body_and_head(model)
    return load_draft(folder, embedding, lm_head)


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


def _manifest(
    folder: Path,
    name: str,
    target: TargetInfo,
    draft: DraftModel | None,
    draft_weight_format: WeightFormat,
    tree: TreeShape,
    measured: ExportChecks,
) -> Manifest:
    info = None
    if draft is not None:
        config = draft.config
        info = DraftInfo(
            kind=config.kind,
            hidden_size=config.hidden_size,
            vocab_size=config.vocab_size,
            num_layers=config.num_layers,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            top_k=min(TOP_K, len(draft.lm_head)),
            parameters=draft.num_parameters(),
            precision=draft_weight_format,
        )
    return Manifest(
        format_version=manifests.FORMAT_VERSION,
        name=name,
        target=target,
        draft=info,
        default_tree=tree,
        checks=measured,
        tool_versions=tool_versions(),
        files=_entries(folder),
    )


def tool_versions() -> dict[str, str]:
    """Of what made the artifact."""
    return {"python": platform.python_version()} | {tool: importlib.metadata.version(tool) for tool in _TOOLS}


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
