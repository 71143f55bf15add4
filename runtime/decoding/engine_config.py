"""How the models are run: everything that `load` takes, beside where the artifact lies and whether it is trusted."""

from __future__ import annotations

import dataclasses
import os
from typing import Any, Literal, get_args

from dovetail.runtime.errors import UserError
from dovetail.runtime.hardware.devices import NAMES, check_device
from dovetail.runtime.settings import Choice, Refusal, Whole, check_names, check_settings, setting
from dovetail.runtime.trees.shape import MAX_TREE_NODES, TreeShape

DraftChoice = Literal["auto", "artifact", "lookup", "none"]
Numerics = Literal["fast", "exact"]
Acceptance = Literal["confirmed", "relaxed"]
_MAX_THREADS = 4096


@dataclasses.dataclass(frozen=True, slots=True)
class Instance:
    """An object of some types, None among them or not."""

    types: tuple[type, ...]
    expected: str

    def frozen(self, value: Any) -> Any:
        """As it is."""
        return value

    def refusal(self, value: Any) -> Refusal | None:
        """See `Kind`."""
        return None if isinstance(value, self.types) and value != "" else (self.expected, value)


class Device(Instance):
    """A device's name, checked by `check_device`."""


class Size(Whole):
    """A number of bytes; a flag takes units too."""


class File(Instance):
    """Where a file lies."""


class FileText(Instance):
    """A text that a flag reads from a file."""


class Shape(Instance):
    """A tree's size; a flag for each part, whose lowest and highest value and help these are."""

    parts = (
        ("nodes", 1, MAX_TREE_NODES, "Nodes of a pass, the root counted."),
        ("depth", 0, 64, "Levels that are drafted."),
        ("width", 1, 64, "Children tried per node and level."),
    )


@dataclasses.dataclass(frozen=True, slots=True)
class EngineConfig:
    """Checked when it is made: raises `UserError`, and `DeviceError` for a device's name that there is none of."""

    draft: DraftChoice = setting(
        "auto",
        Choice(get_args(DraftChoice)),
        help="Who guesses: the artifact's model, matches in the text, or each where it is better.",
        shortcuts={"--no-draft": ("none", "Plain decoding; the same as --draft none.")},
    )
    draft_device: str = setting("auto", Device((str,), NAMES), help=f"{NAMES}.")
    draft_memory_limit: int | None = setting(
        None,
        Size(1, 1 << 62),
        help="Most bytes on the draft's device; as a flag such as 2GB or 500MB.",
    )
    numerics: Numerics = setting(
        "fast",
        Choice(get_args(Numerics)),
        help="fast quantises activations to 8 bits; exact does not, and is slower.",
        has_flag=False,
        shortcuts={"--exact": ("exact", "Activations in float32, not quantised to 8 bits; slower.")},
    )
    acceptance: Acceptance = setting(
        "confirmed",
        Choice(get_args(Acceptance)),
        help="confirmed: the bytes of plain decoding; relaxed: trees in one block, which may depart.",
        shortcuts={"--one-row": ("relaxed", "With --draft none: plain decoding, each pass a single row.")},
    )
    threads: int | None = setting(
        None,
        Whole(1, _MAX_THREADS),
        help="CPU threads.",
        other_flags=("-t",),
        shown_default="least of cores, affinity, container quota",
    )
    draft_threads: int | None = setting(
        None,
        Whole(1, _MAX_THREADS),
        help="CPU threads of the draft.",
        has_flag=False,
        shown_default="as many",
    )
    ctx_size: int | None = setting(
        None,
        Whole(2, 1 << 31),
        help="Room for prompt and answer, in tokens.",
        other_flags=("-c",),
        shown_default="the model's",
    )
    sequences: int | None = setting(
        None,
        Whole(1, 4096),
        help="Texts in a pass; the cache then holds as many such contexts.",
        has_flag=False,
        shown_default="16, the cache sized by memory",
    )
    tree: TreeShape | None = setting(
        None,
        Shape((TreeShape,), "a TreeShape"),
        help="A TreeShape(nodes, depth, width), the same every round.",
        shown_default="the profile's or the artifact's",
    )
    profile: str | os.PathLike[str] | None = setting(
        "auto",
        File((str, os.PathLike, type(None)), "a path, auto, or None"),
        help="A file of dovetail calibrate; None for none.",
        shown_default="the cache folder's",
    )
    chat_template: str | None = setting(
        None,
        FileText((str,), "a template's text"),
        help="A chat template in jinja2; the flag takes a file.",
        shown_default="the artifact's",
    )

    def __post_init__(self) -> None:
        check_settings(self)
        check_device(self.draft_device)

    def with_changes(self, **changes: Any) -> EngineConfig:
        """A copy with some settings changed; None is a value like others. Raises `UserError` for an unknown name."""
        check_names(EngineConfig, changes, "engine settings")
        return dataclasses.replace(self, **changes)

    def check(self, context_length: int) -> None:
        """Raise `UserError` if the context is longer than the target's own."""
        if self.ctx_size is not None and self.ctx_size > context_length:
            raise UserError(
                f"ctx_size: expected an integer from 2 to {context_length}, got {self.ctx_size}; correct it"
            )
