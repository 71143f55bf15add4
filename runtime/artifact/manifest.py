"""The manifest `dovetail.json`: what an artifact holds, as frozen dataclasses with a strict reader and a writer.

An artifact is untrusted input. The reader accepts exactly the fields below with exactly these types: no unknown or
duplicate keys, no NaN, no number out of range, file names only of the plain relative kind.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable
from typing import NoReturn

from dovetail.runtime.artifact import strict_json
from dovetail.runtime.errors import ArtifactError, UserError
from dovetail.runtime.trees.shape import TreeShape

FORMAT_VERSION = 2
MANIFEST_NAME = "dovetail.json"
MAX_MANIFEST_BYTES = 1 << 20
TARGET_MODEL = "target/openvino_model.xml"
TARGET_WEIGHTS = "target/openvino_model.bin"
DRAFT_MODEL = "draft/model.onnx"
WEIGHT_FORMATS = ("int8", "int8_asym", "int4", "fp16", "fp32", "keep")
DRAFT_KINDS = ("dgf", "eagle", "eagle3", "lm")
DRAFT_PRECISIONS = ("int8", "int4", "float16", "float32")
TOKENIZER = "tokenizer/tokenizer.json"
CHAT_TEMPLATE = "tokenizer/chat_template.jinja"
TOOL_USE_TEMPLATE = "tokenizer/additional_chat_templates/tool_use.jinja"  # where transformers keeps it, too
GENERATION_CONFIG = "tokenizer/generation_config.json"
CHAT_EXAMPLES = "tokenizer/chat_examples.json"
LONG_POSITIONS = 1 << 24  # added to the positions of a text beyond its `rope_border`; no context is that long
FEATURES_OUTPUT = "hidden_states"  # the target's last hidden state, after the final norm: [B, T, hidden_size]

_PART = r"(?!(?i:con|prn|aux|nul|com[0-9]|lpt[0-9])(?:[./]|\Z))[A-Za-z0-9](?:[A-Za-z0-9_.-]{0,98}[A-Za-z0-9_-])?"
_FILE_NAME = re.compile(
    rf"{_PART}(?:/{_PART}){{0,3}}\Z"
)  # up to three folders deep, no name that some system reserves or trims
_SHA256 = re.compile(r"[0-9a-f]{64}\Z")


def _refuse(expected: str, got: object) -> NoReturn:
    raise ArtifactError(
        f"{MANIFEST_NAME}: expected {expected}, got {strict_json.shown(got)}; export the artifact again"
    )


def _require(condition: bool, expected: str, got: object) -> None:
    if not condition:
        _refuse(expected, got)


def _in_range(name: str, value: float, low: float, high: float) -> None:
    _require(low <= value <= high, f"{name} between {low:g} and {high:g}", value)


def _is_label(text: str, length: int) -> bool:
    return 0 < len(text) <= length and text.isprintable()


@dataclasses.dataclass(frozen=True, slots=True)
class FileEntry:
    """Size and hash of one file of the artifact."""

    bytes: int
    sha256: str

    def __post_init__(self) -> None:
        _in_range("bytes", self.bytes, 0, 1 << 50)
        _require(_SHA256.match(self.sha256) is not None, "sha256 as 64 hexadecimal digits", self.sha256)


@dataclasses.dataclass(frozen=True, slots=True)
class TargetInfo:
    """The target as exported. `weight_format`: one of `WEIGHT_FORMATS`; `architecture`: transformers' `model_type`;
    `sliding_window`: tokens that the most short-sighted layer sees, None where all see the whole context.
    `rope_border`: a text of more tokens than this is computed with other rotary frequencies, in all its positions
    (longrope). `weight_forms`: how many weights are stored in which form (int8, or a GGUF's Q4_1), where the export
    chose it.
    """

    architecture: str
    hidden_size: int
    num_layers: int
    vocab_size: int
    context_length: int
    parameters: int
    weight_format: str
    sliding_window: int | None = None
    weight_forms: dict[str, int] | None = None
    rope_border: int | None = None

    def __post_init__(self) -> None:
        _in_range("hidden_size", self.hidden_size, 1, 1 << 20)
        _in_range("num_layers", self.num_layers, 1, 4096)
        _in_range("vocab_size", self.vocab_size, 1, 1 << 24)
        _in_range("context_length", self.context_length, 1, 1 << 24)
        _in_range("parameters", self.parameters, 1, 1 << 50)
        if self.sliding_window is not None:
            _in_range("sliding_window", self.sliding_window, 1, 1 << 24)
        if self.rope_border is not None:
            _in_range("rope_border", self.rope_border, 1, self.context_length)
        for form, count in (self.weight_forms or {}).items():
            _require(_is_label(form, 20), "the name of a form of weights", form)
            _in_range(f"weights as {form}", count, 1, 1 << 50)
        known = f"weight_format as one of {', '.join(WEIGHT_FORMATS)}"
        _require(self.weight_format in WEIGHT_FORMATS, known, self.weight_format)
        _require(_is_label(self.architecture, 100), "an architecture name", self.architecture)


@dataclasses.dataclass(frozen=True, slots=True)
class DraftInfo:
    """The draft as exported: what the runtime must know to own its cache. The graph gives `top_k` children per row, of
    `head_size` tokens (None: of all).
    """

    kind: str
    hidden_size: int
    vocab_size: int
    num_layers: int
    num_kv_heads: int
    head_dim: int
    top_k: int
    parameters: int
    precision: str
    head_size: int | None = None

    def __post_init__(self) -> None:
        _require(self.kind in DRAFT_KINDS, f"draft kind as one of {', '.join(DRAFT_KINDS)}", self.kind)
        _require(
            self.precision in DRAFT_PRECISIONS,
            f"draft precision as one of {', '.join(DRAFT_PRECISIONS)}",
            self.precision,
        )
        _in_range("draft hidden_size", self.hidden_size, 1, 1 << 20)
        _in_range("draft vocab_size", self.vocab_size, 1, 1 << 24)
        _in_range("draft num_layers", self.num_layers, 1, 1024)
        _in_range("draft num_kv_heads", self.num_kv_heads, 1, 1024)
        _in_range("draft head_dim", self.head_dim, 1, 4096)
        _in_range("draft top_k", self.top_k, 1, 64)
        _in_range("draft parameters", self.parameters, 1, 1 << 50)
        if self.head_size is not None:
            _in_range("draft head_size", self.head_size, self.top_k, self.vocab_size)

    @property
    def reads_features(self) -> bool:
        """Whether it reads the target's features beside the tokens."""
        return self.kind != "lm"


_POOR = 0.05  # nats a token between a target and its source: what 4 bits cost SmolLM2, 20 times what 8 bits do


@dataclasses.dataclass(frozen=True, slots=True)
class ExportChecks:
    """What the export measured when it reopened the artifact beside its source on held-out text. KL in nats per token.
    None: there was nothing to compare with (the target came as an IR, or there is no draft).
    """

    tokens: int
    target_kl_mean: float | None
    target_argmax_agreement: float | None
    draft_argmax_agreement: float | None
    target_perplexity: float | None = None
    source_perplexity: float | None = None
    fast_kl_mean: float | None = None  # with activations in 8 bits
    fast_argmax_agreement: float | None = None

    def __post_init__(self) -> None:
        _in_range("tokens", self.tokens, 0, 1 << 50)
        for name, low, high in (
            ("target_kl_mean", -1e-3, 1e6),
            ("target_argmax_agreement", 0, 1),
            ("draft_argmax_agreement", 0, 1),
            ("target_perplexity", 1, 1e12),
            ("source_perplexity", 1, 1e12),
            ("fast_kl_mean", -1e-3, 1e6),
            ("fast_argmax_agreement", 0, 1),
        ):
            value = getattr(self, name)
            if value is not None:
                _in_range(name, value, low, high)

    def warning(self) -> str | None:
        """What is to be said of a target that is a poor copy of its source; None of a good one."""
        divergence = max(self.target_kl_mean or 0, self.fast_kl_mean or 0)
        if divergence <= _POOR:
            return None
        return f"a poor copy of its source, {divergence:.2g} nats a token apart; export it with more bits"

    def target_summary(self) -> str:
        """What is known of the target, for people."""
        parts = []
        if self.target_kl_mean is not None:
            parts.append(f"mean KL {self.target_kl_mean:.5f} nats a token")
        if self.target_argmax_agreement is not None:
            parts.append(f"argmax agreement {self.target_argmax_agreement:.2%}")
        if self.target_perplexity is not None:
            before = "" if self.source_perplexity is None else f" (source {self.source_perplexity:.4g})"
            parts.append(f"perplexity {self.target_perplexity:.4g}{before}")
        if self.fast_kl_mean is not None and self.fast_argmax_agreement is not None:
            parts.append(f"as run by default KL {self.fast_kl_mean:.5f}, argmax {self.fast_argmax_agreement:.2%}")
        return f"{', '.join(parts)} over {self.tokens} tokens"


@dataclasses.dataclass(frozen=True, slots=True)
class Manifest:
    """`dovetail.json`, validated. `files` lists every file of the artifact except the manifest itself."""

    format_version: int
    name: str
    target: TargetInfo
    draft: DraftInfo | None
    default_tree: TreeShape
    checks: ExportChecks
    tool_versions: dict[str, str]
    files: dict[str, FileEntry]

    def __post_init__(self) -> None:
        _require(self.format_version == FORMAT_VERSION, f"format_version {FORMAT_VERSION}", self.format_version)
        _require(_is_label(self.name, 200), "a name of 1 to 200 printable characters", self.name)
        _require(len(self.files) <= 1000, "at most 1000 files", len(self.files))
        _require(len(self.tool_versions) <= 100, "at most 100 tool versions", len(self.tool_versions))
        for tool, tool_version in self.tool_versions.items():
            _require(
                _is_label(tool, 100) and _is_label(tool_version, 100), "printable tool versions", (tool, tool_version)
            )
        for name in self.files:
            _require(_FILE_NAME.match(name) is not None and ".." not in name, "plain relative file names", name)
            _require(name.casefold() != MANIFEST_NAME, "file names besides the manifest's own", name)
        names = [*self.files, *folders_of(self.files)]
        _require(
            len({name.casefold() for name in names}) == len(names),
            "file names that differ in more than case",
            sorted(names),
        )
        needed = [TARGET_MODEL, TARGET_WEIGHTS, TOKENIZER] + ([DRAFT_MODEL] if self.draft else [])
        for name in needed:
            _require(name in self.files, f"a files entry {name}", sorted(self.files))
        if self.draft is not None:
            for field in ("hidden_size", "vocab_size") if self.draft.reads_features else ("vocab_size",):
                ours, theirs = getattr(self.target, field), getattr(self.draft, field)
                if ours != theirs:
                    raise ArtifactError(
                        f"draft {field} {theirs} != target {field} {ours}; re-export with the matching draft"
                    )


def folders_of(names: Iterable[str]) -> set[str]:
    """Every folder that the relative file names `names` imply, without a closing slash."""
    return {name[:cut] for name in names for cut, char in enumerate(name) if char == "/"}


def dumps(manifest: Manifest) -> str:
    """The manifest as the text that is stored; `loads` reads it back equal."""
    return json.dumps(dataclasses.asdict(manifest), indent=2, allow_nan=False) + "\n"


def loads(text: str | bytes) -> Manifest:
    """Read a manifest strictly. Raises `ArtifactError` naming the field; a newer `format_version` comes first."""
    data = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    document = strict_json.parse(data, MANIFEST_NAME, MAX_MANIFEST_BYTES)
    version = document.get("format_version") if isinstance(document, dict) else None
    if type(version) is int and version > FORMAT_VERSION:
        raise ArtifactError(
            f"{MANIFEST_NAME}: expected format_version {FORMAT_VERSION}, got the newer {version}; upgrade dovetail"
        )
    try:
        return strict_json.decode(Manifest, document, "manifest", _refuse)
    except ArtifactError:
        raise
    except UserError as error:  # of a part that users make too
        raise ArtifactError(f"{MANIFEST_NAME}: {error}; export the artifact again") from None
