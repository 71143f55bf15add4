"""The runners a benchmark knows: what each is, what it needs, and the files made for it."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dovetail.calibration.bench.gguf_file import BYTES_PER_WEIGHT, FORMATS_BESIDE, read_gguf
from dovetail.calibration.bench.runner_process import RunnerError, own_command
from dovetail.calibration.bench.weights import checkpoint_sizes, checkpoint_weights
from dovetail.runtime.artifact.manifest import DRAFT_MODEL, TARGET_WEIGHTS
from dovetail.runtime.artifact.opening import Artifact
from dovetail.runtime.decoding.engine_config import EngineConfig
from dovetail.runtime.errors import UserError
from dovetail.runtime.hardware.cpu import computes_bfloat16

_PROCESS_BYTES = 300 << 20  # an engine's libraries, its cache of two thousand tokens, and what a pass needs besides
_TORCH_BYTES = 900 << 20
_ANY_GGUF = 1.0  # bytes a weight, of a file that comes from elsewhere


@dataclasses.dataclass(frozen=True, slots=True)
class Runner:
    """A way to continue a text. `draft`: none, artifact, lookup, auto (both), or model (a small language model).
    `gguf_type`: the format of its weights, where that is not the first one beside the artifact's.
    """

    name: str
    family: str
    draft: str
    command: tuple[str, ...]
    needs: frozenset[str] = frozenset()
    gguf_type: str | None = None

    @property
    def is_plain(self) -> bool:
        """Whether every token costs a pass over all weights."""
        return self.draft == "none"


def _runner(name: str, module: str, draft: str, *needs: str, gguf_type: str | None = None) -> Runner:
    command = (sys.executable, "-m", f"dovetail.calibration.bench.peers.{module}")
    return Runner(name, module, draft, command, frozenset(needs), gguf_type)


RUNNERS = {
    runner.name: runner
    for runner in (
        _runner("plain", "dovetail", "none"),
        _runner("dovetail", "dovetail", "auto", "draft"),
        _runner("dovetail-draft", "dovetail", "artifact", "draft"),
        _runner("dovetail-lookup", "dovetail", "lookup"),
        _runner("genai", "genai", "none"),
        _runner("genai-draft", "genai", "model", "assistant"),
        _runner("genai-lookup", "genai", "lookup"),
        _runner("llamacpp", "llamacpp", "none", "checkpoint"),
        _runner("llamacpp-draft", "llamacpp", "model", "checkpoint", "assistant"),
        _runner("llamacpp-lookup", "llamacpp", "lookup", "checkpoint"),
        _runner("llamacpp-q4km", "llamacpp", "none", "checkpoint", gguf_type="Q4_K_M"),
        _runner("llamacpp-q4km-draft", "llamacpp", "model", "checkpoint", "assistant", gguf_type="Q4_K_M"),
        _runner("llamacpp-q4km-lookup", "llamacpp", "lookup", "checkpoint", gguf_type="Q4_K_M"),
        _runner("transformers", "transformers", "none", "checkpoint"),
        _runner("transformers-assisted", "transformers", "model", "checkpoint", "assistant"),
    )
}
REFERENCE = "plain"
"""The runner whose tokens the others are compared with, and who tells the margins."""


def chosen_runners(names: str | None) -> list[Runner]:
    """`--runners a,b,c`, or all. Raises `UserError` for one that is unknown or named twice."""
    if names is None:
        return list(RUNNERS.values())
    wanted = [name.strip() for name in names.split(",")]
    for name in wanted:
        if name not in RUNNERS:
            raise UserError(f"runners: expected some of {', '.join(RUNNERS)}, got {name!r:.60}; correct the name")
    if len(set(wanted)) < len(wanted):
        raise UserError(f"runners: expected every name once, got {names:.200}; drop the repetition")
    return [RUNNERS[name] for name in wanted]


@dataclasses.dataclass(frozen=True, slots=True)
class Models:
    """What the runners run: the artifact, and the checkpoints that peers need."""

    artifact: Artifact
    folder: Path
    checkpoint: Path | None
    assistant: Path | None
    work: Path

    def __post_init__(self) -> None:
        target = self.artifact.manifest.target
        for name, folder in (("checkpoint", self.checkpoint), ("assistant", self.assistant)):
            if folder is None:
                continue
            vocab_size, hidden_size = checkpoint_sizes(folder, name)
            if vocab_size != target.vocab_size:
                raise UserError(
                    f"{name}: expected a model of {target.vocab_size} tokens like the artifact's, got {vocab_size} "
                    f"in {folder}; give the matching checkpoint"
                )
            if folder is self.checkpoint and hidden_size != target.hidden_size:
                raise UserError(
                    f"checkpoint: expected the artifact's own checkpoint, hidden size {target.hidden_size}, got "
                    f"{hidden_size} in {folder}; give what was exported"
                )

    def stands_beside(self, runner: Runner) -> bool:
        """Whether `runner` computes with weights as large as the artifact's, if it can run at all."""
        return runner.gguf_type is None or runner.gguf_type in self._gguf_types[1:]

    @property
    def _gguf_types(self) -> tuple[str, ...]:
        """The formats of llama.cpp's weights beside the artifact's; none where these are a GGUF's that is not there."""
        weight_format = self.artifact.manifest.target.weight_format
        if weight_format == "keep" and self.checkpoint is not None and self.checkpoint.is_file():
            return (read_gguf(self.checkpoint).file_type,)
        return FORMATS_BESIDE.get(weight_format, ())

    def lacking(self, runner: Runner) -> str | None:
        """Why `runner` can't run with these, and what would help; None if it can."""
        if "draft" in runner.needs and self.artifact.manifest.draft is None:
            return "the artifact has no draft; export it with one"
        if "checkpoint" in runner.needs and self.checkpoint is None:
            return "it needs the torch checkpoint of the target; give `checkpoint`"
        if "assistant" in runner.needs and self.assistant is None:
            return "it needs a small language model with the same tokenizer; give `assistant`"
        return self._lacking_format(runner)

    def _lacking_format(self, runner: Runner) -> str | None:
        if not self.stands_beside(runner):
            weight_format = self.artifact.manifest.target.weight_format
            return f"its {runner.gguf_type} stands beside int4, and the artifact's weights are {weight_format}"
        if runner.family == "llamacpp" and not self._gguf_types:
            return "the artifact keeps a GGUF's blocks; give that file as `checkpoint`"
        read = (self.checkpoint, self.assistant if "assistant" in runner.needs else None)
        files = [path.name for path in read if path is not None and path.is_file()]
        return f"it needs a checkpoint's folder, not {files[0]}" if runner.family == "transformers" and files else None

    def memory_bytes(self, runner: Runner) -> int:
        """About how much memory `runner` will hold: its weights and what every process needs."""
        assistant = 0 if self.assistant is None or runner.draft != "model" else checkpoint_weights(self.assistant)
        target = self.artifact.manifest.files[TARGET_WEIGHTS].bytes
        if runner.family == "dovetail":
            draft = self.artifact.manifest.files[DRAFT_MODEL].bytes if "draft" in runner.needs else 0
            return target + 2 * draft + _PROCESS_BYTES  # the draft is float16 and computed in float32
        if runner.family == "genai":
            return target + assistant + _PROCESS_BYTES
        assert self.checkpoint is not None, "asked only for runners that lack nothing"
        weights = checkpoint_weights(self.checkpoint) + assistant
        if runner.family == "llamacpp":  # the file is mapped, and most of it repacked into memory of its own
            file_type = runner.gguf_type or self._gguf_types[0]
            return round(2 * weights * BYTES_PER_WEIGHT.get(file_type, _ANY_GGUF)) + _PROCESS_BYTES
        return (2 if computes_bfloat16() else 4) * weights + _TORCH_BYTES

    def load_options(self, runner: Runner, config: EngineConfig) -> dict[str, Any]:
        """The load request of `runner`: `config` with its kind of draft, and the files it needs. What has to be made
        first (a GGUF file, the assistant's IR) is made and kept below `work`. Raises `RunnerError`.
        """
        options: dict[str, Any] = {
            "artifact": os.fspath(self.folder),
            **dataclasses.asdict(config),
            "draft": runner.draft,
        }
        assistant = self.assistant if runner.draft == "model" else None
        if runner.family == "llamacpp":
            assert self.checkpoint is not None, "by `lacking`"
            path = self._gguf(self.checkpoint, runner.gguf_type or self._gguf_types[0])
            file = read_gguf(path)  # here, not in the child: it takes seconds, which would count as loading
            options |= {"gguf": os.fspath(path), "weights": file.summary, "bytes_per_pass": file.bytes_per_pass}
            if assistant is not None:
                is_ready = assistant.is_file()
                options["assistant_gguf"] = os.fspath(assistant if is_ready else self._gguf(assistant, "Q8_0"))
        elif runner.family == "genai" and assistant is not None:
            options["assistant_ir"] = os.fspath(self._ir(assistant))
        elif runner.family == "transformers":
            options["checkpoint"] = os.fspath(self.checkpoint)  # type: ignore[arg-type]  # by `lacking`
            if assistant is not None:
                options["assistant"] = os.fspath(assistant)
        return options

    def _gguf(self, checkpoint: Path, file_type: str) -> Path:
        """The checkpoint as a GGUF file of `file_type`; a file that has it already is taken as it is."""
        if checkpoint.is_file() and read_gguf(checkpoint).file_type == file_type:
            return checkpoint
        if checkpoint.is_dir() and file_type in ("Q8_0", "F16"):
            words = ["dovetail.export.target.gguf_writer", "--file-type", file_type, os.fspath(checkpoint)]
            return self._made(checkpoint, f"-{file_type}.gguf", lambda out: [*words, os.fspath(out)])
        source = checkpoint if checkpoint.is_file() else self._gguf(checkpoint, "F16")
        words = ["dovetail.calibration.bench.gguf_quantizer", os.fspath(source)]
        return self._made(checkpoint, f"-{file_type}.gguf", lambda out: [*words, os.fspath(out), file_type])

    def _ir(self, checkpoint: Path) -> Path:
        module = "dovetail.export.commands.cli"
        words = [module, "model", os.fspath(checkpoint), "-o"]
        return self._made(checkpoint, "", lambda out: [*words, os.fspath(out)]) / "target"

    def _made(self, checkpoint: Path, suffix: str, words: Callable[[Path], Sequence[str]]) -> Path:
        """A file or folder that a program of ours makes from a checkpoint, kept under the checkpoint's state."""
        out = self.work / f"{checkpoint.resolve().name.removesuffix('.gguf')}-{_state(checkpoint)}{suffix}"
        if not out.exists():
            try:
                self.work.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise RunnerError(
                    f"no room for converted models in {self.work}: {error.strerror}; give another `work`"
                ) from None
            own_command([sys.executable, "-m", *words(out)])
        return out


def _state(checkpoint: Path) -> str:
    """A short hash of where a checkpoint is and which files it has, by size and time."""
    paths = [checkpoint] if checkpoint.is_file() else sorted(checkpoint.glob("*"))
    files = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
    return hashlib.sha256(repr((os.fspath(checkpoint.resolve()), files)).encode()).hexdigest()[:16]
