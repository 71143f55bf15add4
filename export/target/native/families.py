"""config.json -> `Decoder`, for the families whose graph we build ourselves."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from dovetail.export.sources.base import Source
from dovetail.export.target.native.decoder import Activation, Decoder, Layer
from dovetail.export.target.native.rotary import Rotary, read_rotary
from dovetail.runtime.errors import UserError

_ACTIVATIONS: Mapping[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
}
_GEMMA = {"head_dim": 256, "tie_word_embeddings": True, "hidden_act": "gelu_pytorch_tanh"}
_WINDOWED = {"query_pre_attn_scalar": 256, "sliding_window": 4096}
# Family -> what its config.json may leave out: the defaults of transformers' config classes.
_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "llama": {},
    "mistral": {},
    "smollm3": {"tie_word_embeddings": True, "no_rope_layer_interval": 4},
    "qwen2": {"max_window_layers": 28},
    "qwen3": {"head_dim": 128, "max_window_layers": 28},
    "phi3": {"rms_norm_eps": 1e-5},
    "gemma": _GEMMA,
    "gemma2": _GEMMA | _WINDOWED | {"final_logit_softcapping": 30.0},
    "gemma3_text": _GEMMA | _WINDOWED,
    "granite": {},
    "olmo2": {"rms_norm_eps": 1e-5},
}
FAMILIES = tuple(_DEFAULTS)
_UNASKED_BIASES = ("mistral", "phi3", "qwen2")  # whatever `attention_bias` says: none, or Qwen2's
_MLP_BIASES = ("llama", "granite", "smollm3")
_MOST, _MOST_LAYERS = 1 << 16, 1 << 12  # entries of a head: what lists are made of before any weight is looked for
_KINDS = ("full_attention", "sliding_attention")
_NEW_NAMES = {"gemma2", "gemma3_text"}  # call the activation `hidden_activation`, and may hold both names


class _Config:
    """config.json with a family's defaults: nulls count as missing."""

    def __init__(self, source: Source) -> None:
        self.path, self.family = source.path, str(source.config["model_type"])
        given = {name: value for name, value in source.config.items() if value is not None}
        self._values = dict(_DEFAULTS[self.family]) | given
        if self.family in _NEW_NAMES and "hidden_activation" in given:
            self._values["hidden_act"] = given["hidden_activation"]

    def size(self, name: str, default: int | None = None, most: int | None = None) -> int:
        """A positive whole number, of which there may be `most`."""
        value = self._values.get(name, default)
        if type(value) is not int or value < 1 or (most is not None and value > most):
            upto = "" if most is None else f" up to {most}"
            raise UserError(
                f"expected {name} as a positive whole number{upto} in the config of {self.path}, got {value!r:.40}; "
                f"copy the checkpoint again"
            )
        return value

    def number(self, name: str, default: float) -> float:
        """A positive number; zero too where that is the default."""
        value = self._values.get(name, default)
        if type(value) not in (int, float) or not math.isfinite(value) or value < 0 or (value == 0 and default > 0):
            raise UserError(
                f"expected {name} as a positive number in the config of {self.path}, got {value!r:.40}; copy it again"
            )
        return float(value)

    def flag(self, name: str) -> bool:
        """Whether it is set."""
        return bool(self._values.get(name, False))

    def get(self, name: str) -> Any:
        """As it is, None where it is missing."""
        return self._values.get(name)


def is_native(source: Source) -> bool:
    """Whether `read_decoder` knows the family, and the weights lie in files that we read."""
    return source.config.get("model_type") in FAMILIES and bool(source.tensors)


def read_decoder(source: Source) -> Decoder:
    """What the config of `source` says. Raises `UserError` where sizes are missing or contradict one another."""
    config = _Config(source)
    hidden, heads = config.size("hidden_size"), config.size("num_attention_heads")
    head_dim = config.size("head_dim", hidden // heads, _MOST)
    kv_heads = config.size("num_key_value_heads", heads)
    if heads % kv_heads or head_dim % 2:
        raise UserError(
            f"expected heads that the key/value heads divide, of even size, in the config of {source.path}, got "
            f"{heads} and {kv_heads} of {head_dim}; copy the checkpoint again"
        )
    gemma = config.family.startswith("gemma")
    activation = str(config.get("hidden_act") or "silu")
    if activation not in _ACTIVATIONS:
        raise UserError(
            f"expected an activation of {', '.join(_ACTIVATIONS)}, got {activation!r:.40} in the config of "
            f"{source.path}; choose another checkpoint"
        )
    bias = config.family not in _UNASKED_BIASES and config.flag("attention_bias")
    scalar = config.number("query_pre_attn_scalar", head_dim) ** -0.5
    return Decoder(
        family=config.family,
        vocab_size=config.size("vocab_size"),
        hidden_size=hidden,
        intermediate_size=config.size("intermediate_size"),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        context_length=config.size("max_position_embeddings"),
        rms_norm_eps=config.number("rms_norm_eps", 1e-6),
        layers=_layers(config, head_dim),
        activation=_ACTIVATIONS[activation],
        tied=config.flag("tie_word_embeddings"),
        attention_scale=config.number("attention_multiplier", 1.0) if config.family == "granite" else scalar,
        embedding_scale=hidden**0.5 if gemma else config.number("embedding_multiplier", 1.0),
        residual_scale=config.number("residual_multiplier", 1.0),
        logits_divisor=config.number("logits_scaling", 1.0),
        logits_cap=config.number("final_logit_softcapping", 0.0) or None,
        qkv_bias=bias or config.family == "qwen2",
        output_bias=bias,
        mlp_bias=config.family in _MLP_BIASES and config.flag("mlp_bias"),
        head_norms={"qwen3": "each", "gemma3_text": "each", "olmo2": "all"}.get(config.family, "none"),  # type: ignore[arg-type]
        pre_norms=config.family != "olmo2",
        post_norms=config.family in ("gemma2", "gemma3_text", "olmo2"),
        norm_offset=1.0 if gemma else 0.0,
        joined_weights=config.family == "phi3",
    )


def rope_parameters(config: Callable[[str], Any], where: object) -> dict[str, Any]:
    """The fields that describe rotary embeddings, wherever a config keeps them: `rope_parameters` today, `rope_theta`,
    `rope_scaling` and `partial_rotary_factor` before. `config` looks a field up.

    Raises `UserError` where the old and the new place contradict one another.
    """
    new, old = config("rope_parameters") or {}, config("rope_scaling") or {}
    parts = [new, old, *(new.get(kind) or {} for kind in _KINDS if isinstance(new, dict))]
    if not all(isinstance(part, dict) for part in parts):
        raise UserError(
            f"expected rope_parameters as an object in the config of {where}, got {new or old!r:.80}; copy it again"
        )
    if old and "rope_type" not in old and "type" in old:
        old = {"rope_type": old["type"]} | {name: value for name, value in old.items() if name != "type"}
    single = {name: config(name) for name in ("rope_theta", "partial_rotary_factor") if config(name) is not None}
    older = single | old
    if "full_attention" in new:  # one set for each kind of layer
        return new
    for name in new.keys() & older.keys():
        if new[name] != older[name]:
            raise UserError(
                f"expected one {name}, got {new[name]!r:.40} in rope_parameters and {older[name]!r:.40} beside it in "
                f"the config of {where}; drop one of them"
            )
    rope = older | new
    original = config("original_max_position_embeddings")
    return rope | ({"original_max_position_embeddings": original} if original is not None else {})


def _layers(config: _Config, head_dim: int) -> tuple[Layer, ...]:
    count, context = config.size("num_hidden_layers", most=_MOST_LAYERS), config.size("max_position_embeddings")
    windows = _windows(config, count)
    rope = rope_parameters(config.get, config.path)
    if config.family != "gemma3_text":
        rotary = read_rotary(rope, head_dim, context, config.path)
        return tuple(
            Layer(window, rotary if has_positions else None)
            for window, has_positions in zip(windows, _positions(config, count), strict=True)
        )
    full = {"rope_theta": 1e6} | (
        rope.get("full_attention") or {name: v for name, v in rope.items() if "_attention" not in name}
    )
    local = {"rope_theta": config.number("rope_local_base_freq", 10000.0)} | (rope.get("sliding_attention") or {})
    both: dict[bool, Rotary] = {
        is_local: read_rotary(part, head_dim, context, config.path) for is_local, part in ((False, full), (True, local))
    }
    return tuple(
        Layer(window, both[is_local]) for window, is_local in zip(windows, _is_local(config, count), strict=True)
    )


def _windows(config: _Config, count: int) -> list[int | None]:
    window = config.get("sliding_window")
    if window is None or config.get("use_sliding_window") is False:
        return [None] * count
    size = config.size("sliding_window")
    if size >= config.size("max_position_embeddings"):
        return [None] * count  # no text outgrows it
    return [size if is_local else None for is_local in _is_local(config, count)]


def _is_local(config: _Config, count: int) -> list[bool]:
    """Which layers have a sliding window, if there is one."""
    kinds = config.get("layer_types")
    if kinds is not None:
        if not isinstance(kinds, list) or len(kinds) != count or not all(kind in _KINDS for kind in kinds):
            raise UserError(
                f"expected {count} layer_types, sliding_attention or full_attention, got {str(kinds)[:80]} in the "
                f"config of {config.path}; choose another checkpoint"
            )
        return [kind == "sliding_attention" for kind in kinds]
    if config.family in ("qwen2", "qwen3"):
        return [config.flag("use_sliding_window") and i >= config.size("max_window_layers") for i in range(count)]
    if config.family == "gemma2":
        return [i % 2 == 0 for i in range(count)]
    if config.family == "gemma3_text":
        pattern = config.size("sliding_window_pattern", 6)
        return [(i + 1) % pattern != 0 for i in range(count)]
    if config.family == "smollm3":
        return [config.flag("use_sliding_window") and not has for has in _positions(config, count)]
    return [config.family in ("mistral", "phi3")] * count


def _positions(config: _Config, count: int) -> list[bool]:
    """Which layers rotate queries and keys."""
    if config.family != "smollm3":
        return [True] * count
    given = config.get("no_rope_layers")  # 1 where positions are rotated, despite its name
    if given is not None and (not isinstance(given, list) or len(given) != count):
        raise UserError(
            f"expected {count} no_rope_layers in the config of {config.path}, got {given!r:.80}; copy it again"
        )
    interval = config.size("no_rope_layer_interval")
    return [bool(x) for x in given] if given is not None else [(i + 1) % interval != 0 for i in range(count)]
