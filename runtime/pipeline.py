"""An opened artifact, ready to continue texts: the two models, the tokenizer, and the engine put together."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from types import TracebackType
from typing import Any, overload

from dovetail.runtime.artifact.manifest import DRAFT_MODEL, TARGET_MODEL, TARGET_WEIGHTS
from dovetail.runtime.artifact.opening import Artifact, open_artifact
from dovetail.runtime.decoding.conversation import Conversation
from dovetail.runtime.decoding.engine import Engine
from dovetail.runtime.decoding.engine_config import EngineConfig
from dovetail.runtime.decoding.feed import Feed, Outcome, Request
from dovetail.runtime.decoding.generation import Generation, RunSetup
from dovetail.runtime.decoding.round_planner import RoundPlanner
from dovetail.runtime.decoding.sequence import Sequence as TextSequence
from dovetail.runtime.decoding.stream import Stream
from dovetail.runtime.decoding.text_cache import TextCache
from dovetail.runtime.drafts.base import blind
from dovetail.runtime.drafts.graph_contract import DraftGraph
from dovetail.runtime.drafts.loading import load_draft
from dovetail.runtime.drafts.model_draft import ModelDraft
from dovetail.runtime.drafts.prompt_lookup import LookupDraft
from dovetail.runtime.errors import ContextOverflowError, DeviceError, UserError
from dovetail.runtime.hardware.machine import this_machine
from dovetail.runtime.hardware.threads import default_threads
from dovetail.runtime.policies.base import Policy, unmeasured_tree
from dovetail.runtime.policies.costs import ASSUMED, Costs
from dovetail.runtime.policies.host_profile import HostProfile, profile_for
from dovetail.runtime.policies.pace import Pace
from dovetail.runtime.sampling.config import ALL_THAT_IS_LEFT, GenerationConfig
from dovetail.runtime.sampling.sampler import Sampler
from dovetail.runtime.settings import plain
from dovetail.runtime.targets.base import TargetEngine
from dovetail.runtime.targets.openvino.engine import OpenVinoTarget
from dovetail.runtime.targets.row_check import checked
from dovetail.runtime.text.chat_format import ChatFormat
from dovetail.runtime.text.chat_template import Message, Tools, check_messages
from dovetail.runtime.text.tokenizer import Tokenizer, load_tokenizer
from dovetail.runtime.trees.shape import MAX_TREE_NODES

DEFAULT_NEW_TOKENS = 256
MAX_TEXTS = 16  # in a pass, unless `sequences` says otherwise: more rows cost a CPU what they bring
UNMEASURED_GAIN = 3.0  # tokens a pass that a draft is taken to make before it has made any

Prompt = str | Sequence[int] | Sequence[Message]
"""Text, token ids as they are, or the messages of a conversation."""

_log = logging.getLogger(__name__)


def load(
    path: str | os.PathLike[str], config: EngineConfig | None = None, *, trust: bool = False, **changes: Any
) -> Pipeline:
    """Open the artifact at `path` and load its target and draft.

    `changes` are `EngineConfig`'s fields and change `config`, which defaults to `EngineConfig()`:

    >>> pipe = load("artifacts/pystd", numerics="exact", threads=2)

    `trust` skips the hashes. What is chosen is logged, to the loggers below `dovetail`. Raises `ArtifactError`,
    `DeviceError`, `ProfileError`, `UserError`.
    """
    config = (config or EngineConfig()).with_changes(**changes)
    return Pipeline(open_artifact(path, trust=trust), config)


class Pipeline:
    """Continues texts, as many at a time as there are streams open, from any threads."""

    def __init__(self, artifact: Artifact, config: EngineConfig) -> None:
        manifest = artifact.manifest
        config.check(manifest.target.context_length)
        self.artifact = artifact
        self.engine_config = config
        self.ctx_size = config.ctx_size or manifest.target.context_length
        self.tokenizer: Tokenizer = load_tokenizer(artifact)  # damage ends here, before ONNX Runtime is imported
        self.profile = self._profile()
        threads = None if self.profile is None else self.profile.engines.threads
        self.threads = threads or config.threads or default_threads()
        self._closed = False
        mode = config.numerics if config.acceptance == "confirmed" else f"{config.numerics}, relaxed acceptance"
        _log.info("target: CPU, threads %d, numerics %s, context %d", self.threads, mode, self.ctx_size)
        self.policies = self._policies()
        kinds = {policy.kind for policy in self.policies.values()}
        self.looks_up = config.draft in ("auto", "lookup") and kinds != {"plain"}
        self.max_texts = config.sequences or MAX_TEXTS
        self.draft = self._load_draft(self.max_texts) if kinds & {"fixed", "adaptive"} else None
        self.draft_kind, self.draft_device = ("lookup" if self.looks_up else "none"), "none"
        if self.draft is not None:
            self.draft_kind, self.draft_device = self.draft.info.kind, self.draft.device
        else:
            self._log_no_draft()
        tokens = self.ctx_size + MAX_TREE_NODES
        self.target: TargetEngine = OpenVinoTarget(
            artifact.file(TARGET_MODEL),
            manifest.target,
            numerics=config.numerics,
            threads=self.threads,
            capacity=tokens * (config.sequences or 1),
            at_most=None if config.sequences else tokens * MAX_TEXTS,
            acceptance=config.acceptance,
            weights=artifact.file(TARGET_WEIGHTS),
        )
        self.row_check = None
        if config.acceptance == "confirmed":
            self.row_check = checked(self.target, artifact.digest, this_machine(), self.threads)
        assumed = dataclasses.replace(ASSUMED, branches_cost=config.acceptance == "confirmed")
        costs: Costs = assumed if self.profile is None else self.profile.costs
        self.engine = Engine(self.target, RoundPlanner(costs), self.draft, self.max_texts)

    def _profile(self) -> HostProfile | None:
        """What calibration found for this machine and this way to run the artifact."""
        config, draft = self.engine_config, self.artifact.manifest.draft
        if draft is not None and config.draft != "none" and config.tree is None:
            digest, device = self.artifact.digest, config.draft_device
            return profile_for(digest, config.profile, device, config.numerics, config.acceptance, config.threads)
        if config.profile not in ("auto", None):
            raise UserError("profile: expected the artifact's own draft and no other tree; drop the profile or those")
        return None

    def _policies(self) -> dict[float, Policy]:
        """By temperature, what trees a text gets: that of the nearest temperature."""
        config, manifest = self.engine_config, self.artifact.manifest
        if config.draft == "artifact" and manifest.draft is None:
            raise UserError(
                "draft 'artifact': expected an artifact with a draft, got one without; use draft lookup or auto, or "
                "export it with a draft"
            )
        if config.draft == "lookup":
            return {0.0: Policy("lookup")}
        if config.draft == "none" or manifest.draft is None:
            return {0.0: Policy("plain")}
        if self.profile is not None:
            return {choice.temperature: choice.policy for choice in self.profile.choices}
        tree = config.tree or unmeasured_tree(manifest.default_tree, config.acceptance == "confirmed")
        return {0.0: Policy("fixed", tree, gain=UNMEASURED_GAIN, is_wish=config.tree is not None)}

    def _load_draft(self, max_texts: int) -> DraftGraph:
        config, info = self.engine_config, self.artifact.manifest.draft
        assert info is not None
        threads = config.draft_threads or (None if self.profile is None else self.profile.engines.draft_threads)
        return load_draft(
            self.artifact.file(DRAFT_MODEL),
            info,
            device=config.draft_device,
            threads=threads or self.threads,
            context_length=self.ctx_size,
            texts=max_texts,
            memory_limit=config.draft_memory_limit,
        )

    def _log_no_draft(self) -> None:
        config = self.engine_config
        if self.profile is not None and config.draft != "lookup":
            why = (
                "matches in the text, the artifact's own draft does not pay"
                if self.looks_up
                else "plain decoding is faster"
            )
            _log.info("draft: %s, %s here (dovetail calibrate)", self.draft_kind, why)
        elif config.draft_device not in ("auto", "cpu"):
            raise DeviceError(
                f"draft_device {config.draft_device!r}: expected a draft to put there, got none; leave it out"
            )
        else:
            _log.info("draft: %s", "lookup, matches in the text" if self.looks_up else "none, plain decoding")

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Free both models. Texts that are being made end as cancelled. The pipeline can't be used afterwards; closing
        again does nothing.
        """
        with self.engine.lock:  # no other thread is in the middle of a pass
            if self._closed:
                return
            self._closed = True
            self.engine.close()
            self.draft = None
            self.target.close()
        if "chat" in self.__dict__:
            self.chat.close()

    @overload
    def generate(
        self,
        prompt: Prompt,
        config: GenerationConfig | None = None,
        *,
        tools: Tools | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        parse_special: bool = False,
        **controls: Any,
    ) -> Generation: ...
    @overload
    def generate(
        self,
        prompt: Sequence[Prompt],
        config: GenerationConfig | None = None,
        *,
        tools: Tools | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        parse_special: bool = False,
        **controls: Any,
    ) -> list[Generation]: ...
    def generate(
        self,
        prompt: Prompt | Sequence[Prompt],
        config: GenerationConfig | None = None,
        *,
        tools: Tools | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        parse_special: bool = False,
        **controls: Any,
    ) -> Generation | list[Generation]:
        """Continue `prompt` to its end; see `stream`. A list of prompts gives a list of generations, made together.

        With `num_return_sequences` n > 1 the result is a list too: n generations per prompt, in the prompts' order.
        """
        prompt = [plain(one) for one in prompt] if isinstance(prompt, list) else plain(prompt)
        many = isinstance(prompt, (list, tuple)) and any(isinstance(item, (str, list, tuple)) for item in prompt)
        config = self.config(config, **controls)
        prompts: Sequence[Prompt] = prompt if many else [prompt]
        encoded = [self.encode(one, tools, chat_template_kwargs, parse_special) for one in prompts]
        for ids in encoded:
            self._room(len(ids), config)  # all prompts are refused before the first is begun
        with contextlib.ExitStack() as opened:
            streams = []
            for ids in encoded:
                answers = [self._stream(ids, config, None, number) for number in range(config.num_return_sequences)]
                for stream in answers:
                    opened.enter_context(stream)
                answers[0].share_prompt(answers[1:])
                streams += answers
            generations = [stream.finish() for stream in streams]
        return generations if many or config.num_return_sequences > 1 else generations[0]

    def generate_many(
        self, requests: Iterable[Request | UserError], *, look_ahead: int | None = None
    ) -> Iterator[Outcome]:
        """Answer any number of `requests`, taken one by one while the passes have room, in their order:

        >>> for outcome in pipe.generate_many(Request(line, config) for line in file):
        ...     print(outcome.error or outcome.generations[0].text)

        What is wrong with one request is its outcome's `error`, and the others go on. See `Feed`, which can be stopped
        between two passes, for `look_ahead`.
        """
        return iter(Feed(self, requests, look_ahead=look_ahead))

    def stream(
        self,
        prompt: Prompt,
        config: GenerationConfig | None = None,
        *,
        tools: Tools | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        parse_special: bool = False,
        conversation: Conversation | None = None,
        sequence: int = 0,
        policy: Policy | None = None,
        **controls: Any,
    ) -> Stream:
        """Continue `prompt` chunk by chunk. `controls` are `GenerationConfig`'s fields and change `config`, which
        replaces the artifact's own defaults.

        `tools`, `chat_template_kwargs` and `parse_special` are those of `encode`. A `conversation` keeps its caches for
        the next turn. A stream is one answer: of the `num_return_sequences` to a prompt, the one numbered `sequence`.
        `policy` says what trees it gets, in place of what was chosen for this machine and its temperature. Raises
        `ContextOverflowError` when prompt and answer do not fit the context: only the artifact's own limits give way
        to it.
        """
        config = self.config(config, **controls)
        if conversation is not None and not conversation.belongs_to(self.engine):
            raise UserError(
                "conversation: expected one of this pipeline, got another's; make it with its conversation()"
            )
        ids = self.encode(prompt, tools, chat_template_kwargs, parse_special)
        return self._stream(ids, config, conversation, sequence, policy)

    def _stream(
        self,
        ids: list[int],
        config: GenerationConfig,
        conversation: Conversation | None,
        number: int,
        policy: Policy | None = None,
    ) -> Stream:
        sampler = Sampler(config, ids, self.artifact.manifest.target.vocab_size, number)
        cache_owner = conversation or self.conversation()
        sequence = TextSequence(
            ids,
            cache_owner.cache,
            sampler=sampler,
            pace=Pace(policy or self.policy(config.temperature)),
            max_new_tokens=self._room(len(ids), config),
            ends=frozenset() if config.ignore_eos else config.eos_token_id,
            foresight=sampler.foresee if config.temperature > 0 else blind,
            window=self.target.window,
            rope_border=self.target.info.rope_border,
        )
        return Stream(
            self.engine,
            sequence,
            config,
            conversation=cache_owner,
            keeps_conversation=conversation is not None,
            sampler=sampler,
            tokenizer=self.tokenizer,
            setup=RunSetup("CPU", self.draft_device, self.target.numerics, self.threads),
        )

    def encode(
        self,
        prompt: Prompt,
        tools: Tools | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        parse_special: bool = False,
    ) -> list[int]:
        """The token ids of a prompt of any kind. Control tokens that someone wrote into it stay text.

        Messages go through the chat template, with `tools` and with what else it may name, such as `enable_thinking`
        or `documents`: `chat_template_kwargs`. If the last of them is an assistant's, the answer goes on with that.
        With `parse_special` the control tokens in a text are meant, as in one that a chat template has made.

        Raises `UserError` for an empty prompt, ids out of the vocabulary, messages in a wrong shape, and for what its
        kind of prompt has no use for.
        """
        prompt = plain(prompt)
        is_chat = isinstance(prompt, Sequence) and bool(prompt) and isinstance(prompt[0], Mapping)
        for name, given in (("tools", tools), ("chat_template_kwargs", chat_template_kwargs)):
            if given and not is_chat:
                raise UserError(f"{name}: expected messages with them, got a prompt without a chat template; drop them")
        if parse_special and not isinstance(prompt, str):
            raise UserError("parse_special: expected a text, got another kind of prompt; drop it")
        if isinstance(prompt, (bytes, bytearray)):
            raise UserError("prompt: expected text, token ids or messages, got bytes; decode them first")
        if isinstance(prompt, str):
            ids = self.tokenizer.encode(prompt, parse_special=parse_special)
        elif is_chat:
            check_messages(prompt)
            ids = self.chat.encode(prompt, tools=tools, variables=chat_template_kwargs)  # type: ignore[arg-type]  # checked the line before
        elif isinstance(prompt, Sequence):
            vocab_size = self.artifact.manifest.target.vocab_size
            ids = [plain(token) for token in prompt]
            for token in ids:
                if type(token) is not int or not 0 <= token < vocab_size:
                    raise UserError(f"prompt: expected token ids from 0 to {vocab_size - 1}, got {token!r:.40}")
        else:
            raise UserError(f"prompt: expected text, token ids or messages, got {type(prompt).__name__}")
        if not ids or prompt == "":
            raise UserError("prompt: expected at least one token, got none; give some text, or a start token's id")
        return ids

    @cached_property
    def chat(self) -> ChatFormat:
        """How this model reads a conversation. Raises `UserError` where it has no chat template."""
        return ChatFormat(self.artifact, self.tokenizer, self.engine_config.chat_template)

    def conversation(self) -> Conversation:
        """Caches for a text of several turns."""
        self.engine.check_open()
        model = None if self.draft is None else ModelDraft(self.draft)
        lookup = LookupDraft() if self.looks_up else None
        return Conversation(self.engine, TextCache(self.target.sequence(), model, lookup))

    def policy(self, temperature: float) -> Policy:
        """What trees a text sampled at `temperature` gets."""
        return self.policies[min(self.policies, key=lambda chosen: abs(chosen - temperature))]

    def config(self, config: GenerationConfig | None = None, **controls: Any) -> GenerationConfig:
        """`controls` over `config` over the artifact's own defaults, checked against this target."""
        own, most = self.tokenizer.generation, controls.get("max_new_tokens")
        if config is None and isinstance(most, int) and 0 < most < own.min_new_tokens:
            controls = {"min_new_tokens": most, **controls}  # the artifact's own limit gives way
        merged = (config or own).with_changes(**controls)
        if not merged.eos_token_id:
            merged = merged.with_changes(eos_token_id=self.tokenizer.eos_token_ids)
        merged.check(self.artifact.manifest.target.vocab_size)
        return merged

    def _room(self, prompt_tokens: int, config: GenerationConfig) -> int:
        """How many tokens the answer may have. The artifact's own limits give way to the context, a caller's do not."""
        left, own = self.ctx_size - prompt_tokens, self.tokenizer.generation
        wanted, longest = config.max_new_tokens, self.artifact.manifest.target.context_length
        longer = f", or raise ctx_size (the model's limit: {longest})" if self.ctx_size < longest else ""
        if left < 1:
            raise ContextOverflowError(
                f"expected prompt and answer to fit the context of {self.ctx_size} tokens, got {prompt_tokens} of "
                f"prompt; shorten it{longer}"
            )
        if wanted == ALL_THAT_IS_LEFT:
            return left
        if wanted is None and config.max_length is not None:
            wanted = config.max_length - prompt_tokens
            if wanted < 1:
                raise ContextOverflowError(
                    f"max_length: expected more than the prompt's {prompt_tokens} tokens, got {config.max_length}; "
                    "shorten the prompt, raise it, or give max_new_tokens"
                )
            wanted = min(wanted, left) if config.max_length == own.max_length else wanted
        elif wanted is None:
            least = max(config.min_new_tokens, min(config.min_length - prompt_tokens, left))
            wanted = max(least, min(DEFAULT_NEW_TOKENS, left))
        elif wanted == own.max_new_tokens:
            wanted = min(wanted, left)
        if wanted > left:
            raise ContextOverflowError(
                f"expected prompt and answer to fit the context of {self.ctx_size} tokens, got {prompt_tokens} of "
                f"prompt and {wanted} to generate; {left} are left: ask for no more, or for -1, which is all of them"
                f"{longer}"
            )
        return wanted
