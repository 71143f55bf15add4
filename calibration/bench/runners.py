"""The runners a benchmark knows: what each is, what it needs, and the files made for it."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dovetail.calibration.bench.runner_process import RunnerError, own_command
from dovetail.calibration.bench.weights import Q8_0_BYTES, checkpoint_config, checkpoint_weights
from dovetail.runtime.artifact.manifest import DRAFT_MODEL, TARGET_WEIGHTS
from dovetail.runtime.artifact.opening import Artifact
from dovetail.runtime.decoding.engine_config import EngineConfig
from dovetail.runtime.errors import UserError
from dovetail.runtime.hardware.cpu import computes_bfloat16

_PROCESS_BYTES = 300 << 20  # an engine's libraries, its cache of two thousand tokens, and what a pass needs besides
_TORCH_BYTES = 900 << 20


@dataclasses.dataclass(frozen=True, slots=True)
class Runner:
    """A way to continue a text. `draft`: none, artifact, lookup, auto (both), or model (a small language model)."""

    name: str
    family: str
    draft: str
    command: tuple[str, ...]
    needs: frozenset[str] = frozenset()

    @property
    def is_plain(self) -> bool:
        """Whether every token costs a pass over all weights."""
        return self.draft == "none"


def _runner(name: str, module: str, draft: str, *needs: str) -> Runner:
    command = (sys.executable, "-m", f"dovetail.calibration.bench.peers.{module}")
    return Runner(name, module, draft, command, frozenset(needs))


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
            vocab_size = checkpoint_config(folder, name).get("vocab_size")
            if vocab_size != target.vocab_size:
                raise UserError(
                    f"{name}: expected a model of {target.vocab_size} tokens like the artifact's, got {vocab_size} "
                    f"in {folder}; give the matching checkpoint"
                )
        if self.checkpoint is not None:
            hidden_size = checkpoint_config(self.checkpoint, "checkpoint").get("hidden_size")
            if hidden_size != target.hidden_size:
                raise UserError(
                    f"checkpoint: expected the artifact's own checkpoint, hidden size {target.hidden_size}, got "
                    f"{hidden_size} in {self.checkpoint}; give the folder that was exported"
                )

    def lacking(self, runner: Runner) -> str | None:
        """Why `runner` can't run with these, and what would help; None if it can."""
        if "draft" in runner.needs and self.artifact.manifest.draft is None:
            return "the artifact has no draft; export it with one"
        if "checkpoint" in runner.needs and self.checkpoint is None:
            return "it needs the torch checkpoint of the target; give `checkpoint`"
        if "assistant" in runner.needs and self.assistant is None:
            return "it needs a small language model with the same tokenizer; give `assistant`"
        return None

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
            return round(2 * weights * Q8_0_BYTES) + _PROCESS_BYTES
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
            options["gguf"] = os.fspath(self._gguf(self.checkpoint))
            if assistant is not None:
                options["assistant_gguf"] = os.fspath(self._gguf(assistant))
        elif runner.family == "genai" and assistant is not None:
            options["assistant_ir"] = os.fspath(self._ir(assistant))
        elif runner.family == "transformers":
            options["checkpoint"] = os.fspath(self.checkpoint)  # type: ignore[arg-type]  # by `lacking`
            if assistant is not None:
                options["assistant"] = os.fspath(assistant)
        return options

    def _gguf(self, checkpoint: Path | None) -> Path:
        assert checkpoint is not None, "by `lacking`"
        module = "dovetail.export.target.gguf_writer"
        return self._made(checkpoint, ".gguf", lambda out: [module, os.fspath(checkpoint), os.fspath(out)])

    def _ir(self, checkpoint: Path) -> Path:
        module = "dovetail.export.commands.cli"
        words = [module, "model", os.fspath(checkpoint), "-o"]
        return self._made(checkpoint, "", lambda out: [*words, os.fspath(out)]) / "target"

    def _made(self, checkpoint: Path, suffix: str, words: Callable[[Path], Sequence[str]]) -> Path:
        """A file or folder that a program of ours makes from a checkpoint, kept under the checkpoint's state."""
        out = self.work / f"{checkpoint.resolve().name}-{_state(checkpoint)}{suffix}"
        if not out.exists():
            try:
                self.work.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise RunnerError(
                    f"no room for converted models in {self.work}: {error.strerror}; give another `work`"
                ) from None
            own_command([sys.executable, "-m", *words(out)])
        return out


def _state(folder: Path) -> str:
    """A short hash of where a folder is and which files it holds, by size and time."""
    files = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(folder.glob("*"))]
    return hashlib.sha256(repr((os.fspath(folder.resolve()), files)).encode()).hexdigest()[:16]
