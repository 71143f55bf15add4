"""An opened artifact, ready to continue texts: the two sessions, the tokenizer, and the loop put together."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Generator, Iterator
from typing import Literal

import numpy as np
from dovetail.runtime.artifact import Artifact, open_artifact
from dovetail.runtime.draft import DraftModel, NoDraft, resolve_device
from dovetail.runtime.engine import rounds
from dovetail.runtime.errors import ContextOverflowError, DeviceError, UserError
from dovetail.runtime.generation import Generation, RoundTotals
from dovetail.runtime.manifest import DRAFT_MODEL, TARGET_MODEL, TreeShape
from dovetail.runtime.policy import FixedPolicy, Policy
from dovetail.runtime.sampling import Sampler, SamplingParams
from dovetail.runtime.target import MAX_TREE_NODES, Numerics, TargetModel
from dovetail.runtime.text import Tokenizer, load_tokenizer
from dovetail.runtime.threads import default_threads

DEFAULT_NEW_TOKENS = 256

DraftChoice = Literal["artifact", "none"]


@dataclasses.dataclass(frozen=True, slots=True)
class Chunk:
    """What one round added to a text. `text` may lag behind `token_ids` by an unfinished character."""

    text: str
    token_ids: list[int]
    drafted: list[bool]  # per token: whether the draft had guessed it


def load(
    path: str | os.PathLike[str],
    *,
    draft: DraftChoice = "artifact",
    draft_device: str = "auto",
    numerics: Numerics = "fast",
    threads: int | None = None,
    ctx_size: int | None = None,
    tree: TreeShape | None = None,
    trust: bool = False,
    notice: Callable[[str], None] = lambda line: None,
) -> Pipeline:
    """Open the artifact at `path` and load its target and draft.

    `threads` defaults to the least of physical cores, CPU affinity and container quota; `ctx_size` to the model's own
    context; `tree` to the manifest's. `trust` skips the hashes. `notice` is told, a line each, what was chosen.
    Raises `ArtifactError`, `DeviceError`, `UserError`.
    """
    return Pipeline(
        open_artifact(path, trust=trust),
        draft=draft,
        draft_device=draft_device,
        numerics=numerics,
        threads=threads,
        ctx_size=ctx_size,
        tree=tree,
        notice=notice,
    )


class Pipeline:
    """Continues texts, one at a time."""

    def __init__(
        self,
        artifact: Artifact,
        *,
        draft: DraftChoice,
        draft_device: str,
        numerics: Numerics,
        threads: int | None,
        ctx_size: int | None,
        tree: TreeShape | None,
        notice: Callable[[str], None],
    ) -> None:
        manifest = artifact.manifest
        if threads is not None and threads < 1:
            raise UserError(f"threads: expected a whole number >= 1, got {threads}")
        longest = manifest.target.context_length
        if ctx_size is not None and not 2 <= ctx_size <= longest:
            raise UserError(f"ctx_size: expected 2 to {longest} tokens, the model's own context, got {ctx_size}")
        if tree is not None and tree.nodes > MAX_TREE_NODES:
            raise UserError(f"tree nodes: expected at most {MAX_TREE_NODES}, got {tree.nodes}")
        self.artifact = artifact
        self.ctx_size = ctx_size or longest
        self.threads = threads or default_threads()
        self.draft_device = "none"
        notice(f"target: CPU, threads {self.threads}, numerics {numerics}, context {self.ctx_size}")
        self.tokenizer: Tokenizer = load_tokenizer(artifact)
        self.draft: DraftModel | None = None
        if draft == "artifact" and manifest.draft is not None:
            self.draft_device = resolve_device(draft_device)
            self.draft = DraftModel(
                artifact.file(DRAFT_MODEL),
                manifest.draft,
                device=self.draft_device,
                threads=self.threads,
                context_length=self.ctx_size,
            )
            notice(f"draft: {manifest.draft.kind} on {self.draft_device}")
        elif draft_device not in ("auto", "cpu"):
            raise DeviceError(
                f"--draft-device {draft_device}: expected a draft to put there, got none; drop the option"
            )
        else:
            notice("draft: none, plain decoding")
        self.policy: Policy = FixedPolicy(tree or manifest.default_tree)
        self.target = TargetModel(
            artifact.file(TARGET_MODEL),
            manifest.target,
            numerics=numerics,
            threads=self.threads,
            cache_tokens=self.ctx_size,
        )

    def sampling_params(self, *, seed: int, **given: float | None) -> SamplingParams:
        """The artifact's own sampling settings, with those of `given` (temperature, top_k, top_p) that are not None
        put over them.
        """
        own = self.tokenizer.generation
        settings = {"temperature": own.temperature if own.do_sample else 0.0, "top_k": own.top_k, "top_p": own.top_p}
        settings |= {name: value for name, value in given.items() if value is not None}
        return SamplingParams(**settings, seed=seed)  # type: ignore[arg-type]  # one dictionary for numbers of two types

    def generate(
        self,
        prompt: str | list[int],
        params: SamplingParams,
        *,
        max_new_tokens: int | None = None,
        ignore_eos: bool = False,
    ) -> Generation:
        """Continue `prompt` (text, or token ids as they are) to its end. See `stream`."""
        return self.stream(prompt, params, max_new_tokens=max_new_tokens, ignore_eos=ignore_eos).finish()

    def stream(
        self,
        prompt: str | list[int],
        params: SamplingParams,
        *,
        max_new_tokens: int | None = None,
        ignore_eos: bool = False,
    ) -> Stream:
        """Continue `prompt` chunk by chunk. `max_new_tokens` defaults to 256, or what the context leaves.

        Raises `ContextOverflowError` when prompt and answer do not fit the context; nothing is ever cut silently.
        """
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
        if not ids:
            raise UserError("prompt: expected at least one token, got none; give some text")
        vocab_size, longest = self.artifact.manifest.target.vocab_size, self.artifact.manifest.target.context_length
        if not all(0 <= token < vocab_size for token in ids):
            raise UserError(f"prompt: expected token ids from 0 to {vocab_size - 1}, got {min(ids)} to {max(ids)}")
        room = self.ctx_size - len(ids)
        if max_new_tokens is None:
            max_new_tokens = min(DEFAULT_NEW_TOKENS, max(room, 1))
        if max_new_tokens < 1:
            raise UserError(f"max_new_tokens: expected a whole number >= 1, got {max_new_tokens}")
        if max_new_tokens > room:
            raise ContextOverflowError(
                f"expected prompt and answer to fit the context of {self.ctx_size} tokens, got {len(ids)} of prompt "
                f"and {max_new_tokens} to generate; shorten them or raise --ctx-size (the model's limit: {longest})"
            )
        return Stream(self, ids, params, max_new_tokens, frozenset() if ignore_eos else self.tokenizer.eos_token_ids)


class Stream:
    """A text being made: iterate it for its chunks; `finish` runs it to its end and gives the whole."""

    def __init__(
        self, pipe: Pipeline, prompt: list[int], params: SamplingParams, max_new_tokens: int, eos: frozenset[int]
    ) -> None:
        self._pipe, self._prompt, self._params, self._eos = pipe, prompt, params, eos
        self._max_new_tokens = max_new_tokens
        self._token_ids: list[int] = []
        self._text = ""
        self._totals = RoundTotals()
        self._prefill_ms = self._decode_ms = 0.0
        self._bytes_to_draft = self._bytes_from_draft = 0
        self._chunks = self._run()

    def __iter__(self) -> Iterator[Chunk]:
        return self._chunks

    def close(self) -> None:
        """Stop here and free the cache. `finish` then gives what was made so far, with finish_reason `cancelled`."""
        self._chunks.close()

    def finish(self) -> Generation:
        """Run to the end if it is not there yet; the whole generation."""
        for _ in self._chunks:
            pass
        return Generation(
            text=self._text,
            token_ids=self._token_ids,
            finish_reason=self._finish_reason() or "cancelled",
            prompt_tokens=len(self._prompt),
            totals=self._totals,
            prefill_ms=self._prefill_ms,
            decode_ms=self._decode_ms,
            bytes_to_draft=self._bytes_to_draft,
            bytes_from_draft=self._bytes_from_draft,
            target_device="CPU",
            draft_device=self._pipe.draft_device,
            numerics=self._pipe.target.numerics,
            seed=self._params.seed,
            threads=self._pipe.threads,
        )

    def _finish_reason(self) -> str | None:
        if self._token_ids and self._token_ids[-1] in self._eos:
            return "stop"
        return "length" if len(self._token_ids) == self._max_new_tokens else None

    def _run(self) -> Generator[Chunk, None, None]:
        target = self._pipe.target.sequence()
        draft = self._pipe.draft.sequence() if self._pipe.draft else NoDraft()
        text = self._pipe.tokenizer.stream()
        loop = rounds(
            target, draft, self._pipe.policy, Sampler(self._params), np.array(self._prompt), self._max_new_tokens
        )
        try:
            while self._finish_reason() is None:
                start = time.perf_counter()
                done = next(loop)
                tokens = self._until_eos(done.tokens)
                self._token_ids += tokens
                self._totals.add(done)
                piece = text.push([token for token in tokens if token not in self._eos])
                piece += "" if self._finish_reason() is None else text.finish()
                self._text += piece
                self._bytes_to_draft, self._bytes_from_draft = draft.bytes_in, draft.bytes_out
                elapsed_ms = 1e3 * (time.perf_counter() - start)
                if not self._prefill_ms:
                    self._prefill_ms = elapsed_ms - done.draft_ms - done.verify_ms - done.host_ms
                    elapsed_ms -= self._prefill_ms
                self._decode_ms += elapsed_ms
                yield Chunk(piece, tokens, [i < done.accept_length for i in range(len(tokens))])
        finally:
            target.close()

    def _until_eos(self, tokens: list[int]) -> list[int]:
        """What a round emits of its tokens: nothing behind an end-of-sequence token."""
        end = next((i for i, token in enumerate(tokens) if token in self._eos), len(tokens))
        return tokens[: end + 1]
