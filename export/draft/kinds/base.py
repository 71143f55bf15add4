"""What a kind of draft is: everything by which one differs from another, as one record.

Its first stage makes the input of the first block from the target's feature h and the token's embedding e. The stage
gives what the first block adds to (its residual stream), and what its attention reads, None where that is the normed
stream. As a torch module, for training: `export/training/fusions.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from dovetail.export.draft.config import DraftConfig, config_for
from dovetail.export.draft.graph_builder import GraphBuilder, Value
from dovetail.export.draft.published import PublishedDraft
from dovetail.export.draft.weights import DraftWeights
from dovetail.export.target.native.decoder import Decoder


class FusionWriter(Protocol):
    """Writes a first stage: from features (None for a kind that reads none) and embeddings [T, D] to (stream, what
    attention reads or None). The tensors are the draft's `part("fusion.")`.
    """

    def __call__(
        self, graph: GraphBuilder, draft: DraftWeights, features: Value | None, embeddings: Value
    ) -> tuple[Value, Value | None]: ...


def _no_layers(num_layers: int) -> tuple[int, ...]:
    return ()


@dataclasses.dataclass(frozen=True, slots=True)
class PublishedLayout:
    """A layout that drafts of a kind are published in: how one is told from others, and how it is read.

    `read` raises `UserError` for a draft that is damaged or not for the target.
    """

    matches: Callable[[PublishedDraft], bool]
    read: Callable[[PublishedDraft], DraftWeights]


@dataclasses.dataclass(frozen=True, slots=True)
class DraftKind:
    """One kind of draft. A new one is a file with such a record in this folder, a line in `KINDS`, and its name in the
    runtime's `DRAFT_KINDS`; one that is trained, its first stage as a torch module besides.
    """

    name: str
    fusion_shapes: Callable[[DraftConfig], Mapping[str, tuple[int, ...]]]
    write_fusion: FusionWriter
    layouts: tuple[PublishedLayout, ...]
    reads_features: bool = True  # False: a language model of its own, which reads tokens alone
    default_feature_layers: Callable[[int], tuple[int, ...]] = _no_layers  # of a target with so many layers
    first_block_reads_pair: bool = False  # its attention reads token and feature side by side, 2 D numbers
    first_block_norm: bool = False  # it has an input norm, as all other blocks do
    output_norm: bool = False  # between the last block and the LM head
    own_head: bool = False  # the LM head is trained with the draft, and may have fewer tokens than the target's
    imitates_features: bool = False  # its output is trained to be the target's next feature, not only to say its token
    unroll_from: float | None = None
    """From this share of the training on, the draft is fed its own features for several levels; before it for one,
    which is over twice as fast. None: this kind is not trained here.
    """

    def has_own_head(self, config: DraftConfig) -> bool:
        """Whether the LM head of a draft with this config belongs to it, and is not the target's."""
        return self.own_head and config.head_size is not None

    def config_for(self, target: Decoder, num_blocks: int, **more: Any) -> DraftConfig:
        """A draft of this kind for a target; see `config.config_for`."""
        more.setdefault("feature_layers", self.default_feature_layers(target.num_layers))
        return config_for(target, num_blocks, self.name, **more)
