"""An artifact as far as names, sizes and hashes go: the manifest is true, the model files are any bytes."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from dovetail.runtime.artifact import manifest

DRAFT = manifest.DraftInfo("dgf", 64, 1000, 2, 2, 16, 10, 1000, "float16")


def write_artifact(root: Path, files: Mapping[str, bytes], *, vocab_size: int = 1000) -> Path:
    """Write `files` and their manifest into the folder `root`; a draft is described when its file is among them."""
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    described = manifest.Manifest(
        format_version=manifest.FORMAT_VERSION,
        name="plain",
        target=manifest.TargetInfo("llama", 64, 2, vocab_size, 2048, 1000, "int8"),
        draft=DRAFT if manifest.DRAFT_MODEL in files else None,
        default_tree=manifest.TreeShape(12, 6, 4),
        checks=manifest.ExportChecks(100, 1e-3, 0.99, 0.97),
        tool_versions={"openvino": "2026.4.1"},
        files={name: manifest.FileEntry(len(data), hashlib.sha256(data).hexdigest()) for name, data in files.items()},
    )
    (root / manifest.MANIFEST_NAME).write_text(manifest.dumps(described))
    return root
