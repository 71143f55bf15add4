"""Checkpoint folder -> the target's OpenVINO IR: stateful, weights compressed, the last hidden state as a named result.

Each step is a function from model to model that checks what it found and what it made.
"""

from __future__ import annotations

import gc
import shutil
from pathlib import Path
from typing import Any

from dovetail.export.checkpoint import check_checkpoint
from dovetail.export.quiet import quiet_torch
from dovetail.runtime.errors import UserError
from dovetail.runtime.manifest import FEATURES_OUTPUT, TARGET_MODEL, TARGET_WEIGHTS, TargetInfo

WEIGHT_FORMATS = ("int8", "int4", "fp16", "fp32")


def check_weight_format(weight_format: str) -> None:
    """Raise `UserError` unless it is one of `WEIGHT_FORMATS`."""
    if weight_format not in WEIGHT_FORMATS:
        raise UserError(
            f"expected a weight format of {', '.join(WEIGHT_FORMATS)}, got {weight_format!r}; choose one of them"
        )


def export_target(source: Path, folder: Path, weight_format: str = "int8") -> TargetInfo:
    """Write `folder/target/openvino_model.xml` and `.bin` from the checkpoint `source`, with the files that OpenVINO
    GenAI wants beside them.

    Raises `UserError` if the checkpoint is not a causal language model that optimum-intel can export.
    """
    check_checkpoint(source)
    check_weight_format(weight_format)
    import openvino as ov
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(source, local_files_only=True, trust_remote_code=False)
    raw = folder / "raw"
    _optimum_export(source, raw, keep_float32=weight_format == "fp32")
    core = ov.Core()
    core.set_property({"ENABLE_MMAP": "NO"})  # the raw file is removed while its constants may still be referred to
    model = core.read_model(raw / "openvino_model.xml")
    parameters = count_parameters(model)
    model = compress(model, weight_format, config)
    model = add_features_result(model, config.hidden_size)
    (folder / TARGET_MODEL).parent.mkdir(exist_ok=True)
    ov.save_model(model, folder / TARGET_MODEL, compress_to_fp16=weight_format == "fp16")
    del model
    gc.collect()
    shutil.rmtree(raw)
    check_bytes(
        (folder / TARGET_WEIGHTS).stat().st_size,
        parameters,
        weight_format,
        embedding=config.vocab_size * config.hidden_size,
    )
    _genai_files(source, folder / "target")
    return TargetInfo(
        architecture=config.model_type,
        hidden_size=config.hidden_size,
        num_layers=config.num_hidden_layers,
        vocab_size=config.vocab_size,
        context_length=config.max_position_embeddings,
        parameters=parameters,
        weight_format=weight_format,
    )


def _optimum_export(source: Path, folder: Path, keep_float32: bool) -> None:
    with quiet_torch():
        from optimum.exporters.openvino import main_export
        from optimum.intel import OVConfig

        try:
            main_export(
                str(source),
                folder,
                task="text-generation-with-past",
                stateful=True,
                local_files_only=True,
                trust_remote_code=False,
                convert_tokenizer=False,
                # Without a config, optimum itself compresses models above a billion parameters, asymmetrically.
                ov_config=OVConfig(dtype="fp32" if keep_float32 else None),
            )
        except (ValueError, KeyError, NotImplementedError, ImportError) as error:
            first = str(error).strip().splitlines()[0]
            raise UserError(
                f"expected an architecture that optimum-intel exports, got: {first}; choose another checkpoint"
            ) from None


def count_parameters(model: Any) -> int:
    """Weights of a model that is not compressed yet: its floating-point constants, single numbers apart."""
    return sum(
        _size(node)
        for node in model.get_ops()
        if node.get_type_name() == "Constant" and node.get_output_element_type(0).is_real() and _size(node) > 1
    )


def _size(node: Any) -> int:
    size = 1
    for dimension in node.get_output_shape(0):
        size *= int(dimension)
    return size


def compress(model: Any, weight_format: str, config: Any) -> Any:
    """The model with its weights stored as asked; nothing to do here for fp16 and fp32 (saving converts)."""
    if weight_format in ("fp16", "fp32"):
        return model
    with quiet_torch():
        import nncf

        mode = nncf.CompressWeightsMode
        nncf.set_log_level(40)  # errors
        if weight_format == "int8":
            model = nncf.compress_weights(model, mode=mode.INT8_SYM)
        else:
            model = nncf.compress_weights(model, mode=mode.INT4_SYM, ratio=1.0, group_size=group_size(config))
    wanted = "i8" if weight_format == "int8" else "i4"
    types = {
        node.get_output_element_type(0).to_string() for node in model.get_ops() if node.get_type_name() == "Constant"
    }
    assert wanted in types, f"no {wanted} weights after compression, only {sorted(types)}"
    return model


def group_size(config: Any) -> int:
    """128, or the largest smaller power of two that divides every matrix's input width; else -1, per channel."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    widths = [config.hidden_size, head_dim * config.num_attention_heads]
    widths += [w for w in (getattr(config, n, None) for n in ("intermediate_size", "moe_intermediate_size")) if w]
    return next((g for g in (128, 64, 32, 16) if all(w % g == 0 for w in widths)), -1)


def add_features_result(model: Any, hidden_size: int) -> Any:
    """The model with one more result, `hidden_states`: what the MatMul behind `logits` reads, so after the final norm.
    [B, T, D] float32.
    """
    from openvino import opset13

    names = [name for output in model.outputs for name in output.get_names()]
    assert names.count("logits") == 1, f"expected one output named logits, got {names}"
    assert FEATURES_OUTPUT not in names, f"the model has an output {FEATURES_OUTPUT} already"
    node = model.output("logits").get_node().input_value(0).get_node()
    while node.get_type_name() in ("Convert", "Multiply", "Divide", "Tanh"):  # conversions and soft caps
        node = node.input_value(0).get_node()
    assert node.get_type_name() == "MatMul", f"expected a MatMul behind logits, got {node.get_type_name()}"
    features = node.input_value(0)
    shape = features.get_partial_shape()
    assert shape.rank.get_length() == 3, f"expected features of shape [B, T, {hidden_size}], got {shape}"
    assert shape[2].get_length() == hidden_size, f"expected features of shape [B, T, {hidden_size}], got {shape}"
    result = opset13.result(features, name=FEATURES_OUTPUT)
    result.output(0).get_tensor().set_names({FEATURES_OUTPUT})
    model.add_results([result])
    model.validate_nodes_and_infer_types()
    assert [n for o in model.outputs for n in o.get_names()].count(FEATURES_OUTPUT) == 1
    assert [n for o in model.outputs for n in o.get_names()].count("logits") == 1, (
        "naming the features renamed the logits"
    )
    return model


def check_bytes(size: int, parameters: int, weight_format: str, embedding: int) -> None:
    """Assert that the `.bin` has the bytes a parameter that the format promises (scales and constants besides): silence
    is how it fails.
    """
    per_weight = {"int8": 1.0, "int4": 0.5, "fp16": 2.0, "fp32": 4.0}[weight_format]
    byte_wide = (
        min(parameters, 2 * embedding) if weight_format == "int4" else 0
    )  # nncf keeps embedding and LM head in 8 bit
    expected = per_weight * (parameters - byte_wide) + byte_wide
    assert 0.7 * expected <= size <= 1.3 * expected + (1 << 16), (
        f"{size} bytes for {parameters} parameters as {weight_format}"
    )


def _genai_files(source: Path, target: Path) -> None:
    """Tokenizer models and settings, so that OpenVINO GenAI's LLMPipeline opens the folder as it is. Our runtime reads
    none of them.
    """
    import openvino as ov

    with quiet_torch():
        from openvino_tokenizers import convert_tokenizer
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=True, trust_remote_code=False)
        try:
            encoder, decoder = convert_tokenizer(tokenizer, with_detokenizer=True)
        except Exception as error:  # its own exception class, and whatever the conversion runs into
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(
                f"expected a tokenizer that openvino_tokenizers converts, got: {first}; GenAI could not open the target"
            ) from None
    ov.save_model(encoder, target / "openvino_tokenizer.xml")
    ov.save_model(decoder, target / "openvino_detokenizer.xml")
    for name in ("config.json", "generation_config.json"):
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
