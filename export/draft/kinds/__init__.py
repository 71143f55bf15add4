"""The kinds of draft, one a file: what comes before the first block, how the kind is trained, how it is published."""

from dovetail.export.draft.kinds.base import DraftKind
from dovetail.export.draft.kinds.dgf import DGF
from dovetail.export.draft.kinds.eagle import EAGLE
from dovetail.export.draft.kinds.eagle3 import EAGLE3
from dovetail.export.draft.kinds.language_model import LANGUAGE_MODEL

KINDS: dict[str, DraftKind] = {kind.name: kind for kind in (DGF, EAGLE, EAGLE3, LANGUAGE_MODEL)}
TRAINED_KINDS = [kind.name for kind in KINDS.values() if kind.unroll_from is not None]
