"""Draft folders and files -> `DraftWeights`: what `dovetail-export draft` writes (told by `kind` in config.json), and
the layouts that drafts are published in (`kinds/`; docs/drafts.md lists them).
"""

from __future__ import annotations

import re
from pathlib import Path

from tokenizers import Tokenizer

from dovetail.export.draft.config import check_fits, read_config, vocabulary_sha256
from dovetail.export.draft.files import draft_source, read_arrays, read_trained
from dovetail.export.draft.kinds import KINDS
from dovetail.export.draft.published import DraftedTarget, PublishedDraft, unexpected_shape
from dovetail.export.draft.shapes import misfit
from dovetail.export.draft.weights import DraftWeights
from dovetail.export.sources.base import Source
from dovetail.runtime.errors import UserError

_REPEATED = re.compile(r"(?:.*\.)?rotary_emb\.inv_freq$|verifier_|t2d$")  # the target's, or made from the config


def read_draft(path: Path, target: DraftedTarget, *, allow_pickle: bool = False) -> DraftWeights:
    """Read a draft for `target`: a folder of any layout, or the GGUF file of a language model. `allow_pickle` is that
    of `read_arrays`.

    Raises `UserError` if it is none, lacks tensors or has ones of other shapes, or is not for this target: another
    hidden size, another vocabulary.
    """
    draft = draft_source(path)
    _check_source(draft, target.source, target.tokenizer)
    if "kind" in draft.config:
        return read_trained(draft, target.embedding, target.lm_head)
    arrays = read_arrays(draft, allow_pickle)
    tensors = {name.removeprefix("model."): array for name, array in arrays.items()}
    head_mask = tensors.get("t2d")  # which of the target's tokens the head has
    if head_mask is not None and head_mask.shape != target.embedding.shape[:1]:
        raise unexpected_shape("t2d", head_mask.shape, target.embedding.shape[:1], path)
    own = {name: array for name, array in tensors.items() if not _REPEATED.match(name)}
    return _read_published(PublishedDraft(draft, own, target))


def check_draft(path: Path, target: Source) -> None:
    """Raise `UserError` early, without reading weights, if the draft at `path` can't be for the checkpoint `target`."""
    _check_source(draft_source(path), target, Tokenizer.from_str(target.tokenizer))


def _check_source(draft: Source, target: Source, tokenizer: Tokenizer) -> None:
    if draft.tokenizer:
        _check_tokenizer(draft, tokenizer)
    if "kind" in draft.config:
        ours = read_config(draft.path)
        check_fits(ours, *target.sizes())
        if ours.vocabulary_sha256 not in (None, vocabulary_sha256(tokenizer)):
            raise UserError(
                f"expected a draft trained with the tokenizer of {target.path}, got {draft.path}, trained with "
                f"another of the same size; train a draft for this target"
            )


def _check_tokenizer(draft: Source, expected: Tokenizer) -> None:
    """Raise `UserError` if the draft's tokenizer gives tokens other ids than the target's. One of the two may have more
    tokens behind the other's last: llama.cpp names the rows that pad an embedding.
    """
    where = draft.path / "tokenizer.json" if draft.layout == "checkpoint" else draft.path
    try:
        ours = Tokenizer.from_str(draft.tokenizer).get_vocab()
    except Exception as error:  # tokenizers raises nothing more precise
        raise UserError(f"expected a tokenizer in {where}, got: {error!s:.100}; copy the draft again") from None
    theirs = expected.get_vocab()
    last = min(max(vocabulary.values(), default=0) for vocabulary in (ours, theirs))
    different = [(i, token) for token, i in set(ours.items()) ^ set(theirs.items()) if i <= last]
    if different:
        _, token = min(different)
        raise UserError(
            f"expected the target's tokenizer beside the draft, got another in {draft.path} (the token {token!r:.40} "
            f"is {ours.get(token, 'unknown')} there, {theirs.get(token, 'unknown')} in the target's); choose a draft "
            f"made for this target"
        )


def _read_published(published: PublishedDraft) -> DraftWeights:
    layouts = (layout for kind in KINDS.values() for layout in kind.layouts if layout.matches(published))
    layout = next(layouts, None)
    path = published.path
    if layout is None:
        some = ", ".join(sorted(published.names)[:4])
        raise UserError(
            f"expected a draft of kind dgf, eagle, eagle3 or a causal language model, got {path} with the tensors "
            f"{some} ...; docs/drafts.md lists the layouts"
        )
    draft = layout.read(published)
    problem = misfit(draft.config, draft.tensors)
    if problem is not None:
        raise UserError(
            f"expected {problem[0]}, got {problem[1]} in {path}; copy the draft again, or choose another one"
        )
    return draft
