"""An opened artifact, ready to continue texts: the two sessions, the tokenizer, and the loop put together."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from functools import cached_property
from types import TracebackType
from typing import Any, overload

from dovetail.runtime.artifact.manifest import DRAFT_MODEL, TARGET_MODEL
from dovetail.runtime.artifact.opening import Artifact, open_artifact
from dovetail.runtime.decoding.conversation import Conversation
from dovetail.runtime.decoding.engine_config import EngineConfig
from dovetail.runtime.decoding.engine_lock import Turns
from dovetail.runtime.decoding.generation import Generation, RunSetup
from dovetail.runtime.decoding.stream import Stream
from dovetail.runtime.drafts.base import RewindableDraft
from dovetail.runtime.drafts.graph_contract import DraftGraph
from dovetail.runtime.drafts.prompt_lookup import LookupDraft
from dovetail.runtime.errors import ContextOverflowError, DeviceError, UserError
from dovetail.runtime.hardware.devices import load_draft
from dovetail.runtime.hardware.threads import default_threads
from dovetail.runtime.policies.base import LOOKUP_TREE, FixedPolicy, Policy
from dovetail.runtime.policies.host_profile import Profile, profile_for
from dovetail.runtime.policies.lookup_or_model import unmeasured
from dovetail.runtime.sampling.config import GenerationConfig
from dovetail.runtime.sampling.sampler import Sampler
from dovetail.runtime.targets.openvino.engine import TargetModel
from dovetail.runtime.text.chat_format import ChatFormat
from dovetail.runtime.text.chat_template import Message, check_messages
from dovetail.runtime.text.tokenizer import Tokenizer, load_tokenizer

_log = logging.getLogger(__name__)

DEFAULT_NEW_TOKENS = 256

Prompt = str | Sequence[int] | Sequence[Message]
"""Text, token ids as they are, or the messages of a conversation."""


def load(
    path: str | os.PathLike[str],
    config: EngineConfig | None = None,
    *,
    trust: bool = False,
    **changes: Any,
) -> Pipeline:
    """Open the artifact at `path` and load its target and draft.

    `changes` are `EngineConfig`'s fields and change `config`, which defaults to `EngineConfig()`:

    >>> pipe = load("artifacts/pystd", numerics="exact", threads=2)

    `trust` skips the hashes. What was chosen is logged (logger `dovetail`, level INFO), what went wrong with the draft
    too (WARNING). Raises `ArtifactError`, `DeviceError`, `ProfileError`, `UserError`.
    """
    config = (config or EngineConfig()).with_changes(**changes)
    return Pipeline(open_artifact(path, trust=trust), config)


class Pipeline:
    """Continues texts, one at a time. Other threads wait their turn; a stream left open in the same thread is
    refused.
    """

    def __init__(self, artifact: Artifact, config: EngineConfig) -> None:
        manifest = artifact.manifest
        draft, draft_device, tree = config.draft, config.draft_device, config.tree
        threads, draft_threads = config.threads, config.draft_threads
        config.check(manifest.target.context_length)
        self.artifact = artifact
        self.ctx_size = config.ctx_size or manifest.target.context_length
        self.tokenizer: Tokenizer = load_tokenizer(artifact)  # damage ends here, before ONNX Runtime is imported
        self.profile: Profile | None = None
        wanted = manifest.draft if draft in ("auto", "artifact") else None
        if wanted is not None and tree is None:
            self.profile = profile_for(artifact.digest, config.profile, draft_device, config.numerics, threads)
        elif config.profile not in ("auto", None):
            raise UserError("profile: expected the artifact's own draft and no other tree; drop the profile or those")
        self.mixes = draft == "auto" and wanted is not None  # matches beside the model
        if self.profile is not None:
            threads, draft_threads = self.profile.engines.threads, draft_threads or self.profile.engines.draft_threads
            wanted = wanted if self.profile.drafts else None
            self.mixes = self.mixes and self.profile.looks_up
        self.threads = threads or default_threads()
        self._chat_template = config.chat_template
        self._turns = Turns()
        self._closed = False
        _log.info(f"target: CPU, threads {self.threads}, numerics {config.numerics}, context {self.ctx_size}")
        self.draft: DraftGraph | None = None  # a loaded graph
        self.draft_kind = "lookup" if draft == "lookup" or (self.mixes and wanted is None) else "none"
        self.draft_device = "none"
        if wanted is not None:
            self.draft = load_draft(
                artifact.file(DRAFT_MODEL),
                wanted,
                device=draft_device,
                threads=draft_threads or self.threads,
                context_length=self.ctx_size,
                memory_limit=config.draft_memory_limit,
            )
            self.draft_kind, self.draft_device = wanted.kind, self.draft.device
        elif self.profile is not None:
            how = (
                "matches in the text, the artifact's own draft does not pay"
                if self.mixes
                else "plain decoding is faster"
            )
            _log.info(f"draft: {self.draft_kind}, {how} here (dovetail calibrate)")
        elif draft_device not in ("auto", "cpu"):
            raise DeviceError(f"draft_device {draft_device!r}: expected a draft to put there, got none; leave it out")
        else:
            _log.info("draft: lookup, matches in the text" if draft == "lookup" else "draft: none, plain decoding")
        default = LOOKUP_TREE if draft == "lookup" else manifest.default_tree
        self.policy: Policy | None = None  # the profile's, by the text's temperature
        if self.profile is None:
            fixed = FixedPolicy(tree or default)
            self.policy = unmeasured(fixed) if self.mixes else fixed
        self.target = TargetModel(
            artifact.file(TARGET_MODEL),
            manifest.target,
            numerics=config.numerics,
            threads=self.threads,
            cache_tokens=self.ctx_size,
            sequences=config.sequences or 1,
        )

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Free both models. The pipeline can't be used afterwards; closing again does nothing."""
        if not self._closed:
            self._closed = True
            if "chat" in self.__dict__:
                self.chat.close()
            self.draft = None
            del self.target

    @overload
    def generate(
        self,
        prompt: Prompt,
        config: GenerationConfig | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **controls: Any,
    ) -> Generation: ...
    @overload
    def generate(
        self,
        prompt: Sequence[Prompt],
        config: GenerationConfig | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **controls: Any,
    ) -> list[Generation]: ...
    def generate(
        self,
        prompt: Prompt | Sequence[Prompt],
        config: GenerationConfig | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **controls: Any,
    ) -> Generation | list[Generation]:
        """Continue `prompt` to its end; see `stream`. A list of prompts gives a list of generations, one after another.

        With `num_return_sequences` n > 1 the result is a list too: n generations per prompt, in the prompts' order.
        """
        many = isinstance(prompt, (list, tuple)) and any(isinstance(item, (str, list, tuple)) for item in prompt)
        config = self.config(config, **controls)
        prompts: Sequence[Prompt] = prompt if many else [prompt]  # type: ignore[list-item,assignment]  # by `many`
        ready = [self.encode(one, tools) for one in prompts]
        for ids in ready:
            self._room(len(ids), config)  # all prompts are refused before the first is begun
        made = []
        for ids in ready:
            with self.conversation() as conversation:  # further answers to a prompt find it in the cache
                for sequence in range(config.num_return_sequences):
                    made.append(self.stream(ids, config, conversation=conversation, sequence=sequence).finish())
        return made if many or config.num_return_sequences > 1 else made[0]

    def stream(
        self,
        prompt: Prompt,
        config: GenerationConfig | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        conversation: Conversation | None = None,
        sequence: int = 0,
        **controls: Any,
    ) -> Stream:
        """Continue `prompt` chunk by chunk. `controls` are `GenerationConfig`'s fields and change `config`, which
        replaces the artifact's own defaults.

        A `conversation` keeps its caches for the next turn. `tools` go into the chat template of messages. A stream is
        one answer: of the `num_return_sequences` to a prompt, the one numbered `sequence`. Raises
        `ContextOverflowError` when prompt and answer do not fit the context; nothing is ever cut silently.
        """
        config = self.config(config, **controls)
        ids = self.encode(prompt, tools)
        return Stream(
            conversation or self.conversation(),
            ids,
            config,
            max_new_tokens=self._room(len(ids), config),
            policy=self._policy(config.temperature),
            sampler=Sampler(config, ids, self.artifact.manifest.target.vocab_size, sequence),
            tokenizer=self.tokenizer,
            turns=self._turns,
            keep=conversation is not None,
            host=RunSetup("CPU", self.draft_device, self.target.numerics, self.threads),
        )

    def encode(self, prompt: Prompt, tools: Sequence[Mapping[str, Any]] | None = None) -> list[int]:
        """The token ids of a prompt of any kind; `tools` go into the chat template of messages.

        Raises `UserError` for an empty prompt, ids out of the vocabulary, and messages in a wrong shape.
        """
        if isinstance(prompt, (bytes, bytearray)):
            raise UserError("prompt: expected text, token ids or messages, got bytes; decode them first")
        if isinstance(prompt, str):
            ids = self.tokenizer.encode(prompt)
        elif isinstance(prompt, Sequence) and prompt and isinstance(prompt[0], Mapping):
            check_messages(prompt)
            ids = self.chat.encode(prompt, tools=tools)  # type: ignore[arg-type]  # checked the line before
        elif isinstance(prompt, Sequence):
            vocab_size = self.artifact.manifest.target.vocab_size
            for token in prompt:
                if type(token) is not int or not 0 <= token < vocab_size:
                    raise UserError(f"prompt: expected token ids from 0 to {vocab_size - 1}, got {token!r:.40}")
            ids = list(prompt)  # type: ignore[arg-type]  # all integers
        else:
            raise UserError(f"prompt: expected text, token ids or messages, got {type(prompt).__name__}")
        if not ids or prompt == "":
            raise UserError("prompt: expected at least one token, got none; give some text, or a start token's id")
        return ids

    @cached_property
    def chat(self) -> ChatFormat:
        """How this model reads a conversation. Raises `UserError` where it has no chat template."""
        return ChatFormat(self.artifact, self.tokenizer, self._chat_template)

    def conversation(self) -> Conversation:
        """Caches for a text of several turns."""
        if self._closed:
            raise UserError("expected an open pipeline, got a closed one; load the artifact again")
        lookup = LookupDraft() if self.mixes else None
        return Conversation(self.target, self._draft_of_a_text(), lookup=lookup)

    def _policy(self, temperature: float) -> Policy:
        if self.policy is not None:
            return self.policy
        assert self.profile is not None
        return self.profile.policy(temperature)

    def _draft_of_a_text(self) -> RewindableDraft | None:
        if self.draft is not None:
            return self.draft.sequence()
        return LookupDraft() if self.draft_kind == "lookup" and not self.mixes else None

    def config(self, config: GenerationConfig | None = None, **controls: Any) -> GenerationConfig:
        """`controls` over `config` over the artifact's own defaults, checked against this target."""
        merged = (config or self.tokenizer.generation).with_changes(**controls)
        if not merged.eos_token_id:
            merged = merged.with_changes(eos_token_id=self.tokenizer.eos_token_ids)
        merged.check(self.artifact.manifest.target.vocab_size)
        return merged

    def _room(self, prompt_tokens: int, config: GenerationConfig) -> int:
        """How many tokens the answer may have."""
        left = self.ctx_size - prompt_tokens
        wanted = config.max_new_tokens or max(config.min_new_tokens, min(DEFAULT_NEW_TOKENS, max(left, 1)))
        if wanted > left:
            longest = self.artifact.manifest.target.context_length
            raise ContextOverflowError(
                f"expected prompt and answer to fit the context of {self.ctx_size} tokens, got {prompt_tokens} of "
                f"prompt and {wanted} to generate; shorten them or raise ctx_size (the model's limit: {longest})"
            )
        return wanted
