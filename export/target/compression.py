"""How a target's weights are to be stored, as a user asks for it."""

from __future__ import annotations

import dataclasses

from dovetail.runtime.artifact.manifest import WEIGHT_FORMATS
from dovetail.runtime.errors import UserError

_MIN_CALIBRATION_TOKENS = 512


@dataclasses.dataclass(frozen=True, slots=True)
class Compression:
    """`weight_format`: one of `WEIGHT_FORMATS`. Of int4 alone: `group_size` inputs share a scale (-1: a row's; None:
    32, and by nncf 128 or the largest smaller power of two that divides every matrix). What has 4 bits the scheme of
    `target/native` says; but nncf where `int8_share` is given, of the weights that stay in 8 bits because rounding
    would hurt them most, or `calibration_ids`, by which it chooses the scales (AWQ, Lin et al. 2024, arXiv 2306.00978,
    and its scale estimation).

    Raises `UserError` for settings that contradict one another.
    """

    weight_format: str = "int8"
    group_size: int | None = None
    int8_share: float = 0.0
    calibration_ids: tuple[int, ...] | None = None

    @property
    def needs_data(self) -> bool:
        """Whether sensitive weights are told by what the model computes: by nncf, on optimum's graph."""
        return self.calibration_ids is not None or self.int8_share > 0

    def __post_init__(self) -> None:
        if self.weight_format not in WEIGHT_FORMATS:
            raise UserError(
                f"expected a weight format of {', '.join(WEIGHT_FORMATS)}, got {self.weight_format!r}; choose one of "
                f"them"
            )
        group = self.group_size
        if group not in (None, -1) and (group < 16 or group & (group - 1)):
            raise UserError(f"expected `group_size` as a power of two from 16, or -1 for whole rows, got {group}")
        if not 0 <= self.int8_share < 1:
            raise UserError(f"expected `int8_share` from 0 to below 1, got {self.int8_share:g}; for all use int8")
        for name, present in (
            ("group_size", group is not None),
            ("int8_share", self.int8_share > 0),
            ("calibration_text", self.calibration_ids is not None),
        ):
            if present and self.weight_format != "int4":
                raise UserError(
                    f"expected `{name}` with `weight_format` int4, got {self.weight_format}; drop one of them"
                )
        ids = self.calibration_ids
        if ids is not None and len(ids) < _MIN_CALIBRATION_TOKENS:
            raise UserError(
                f"expected a calibration text of at least {_MIN_CALIBRATION_TOKENS} tokens, got {len(ids)}; give more"
            )
