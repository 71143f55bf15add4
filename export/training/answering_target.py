"""The target that a draft is trained for, as the runtime runs it: it answers questions, and it reads what is learnt
from.
"""

from __future__ import annotations

import logging
from pathlib import Path

from dovetail.export.artifact.writing import write_artifact
from dovetail.export.sources.base import Source
from dovetail.runtime.artifact.opening import open_artifact
from dovetail.runtime.pipeline import Pipeline, load

_CONTEXT = 4096  # at most, of a question with its answer, or of a document

_log = logging.getLogger(__name__)


def open_target(source: Source, work: Path, sequences: int) -> Pipeline:
    """The artifact of `source` without a draft, which is written into `work` if it is not there, opened for so many
    `sequences` in a pass.
    """
    folder = work / "target"
    if not folder.exists():
        _log.info("target: writing it, to learn from what it says")
        write_artifact(str(source.path), folder, allow_pickle=source.allow_pickle)
    context = open_artifact(folder).manifest.target.context_length
    return load(folder, draft="none", sequences=sequences, ctx_size=min(_CONTEXT, context))
