"""Writing the artifact: target, draft, tokenizer, checks against its source, manifest; frozen, and there whole or not
at all.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import platform
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tokenizers import Tokenizer

from dovetail.export.artifact import comparison as checks
from dovetail.export.artifact.atomic_folder import appearing, check_goal
from dovetail.export.artifact.chat_examples import write_chat_examples
from dovetail.export.artifact.chat_templates import write_chat_templates
from dovetail.export.artifact.generation_settings import usable_generation_config
from dovetail.export.artifact.source_models import ReferenceLogits, SourceModel, source_model
from dovetail.export.sources.base import Source
from dovetail.export.sources.finding import find_source
from dovetail.export.target.compression import Compression
from dovetail.export.tokenizers.checking import check_tokenizers
from dovetail.export.tokenizers.openvino_tokenizer import write_openvino_tokenizer
from dovetail.runtime.artifact import manifest as manifests
from dovetail.runtime.artifact.manifest import FileEntry, Manifest, TargetInfo
from dovetail.runtime.artifact.opening import open_artifact
from dovetail.runtime.errors import UserError
from dovetail.runtime.text.tokenizer import load_tokenizer
from dovetail.runtime.trees.shape import TreeShape

if TYPE_CHECKING:
    from dovetail.export.draft.graph_builder import WeightFormat
    from dovetail.export.draft.writing import DraftSettings, ExportedDraft

DEFAULT_TREE = TreeShape(nodes=12, depth=5, width=4)
NO_TREE = TreeShape(nodes=1, depth=0, width=1)
MODEL_CARD = "README.md"
_TOOLS = {  # distribution -> module
    "dovetail": "dovetail",
    "gguf": "gguf",
    "nncf": "nncf",
    "numpy": "numpy",
    "onnx": "onnx",
    "openvino": "openvino",
    "openvino-tokenizers": "openvino_tokenizers",
    "optimum-intel": "optimum.intel",
    "safetensors": "safetensors",
    "tokenizers": "tokenizers",
    "torch": "torch",
    "transformers": "transformers",
}
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

    `source` is a checkpoint folder, a GGUF file, the folder of an OpenVINO IR, whose weights stay as they are, or a hub
    id (at `revision`); see `find_source`. `draft` is a draft folder, or the GGUF file of a language model.
    `weight_format` (None: keep of a GGUF's blocks, else int8), `group_size`, `int8_share` and `calibration_text` are
    those of `Compression`. `draft_vocab` keeps that many tokens' rows of the draft's LM head, the most frequent ones of
    `draft_vocab_texts` (see `draft_vocabulary`).
    `check_text` is what the export is compared with its source on (default: held-out files of this interpreter's
    standard library). Raises `UserError` for what the caller can mend; `out` is then as it was before.
    """
    check_goal(out, force)
    origin = find_source(source, revision, allow_pickle)
    compression = Compression(weight_format or _default_format(origin), group_size, int8_share)
    tokenizer = Tokenizer.from_str(origin.tokenizer)
    if calibration_text is not None:
        ids = tokenizer.encode(calibration_text).ids
        compression = dataclasses.replace(compression, calibration_ids=tuple(ids))
    if origin.layout == "ir" and weight_format is not None:
        raise UserError(
            f"expected no `weight_format` with an IR, got one for {origin.path}; give the checkpoint instead"
        )
    if compression.weight_format == "keep" and _default_format(origin) != "keep":
        raise UserError(
            f"expected a GGUF with `weight_format` keep, got {origin.path}, whose weights have no blocks; drop it"
        )
    settings = None
    if draft is not None:
        settings = _draft_settings(origin, draft, draft_weight_format, draft_vocab, tuple(draft_vocab_texts))
    origin = dataclasses.replace(origin, generation_config=usable_generation_config(origin))
    with appearing(out, force) as folder:
        (folder / "tokenizer").mkdir()
        (folder / manifests.TOKENIZER).write_text(origin.tokenizer, encoding="utf-8")
        _write_settings(origin, folder)
        if (folder / manifests.CHAT_TEMPLATE).is_file():
            write_chat_examples(origin, folder)
        model, scratch = source_model(origin, compression), folder / "scratch"
        ids = checks.held_out_ids(tokenizer, check_text, model.num_check_tokens())
        reference = model.reference_logits(ids, scratch)
        exported = None if settings is None else _write_draft(model, origin, settings, folder, ids)
        target = model.write_target(folder, None if exported is None else exported.taps)
        _write_genai_files(origin, folder / "target")
        measured = checks.compare(folder, target, _reading(ids, target, reference, exported))
        scratch.unlink(missing_ok=True)
        info = None if exported is None else exported.info
        manifest = Manifest(
            format_version=manifests.FORMAT_VERSION,
            name=name or out.name,
            target=target,
            draft=info,
            default_tree=NO_TREE if info is None else tree or DEFAULT_TREE,
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
        load_tokenizer(open_artifact(folder))  # the runtime's own reader, of every part
    return manifest


def _draft_settings(
    source: Source, draft: Path, weight_format: WeightFormat, vocab: int | None, texts: tuple[Path, ...]
) -> DraftSettings:
    from dovetail.export.draft.layouts import check_draft
    from dovetail.export.draft.writing import DraftSettings

    check_draft(draft, source)
    return DraftSettings(draft, weight_format, vocab, texts, source.allow_pickle)


def _write_draft(
    model: SourceModel, source: Source, settings: DraftSettings, folder: Path, ids: checks.Ids
) -> ExportedDraft:
    """Raises `UserError` if it is for another target."""
    from dovetail.export.draft.published import DraftedTarget
    from dovetail.export.draft.writing import write_draft

    target = DraftedTarget(source, *model.embedding_and_head())
    path = folder / manifests.DRAFT_MODEL
    return write_draft(settings, path, target, lambda ids, layers: model.features([ids], layers)[0], ids)


def _reading(
    ids: checks.Ids, target: TargetInfo, reference: ReferenceLogits | None, exported: ExportedDraft | None
) -> checks.Reading:
    agreement = None if exported is None else exported.agreement
    if reference is None:
        length = checks.window_length(target.context_length, target.sliding_window, target.rope_border)
        return checks.Reading(ids, length, draft_agreement=agreement)
    return checks.Reading(ids, reference.length, reference.logits, agreement)


def _write_genai_files(source: Source, target: Path) -> None:
    """What OpenVINO GenAI wants beside the target's graph. Our runtime reads none of it. Tokenizers that an IR has
    brought along stay where they give our ids.
    """
    if not _brings_our_tokenizer(source, target):
        template = source.chat_templates.get("default")
        write_openvino_tokenizer(source.tokenizer, source.special_tokens, template, target)
        check_tokenizers(source.tokenizer, target)
    for name, settings in (("config.json", source.config), ("generation_config.json", source.generation_config)):
        (target / name).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def _brings_our_tokenizer(source: Source, target: Path) -> bool:
    if source.layout != "ir" or not (target / "openvino_tokenizer.xml").is_file():
        return False
    try:
        check_tokenizers(source.tokenizer, target)
    except UserError:  # another one, or one that OpenVINO's own conversion made wrongly
        return False
    return True


def _default_format(source: Source) -> str:
    """A GGUF's blocks are kept; what has 16 bits or more gets 8."""
    return "keep" if any(tensor.has_blocks for tensor in source.tensors.values()) else "int8"


def _write_settings(source: Source, folder: Path) -> None:
    """What ends a text and how it is sampled by default; the chat templates, if there are any."""
    text = json.dumps(source.generation_config, indent=2) + "\n"
    (folder / manifests.GENERATION_CONFIG).write_text(text, encoding="utf-8")
    write_chat_templates(source.chat_templates, folder)


def tool_versions() -> dict[str, str]:
    """Of what made the artifact."""
    tools = {}
    for tool, module in _TOOLS.items():
        if module in sys.modules:  # installed or not: it took no part
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):
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
