"""An opened artifact, ready to continue texts: the two sessions, the tokenizer, and the loop put together."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from types import TracebackType
from typing import Any, Literal, overload

from dovetail.runtime.artifact import Artifact, open_artifact
from dovetail.runtime.chat import ChatFormat
from dovetail.runtime.chat_template import Message, check_messages
from dovetail.runtime.conversation import Conversation
from dovetail.runtime.draft import DraftModel, resolve_device
from dovetail.runtime.errors import ContextOverflowError, DeviceError, UserError
from dovetail.runtime.generation import Generation
from dovetail.runtime.generation_config import GenerationConfig
from dovetail.runtime.manifest import DRAFT_MODEL, TARGET_MODEL, TreeShape
from dovetail.runtime.policy import FixedPolicy, Policy
from dovetail.runtime.stream import Stream
from dovetail.runtime.target import MAX_TREE_NODES, Numerics, TargetModel
from dovetail.runtime.text import Tokenizer, load_tokenizer
from dovetail.runtime.threads import default_threads

DEFAULT_NEW_TOKENS = 256

DraftChoice = Literal["artifact", "none"]
Prompt = str | Sequence[int] | Sequence[Message]
"""Text, token ids as they are, or the messages of a conversation."""


def load(
    path: str | os.PathLike[str],
    *,
    draft: DraftChoice = "artifact",
    draft_device: str = "auto",
    numerics: Numerics = "fast",
    threads: int | None = None,
    ctx_size: int | None = None,
    sequences: int = 1,
    tree: TreeShape | None = None,
    chat_template: str | None = None,
    trust: bool = False,
    notice: Callable[[str], None] = lambda line: None,
) -> Pipeline:
    """Open the artifact at `path` and load its target and draft.

    `threads` defaults to the least of physical cores, CPU affinity and container quota; `ctx_size` to the model's own
    context; `sequences` is how many such contexts the cache can hold (an open conversation keeps its own); `tree`
    defaults to the manifest's. `chat_template` replaces the artifact's own. `trust` skips the hashes. `notice`
    is told, a line each, what was chosen and what went wrong with the draft. Raises `ArtifactError`, `DeviceError`,
    `UserError`.
    """
    return Pipeline(
        open_artifact(path, trust=trust),
        draft=draft,
        draft_device=draft_device,
        numerics=numerics,
        threads=threads,
        ctx_size=ctx_size,
        sequences=sequences,
        tree=tree,
        chat_template=chat_template,
        notice=notice,
    )


class Pipeline:
    """Continues texts, one at a time. Other threads wait their turn; a stream left open in the same thread is
    refused.
    """

    def __init__(
        self,
        artifact: Artifact,
        *,
        draft: DraftChoice,
        draft_device: str,
        numerics: Numerics,
        threads: int | None,
        ctx_size: int | None,
        sequences: int = 1,
        tree: TreeShape | None,
        chat_template: str | None = None,
        notice: Callable[[str], None],
    ) -> None:
        manifest = artifact.manifest
        longest = manifest.target.context_length
        if threads is not None and threads < 1:
            raise UserError(f"threads: expected a whole number >= 1, got {threads}")
        if ctx_size is not None and not 2 <= ctx_size <= longest:
            raise UserError(f"ctx_size: expected 2 to {longest} tokens, the model's own context, got {ctx_size}")
        if sequences < 1:
            raise UserError(f"sequences: expected a whole number >= 1, got {sequences}")
        if tree is not None and tree.nodes > MAX_TREE_NODES:
            raise UserError(f"tree nodes: expected at most {MAX_TREE_NODES}, got {tree.nodes}")
        self.artifact = artifact
        self.ctx_size = ctx_size or longest
        self.threads = threads or default_threads()
        self.policy: Policy = FixedPolicy(tree or manifest.default_tree)
        self._notice = notice
        self._chat_template = chat_template
        self._busy = threading.Lock()
        self._holder: int | None = None  # the thread whose stream is open
        notice(f"target: CPU, threads {self.threads}, numerics {numerics}, context {self.ctx_size}")
        self.tokenizer: Tokenizer = load_tokenizer(artifact)
        self.draft: DraftModel | None = None
        self.draft_device = "none"
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
        self.target = TargetModel(
            artifact.file(TARGET_MODEL),
            manifest.target,
            numerics=numerics,
            threads=self.threads,
            cache_tokens=self.ctx_size,
            sequences=sequences,
        )

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Free both models. The pipeline can't be used afterwards."""
        if "chat" in self.__dict__:
            self.chat.close()
        self.draft = None
        del self.target

    @overload
    def generate(self, prompt: Prompt, config: GenerationConfig | None = None, **controls: Any) -> Generation: ...
    @overload
    def generate(
        self, prompt: Sequence[Prompt], config: GenerationConfig | None = None, **controls: Any
    ) -> list[Generation]: ...
    def generate(
        self, prompt: Prompt | Sequence[Prompt], config: GenerationConfig | None = None, **controls: Any
    ) -> Generation | list[Generation]:
        """Continue `prompt` to its end; see `stream`. A list of prompts gives a list of generations, one after another.

        With `num_return_sequences` n > 1 the result is a list too: n generations per prompt, in the prompts' order.
        """
        many = isinstance(prompt, (list, tuple)) and any(isinstance(item, (str, list, tuple)) for item in prompt)
        config = self.config(config, **controls)
        prompts: Sequence[Prompt] = prompt if many else [prompt]  # type: ignore[list-item,assignment]  # by `many`
        made = [
            self.stream(one, config, sequence=i).finish() for one in prompts for i in range(config.num_return_sequences)
        ]
        return made if many or config.num_return_sequences > 1 else made[0]

    def stream(
        self,
        prompt: Prompt,
        config: GenerationConfig | None = None,
        *,
        conversation: Conversation | None = None,
        sequence: int = 0,
        **controls: Any,
    ) -> Stream:
        """Continue `prompt` chunk by chunk. Controls are `GenerationConfig`'s, over `config`, over the artifact's own.

        A `conversation` keeps its caches for the next turn. `sequence` numbers the answers to one prompt. Raises
        `ContextOverflowError` when prompt and answer do not fit the context; nothing is ever cut silently.
        """
        config = self.config(config, **controls)
        ids = self.encode(prompt)
        max_new_tokens = self._room(len(ids), config)
        own = conversation or Conversation(self.target, self.draft)

        def end() -> None:
            if conversation is None:
                own.close()
            self._holder = None
            self._busy.release()

        return Stream(
            own,
            self.tokenizer,
            self.policy,
            config,
            ids,
            max_new_tokens=max_new_tokens,
            sequence=sequence,
            info=self.artifact.manifest.target,
            warn=self._notice,
            begin=self._begin,
            end=end,
            describe={
                "target_device": "CPU",
                "draft_device": self.draft_device,
                "numerics": self.target.numerics,
                "threads": self.threads,
            },
        )

    def encode(self, prompt: Prompt, tools: Sequence[Mapping[str, Any]] | None = None) -> list[int]:
        """The token ids of a prompt of any kind; `tools` go into the chat template of messages.

        Raises `UserError` for an empty prompt, ids out of the vocabulary, and messages in a wrong shape.
        """
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
        return Conversation(self.target, self.draft)

    def config(self, config: GenerationConfig | None = None, **controls: Any) -> GenerationConfig:
        """`controls` over `config` over the artifact's own defaults, checked against this target."""
        merged = (config or self.tokenizer.generation).with_changes(**controls)
        if not merged.eos_token_ids:
            merged = merged.with_changes(eos_token_ids=self.tokenizer.eos_token_ids)
        merged.check_vocabulary(self.artifact.manifest.target.vocab_size)
        return merged

    def _begin(self) -> None:
        if self._holder == threading.get_ident():
            raise UserError("this pipeline is already generating in this thread; finish or close that stream first")
        self._busy.acquire()
        self._holder = threading.get_ident()

    def _room(self, prompt_tokens: int, config: GenerationConfig) -> int:
        """How many tokens the answer may have."""
        left = self.ctx_size - prompt_tokens
        wanted = config.max_new_tokens or max(config.min_new_tokens, min(DEFAULT_NEW_TOKENS, max(left, 1)))
        if wanted > left:
            longest = self.artifact.manifest.target.context_length
            raise ContextOverflowError(
                f"expected prompt and answer to fit the context of {self.ctx_size} tokens, got {prompt_tokens} of "
                f"prompt and {wanted} to generate; shorten them or raise --ctx-size (the model's limit: {longest})"
            )
        return wanted
