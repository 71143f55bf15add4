"""Draft folders -> `DraftModel`: what `dovetail-export draft` writes (told by `kind` in config.json), and the layouts
that drafts are published in (`kinds/`; docs/drafts.md lists them).
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from dovetail.export.draft.config import check_fits, read_config, vocabulary_sha256
from dovetail.export.draft.kinds import KINDS
from dovetail.export.draft.model import DraftModel, load_draft
from dovetail.export.draft.published import (
    DraftedTarget,
    PublishedDraft,
    Weights,
    check_tokens,
    unexpected_shape,
    with_our_block_names,
)
from dovetail.export.sources.base import Source
from dovetail.export.sources.torch_tensors import read_tensors
from dovetail.runtime.errors import UserError

_REPEATED = re.compile(r"(?:.*\.)?rotary_emb\.inv_freq$|verifier_|t2d$")  # the target's, or made from the config


def read_draft(folder: Path, target: DraftedTarget, *, allow_pickle: bool = False) -> DraftModel:
    """Read a draft folder of any layout for `target`, in float32.

    Raises `UserError` if it is none, lacks tensors or has ones of other shapes, or is not for this target: another
    hidden size, another vocabulary.
    """
    document = _document(folder)
    check_tokenizer(folder, target.tokenizer)
    if "kind" in document:
        check_draft(folder, target.source)
        draft = load_draft(folder, target.embedding, target.lm_head)
        if draft.head_tokens is not None:
            check_tokens(draft.head_tokens, len(target.embedding), folder)
    else:
        tensors = read_tensors(folder, allow_pickle=allow_pickle)
        weights = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
        own = {name: tensor for name, tensor in weights.items() if not _REPEATED.match(name)}
        head_mask = weights.get("t2d")  # which of the target's tokens the head has
        if head_mask is not None and head_mask.shape != target.embedding.shape[:1]:
            raise unexpected_shape("t2d", head_mask.shape, target.embedding.shape[:1], folder)
        draft = _read_published(folder, document, own, target)
    return draft.float().eval()


def check_draft(folder: Path, source: Source) -> None:
    """Raise `UserError` early, without reading weights, if the draft folder can't be for the checkpoint `source`."""
    document = _document(folder)
    tokenizer = Tokenizer.from_str(source.tokenizer)
    check_tokenizer(folder, tokenizer)
    if "kind" in document:
        ours = read_config(folder)
        check_fits(ours, *source.sizes())
        if ours.vocabulary_sha256 not in (None, vocabulary_sha256(tokenizer)):
            raise UserError(
                f"expected a draft trained with the tokenizer of {source.path}, got {folder}, trained with "
                f"another of the same size; train a draft for this target"
            )


def check_tokenizer(folder: Path, expected: Tokenizer) -> None:
    """Raise `UserError` if there is a tokenizer beside the draft that gives tokens other ids than the target's."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        return
    try:
        ours = Tokenizer.from_file(str(path)).get_vocab()
    except Exception as error:  # tokenizers raises nothing more precise
        raise UserError(f"expected a tokenizer in {path}, got: {error!s:.100}; copy the draft again") from None
    theirs = expected.get_vocab()
    if ours != theirs:
        token = min(set(ours.items()) ^ set(theirs.items()), key=lambda item: item[1])[0]
        raise UserError(
            f"expected the target's tokenizer beside the draft, got another in {folder} (the token {token!r:.40} is "
            f"{ours.get(token, 'unknown')} there, {theirs.get(token, 'unknown')} in the target's); choose a draft made "
            f"for this target"
        )


def _document(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(
            f"expected a draft folder with config.json, got {folder} without it; train a draft with "
            f"dovetail-export draft, or download one"
        )
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        assert isinstance(document, dict)
    except (ValueError, AssertionError):
        raise UserError(f"expected {path} to be a JSON object, got something else; copy the draft again") from None
    return document


def _read_published(folder: Path, document: dict[str, Any], weights: Weights, target: DraftedTarget) -> DraftModel:
    published = PublishedDraft(folder, document, weights, target)
    layouts = (layout for kind in KINDS.values() for layout in kind.layouts if layout.matches(published))
    layout = next(layouts, None)
    if layout is None:
        some = ", ".join(sorted(published.names)[:4])
        raise UserError(
            f"expected a draft of kind dgf, eagle, eagle3 or a causal language model, got a folder {folder} with the "
            f"tensors {some} ...; docs/drafts.md lists the layouts"
        )
    parts = layout.read(published)
    draft = DraftModel(parts.config, parts.embedding, parts.lm_head, parts.head_tokens)
    return _filled(draft, with_our_block_names(parts.weights), folder)


def _filled(draft: DraftModel, weights: Weights, folder: Path) -> DraftModel:
    """`draft` with these weights. Raises `UserError` for missing ones, other shapes, and ones that nothing reads."""
    wanted = draft.state_dict()
    missing, strange = sorted(set(wanted) - set(weights)), sorted(set(weights) - set(wanted))
    if missing or strange:
        what = f"no tensor for {missing[0]}" if missing else f"the tensor {strange[0]}, which nothing reads"
        raise UserError(
            f"expected the weights of a draft of kind {draft.config.kind}, got {what} in {folder}; copy the draft "
            f"again, or choose another one"
        )
    for name, tensor in weights.items():
        if tensor.shape != wanted[name].shape:
            raise unexpected_shape(name, tensor.shape, wanted[name].shape, folder)
    draft.load_state_dict({name: tensor.to(wanted[name].dtype) for name, tensor in weights.items()})
    return draft
