"""A checkpoint folder -> the target's IR by optimum-intel: stateful, weights compressed, the last hidden state as a
named result. For the families and formats that `target/native` does not write.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dovetail.export.convert.compression import compress
from dovetail.export.quiet import quiet_torch
from dovetail.export.sources.checkpoint import read_checkpoint
from dovetail.export.sources.ir_folder import IR_MODEL
from dovetail.export.target.compression import Compression
from dovetail.export.target.ir_import import checked_windows, save_target
from dovetail.export.target.ir_weights import weight_elements
from dovetail.runtime.artifact.manifest import TARGET_WEIGHTS, TargetInfo
from dovetail.runtime.errors import UserError
from dovetail.runtime.hardware.openvino_core import openvino_core

if TYPE_CHECKING:
    from dovetail.export.draft.target_features import Taps

_log = logging.getLogger(__name__)

# optimum-intel's own limit for these is transformers 5.0. Their graphs are right beside newer ones, which the checks of
# every export prove anew.
_LIMIT_LIFTED = ("gemma", "gemma2", "gemma3_text")


def export_target(
    source: Path,
    folder: Path,
    compression: Compression | None = None,
    allow_pickle: bool = False,
    taps: Taps | None = None,
) -> TargetInfo:
    """Write `folder/target/openvino_model.xml` and `.bin` from the checkpoint `source`. With
    `taps` the hidden states are what those compute, not the last ones.

    Raises `UserError` if the checkpoint is not a causal language model that optimum-intel exports and OpenVINO's paged
    attention carries.
    """
    compression = compression or Compression()
    read_checkpoint(source, allow_pickle)
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(source, local_files_only=True, trust_remote_code=False)
    raw = folder / "raw"
    _optimum_export(source, raw, config, keep_float32=compression.weight_format == "fp32")
    model = openvino_core().read_model(raw / IR_MODEL)  # mapped: the system may drop its pages again
    parameters = weight_elements(model).total()
    windows = checked_windows(model, config.to_dict())
    if taps is not None:
        model = taps.add(model)
    if compression.weight_format != "fp32":
        _log.info(f"target: compressing {parameters / 1e6:.1f} M weights to {compression.weight_format}")
    with quiet_torch(), _bars_on_stderr():
        model = compress(model, compression, matrix_widths(config))
    info = save_target(model, folder, config.to_dict(), windows, parameters, compression.weight_format)
    del model
    gc.collect()
    shutil.rmtree(raw)
    check_bytes(folder, info, compression)
    return info


def _bars_on_stderr() -> contextlib.AbstractContextManager[Any]:
    """nncf draws its progress bars on stdout, which is for results. On a terminal they belong on stderr."""
    return contextlib.redirect_stdout(sys.stderr) if sys.stderr.isatty() else contextlib.nullcontext()


def _optimum_export(source: Path, folder: Path, config: Any, keep_float32: bool) -> None:
    with quiet_torch():
        from optimum.exporters.openvino import main_export
        from optimum.intel import OVConfig

        lifted = _without_limit(config) if config.model_type in _LIMIT_LIFTED else None
        try:
            main_export(
                str(source),
                folder,
                task="text-generation-with-past",
                stateful=True,
                local_files_only=True,
                trust_remote_code=False,
                convert_tokenizer=False,
                custom_export_configs=lifted,
                # Without a config, optimum itself compresses models above a billion parameters, asymmetrically.
                ov_config=OVConfig(dtype="fp32" if keep_float32 else None),
            )
        except (ValueError, KeyError, NotImplementedError, ImportError) as error:
            first = str(error).strip().splitlines()[0]
            raise UserError(
                f"expected an architecture that optimum-intel exports, got: {first}; choose another checkpoint"
            ) from None


def _without_limit(config: Any) -> dict[str, Any]:
    """optimum-intel's own way to export this family, but for its limit on the version of transformers."""
    from optimum.exporters.tasks import TasksManager

    make = TasksManager.get_exporter_config_constructor(
        exporter="openvino",
        task="text-generation",
        model_type=config.model_type,
        library_name="transformers",
    )
    export_config = make(config, use_past=True, use_past_in_inputs=True)
    export_config.MAX_TRANSFORMERS_VERSION = None
    return {"model": export_config}


def matrix_widths(config: Any) -> list[int]:
    """Input sizes of a transformer's weight matrices."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    widths = [config.hidden_size, head_dim * config.num_attention_heads]
    return widths + [w for w in (getattr(config, n, None) for n in ("intermediate_size", "moe_intermediate_size")) if w]


def check_bytes(folder: Path, info: TargetInfo, compression: Compression) -> None:
    """Assert that the `.bin` has the bytes a parameter that the format promises (scales and constants besides): silence
    is how it fails.
    """
    size, parameters = (folder / TARGET_WEIGHTS).stat().st_size, info.parameters
    per_weight = {"int8": 1.0, "int8_asym": 1.0, "int4": 0.5 + compression.int8_share / 2, "fp16": 2.0, "fp32": 4.0}
    # nncf keeps embedding and LM head in 8 bit
    byte_wide = min(parameters, 2 * info.vocab_size * info.hidden_size) if compression.weight_format == "int4" else 0
    expected = per_weight[compression.weight_format] * (parameters - byte_wide) + byte_wide
    assert 0.7 * expected <= size <= 1.3 * expected + (1 << 16), (
        f"{size} bytes for {parameters} parameters as {compression.weight_format}"
    )
