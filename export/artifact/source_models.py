"""The model that an artifact is compiled from, and that a draft is trained for: one that we read ourselves, one that
torch reads, or an IR's. All are asked for the same: the logits to be held against, what a draft reads, the target.

Letters: T tokens, V vocabulary, L feature layers, D hidden size.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import logging
import math
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from dovetail.export.artifact.comparison import (
    TOKENS,
    WINDOW,
    Ids,
    Logits,
    num_tokens,
    torch_logits,
    window_length,
    windows,
)
from dovetail.export.sources.base import Source
from dovetail.export.sources.tensors import Matrix
from dovetail.export.target.compression import Compression
from dovetail.export.target.ir_import import import_target, read_source_ir
from dovetail.export.target.native.families import is_native, read_decoder
from dovetail.export.target.native.reading import hidden_states, write_logits
from dovetail.export.target.native.scheme import scheme
from dovetail.export.target.native.tensor_names import EMBEDDING, HEAD, check_tensors, tensor_shapes
from dovetail.export.target.native.writing import write_native_target
from dovetail.runtime.artifact.manifest import TargetInfo
from dovetail.runtime.errors import UserError

if TYPE_CHECKING:
    from dovetail.export.draft.target_features import Taps

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, slots=True)
class ReferenceLogits:
    """What the source makes of a text, read in windows of `length`: `logits` [T, V]."""

    length: int
    logits: Logits


class SourceModel(Protocol):
    """A target's weights, whatever holds them. `write_target` is the last that it is asked for."""

    def num_check_tokens(self) -> int:
        """On how many tokens of held-out text it is compared."""
        ...

    def reference_logits(self, ids: Ids, scratch: Path) -> ReferenceLogits | None:
        """What the source makes of `ids`, kept in the file `scratch`; None where its weights are taken as they are."""
        ...

    def embedding_and_head(self) -> tuple[Matrix, Matrix]:
        """Both [V, D], in float32; one array twice where they are tied."""
        ...

    def features(self, windows: Sequence[Ids], layers: Sequence[int]) -> list[Matrix]:
        """Of each of the `windows` [T], read alone: the inputs of `layers` side by side and the last hidden state,
        after the final norm, [T, (L + 1) * D].
        """
        ...

    def write_target(self, folder: Path, taps: Taps | None) -> TargetInfo:
        """Write the target, whose hidden states are what `taps` compute, None: the last ones; `folder` is the
        artifact's, under construction.
        """
        ...


def source_model(source: Source, compression: Compression) -> SourceModel:
    """Of what `find_source` found; an IR's weights have their `compression` already. Raises `UserError` where torch is
    needed and not there, or could not read the source.
    """
    if source.layout == "ir":
        return IrModel(source)
    if is_native(source) and not compression.needs_data:
        return NativeModel(source, compression)
    if source.layout == "gguf":
        raise UserError(
            f"expected a GGUF's weights to be stored without data (`int8_share`, `calibration_text`), got these with "
            f"{source.path}; drop them or give the checkpoint"
        )
    if importlib.util.find_spec("optimum") is None:
        what = "4 bits chosen by data" if is_native(source) else f"models of type {source.config.get('model_type')}"
        raise UserError(f"expected optimum-intel, which exports {what}, got none; pip install 'dovetail[convert]'")
    return CheckpointModel(source, compression)


class NativeModel:
    """A checkpoint or a GGUF of a family whose graph we build ourselves, without torch."""

    def __init__(self, source: Source, compression: Compression) -> None:
        self._source, self._compression, self._decoder = source, compression, read_decoder(source)
        check_tensors(source, self._decoder)
        group, decoder = compression.group_size, self._decoder
        widths = decoder.hidden_size, decoder.num_heads * decoder.head_dim  # of the matrices in 4 bits
        odd = [width for width in widths if group not in (None, -1) and width % group]
        if odd:
            raise UserError(
                f"expected a `group_size` that divides every matrix's input size, got {group} for {odd[0]}; choose a "
                f"smaller one"
            )

    @property
    def _window_length(self) -> int:
        window = min((layer.window for layer in self._decoder.layers if layer.window), default=None)
        return window_length(self._decoder.context_length, window, self._decoder.rope_border)

    def num_check_tokens(self) -> int:
        parameters = sum(math.prod(shape) for shape in tensor_shapes(self._decoder).values())
        ways = 1 if self._decoder.rope_border is None else 2  # to read a window: see `text_length`
        return num_tokens(parameters, ways * self._window_length)

    def reference_logits(self, ids: Ids, scratch: Path) -> ReferenceLogits:
        length, border = self._window_length, self._decoder.rope_border
        parts = [part[:-1] for part in windows(ids, length)]
        if border is None:
            hidden = hidden_states(self._source, self._decoder, parts)
        else:  # every second window as of a text beyond the border: see `text_length`
            within = hidden_states(self._source, self._decoder, parts[::2])
            beyond = hidden_states(self._source, self._decoder.beyond_border(), parts[1::2])
            hidden = [rows for pair in itertools.zip_longest(within, beyond) for rows in pair if rows is not None]
        return ReferenceLogits(length, write_logits(self._source, self._decoder, hidden, scratch))

    def embedding_and_head(self) -> tuple[Matrix, Matrix]:
        embedding = self._source.tensors[EMBEDDING].read()
        return embedding, embedding if self._decoder.tied else self._source.tensors[HEAD].read()

    def features(self, windows: Sequence[Ids], layers: Sequence[int]) -> list[Matrix]:
        return hidden_states(self._source, self._decoder, windows, layers)

    def write_target(self, folder: Path, taps: Taps | None) -> TargetInfo:
        weight_format = self._compression.weight_format
        _log.info("target: writing %s as %s", self._source.path, weight_format)
        chosen = scheme(weight_format, self._compression.group_size)
        return write_native_target(self._source, self._decoder, chosen, folder, weight_format, taps)


class CheckpointModel:
    """A checkpoint: torch reads it, then optimum-intel and nncf make the IR."""

    def __init__(self, source: Source, compression: Compression) -> None:
        self._source, self._compression = source, compression
        self._parameters = 0

    def num_check_tokens(self) -> int:
        return num_tokens(sum(math.prod(tensor.shape) for tensor in self._source.tensors.values()), WINDOW)

    @cached_property
    def _torch_model(self) -> Any:
        from dovetail.export.convert.torch_model import load_torch

        return load_torch(self._source.path, as_stored=True, allow_pickle=self._source.allow_pickle)

    def reference_logits(self, ids: Ids, scratch: Path) -> ReferenceLogits:
        model = self._torch_model
        self._parameters = sum(weight.numel() for weight in model.parameters())
        window = getattr(model.config, "sliding_window", None)
        length = window_length(model.config.max_position_embeddings, window)
        return ReferenceLogits(length, torch_logits(model, ids, length, scratch))

    def embedding_and_head(self) -> tuple[Matrix, Matrix]:
        from dovetail.export.convert.torch_model import body_and_head

        embedding, head = (weight.numpy() for weight in body_and_head(self._torch_model)[1:])
        return embedding, head

    def features(self, windows: Sequence[Ids], layers: Sequence[int]) -> list[Matrix]:
        import torch

        from dovetail.export.convert.torch_model import target_features

        return [target_features(self._torch_model, torch.from_numpy(ids)[None], layers)[0].numpy() for ids in windows]

    def write_target(self, folder: Path, taps: Taps | None) -> TargetInfo:
        self.__dict__.pop("_torch_model", None)  # optimum reads the weights anew: two copies need not fit into memory
        from dovetail.export.convert.optimum_export import export_target

        _log.info("target: exporting %s as %s", self._source.path, self._compression.weight_format)
        info = export_target(self._source.path, folder, self._compression, self._source.allow_pickle, taps)
        return dataclasses.replace(info, parameters=self._parameters)


class IrModel:
    """An OpenVINO IR, whose weights and features are read off its graph."""

    def __init__(self, source: Source) -> None:
        self._source = source

    def num_check_tokens(self) -> int:
        return TOKENS

    def reference_logits(self, ids: Ids, scratch: Path) -> None:
        return None

    @cached_property
    def _ir(self) -> Any:
        return read_source_ir(self._source.path)

    def embedding_and_head(self) -> tuple[Matrix, Matrix]:
        from dovetail.export.target.ir_features import embedding_and_head

        return embedding_and_head(self._ir)

    def features(self, windows: Sequence[Ids], layers: Sequence[int]) -> list[Matrix]:
        from dovetail.export.target.ir_features import features

        return [features(self._ir, ids, layers) for ids in windows]

    def write_target(self, folder: Path, taps: Taps | None) -> TargetInfo:
        _log.info("target: taking the IR in %s, weights as they are", self._source.path)
        return import_target(self._source, folder, taps)
