"""What lies in a draft's folder or file: its config, its tokenizer, its tensors as arrays."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dovetail.export.draft.config import check_fits, read_config
from dovetail.export.draft.kinds import KINDS
from dovetail.export.draft.published import check_tokens
from dovetail.export.draft.shapes import misfit
from dovetail.export.draft.weights import DraftWeights
from dovetail.export.sources.base import Source
from dovetail.export.sources.checkpoint import weight_files
from dovetail.export.sources.finding import find_source
from dovetail.export.sources.safetensors_file import read_safetensors
from dovetail.export.sources.settings import read_object
from dovetail.export.sources.tensors import Matrix
from dovetail.runtime.errors import UserError

_WHOLE_NUMBERS = ("head_tokens", "d2t", "t2d")


def draft_source(path: Path) -> Source:
    """The draft at `path` as a source: a GGUF file, or a folder with config.json, where it may lack a tokenizer (an
    empty text then) and its tensors are left to `read_arrays`. Raises `UserError` if it is neither.
    """
    if path.is_file() and path.suffix == ".gguf":
        return find_source(path)
    if not (path / "config.json").is_file():
        raise UserError(
            f"expected a draft folder with config.json or a .gguf file, got {path}, which is none; train a draft with "
            f"dovetail-export draft, or download one"
        )
    try:
        tokenizer = (path / "tokenizer.json").read_text(encoding="utf-8")
    except FileNotFoundError:
        tokenizer = ""
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"expected a tokenizer in {path / 'tokenizer.json'}, got: {error}; copy it again") from None
    return Source(
        path=path,
        layout="checkpoint",
        config=read_object(path / "config.json"),
        tensors={},
        tokenizer=tokenizer,
        generation_config={},
        special_tokens={},
        chat_templates={},
    )


def read_arrays(source: Source, allow_pickle: bool = False) -> dict[str, NDArray[Any]]:
    """The tensors of a draft by name, in float32, but for lists of tokens. `allow_pickle` reads pickles where there
    is nothing else, which takes torch.

    Raises `UserError` for a folder without weights, and for damaged ones.
    """
    stored = source.tensors
    if not stored:
        paths = weight_files(source.path, allow_pickle)
        if paths[0].suffix != ".safetensors":
            from dovetail.export.convert.pickles import read_pickles

            pickled = read_pickles(paths)
            return {n: a if n in _WHOLE_NUMBERS else a.astype(np.float32, copy=False) for n, a in pickled.items()}
        stored = read_safetensors(paths)
    return {name: tensor.raw if name in _WHOLE_NUMBERS else tensor.read() for name, tensor in stored.items()}


def read_trained(source: Source, embedding: Matrix, lm_head: Matrix) -> DraftWeights:
    """Read a draft folder that `dovetail-export draft` wrote, for the target whose embedding [V, D] and LM head [V, D]
    are given. Raises `UserError` if it is not one, or not for this target.
    """
    config = read_config(source.path)
    check_fits(config, *embedding.shape)
    tensors = read_arrays(source)
    head, head_tokens = lm_head, tensors.pop("head_tokens", None) if config.head_size is not None else None
    if head_tokens is not None:
        check_tokens(head_tokens, len(lm_head), source.path)
    if KINDS[config.kind].has_own_head(config):
        head = tensors.pop("lm_head", np.empty(0))
    elif head_tokens is not None:
        head = lm_head[head_tokens]
    problem = misfit(config, tensors)
    rows = config.vocab_size if config.head_size is None else config.head_size
    if problem is None and head.shape != (rows, config.hidden_size):
        problem = f"lm_head of shape {(rows, config.hidden_size)}", f"{head.shape}"
    shape = (config.vocab_size,) if head_tokens is None else head_tokens.shape
    if problem is None and shape != (rows,):
        problem = f"head_tokens of shape {(rows,)}", "none" if head_tokens is None else f"{shape}"
    if problem is not None:
        raise UserError(
            f"expected {source.path}/model.safetensors to fit its config, with {problem[0]}, got {problem[1]}; train "
            f"the draft again"
        )
    return DraftWeights(config, tensors, embedding, head, head_tokens)
