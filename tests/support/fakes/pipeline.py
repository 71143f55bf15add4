"""What `dovetail.runtime.pipeline` puts together, around a target and a draft that are fakes."""

from __future__ import annotations

from collections.abc import Sequence

from dovetail.runtime.decoding.conversation import Conversation
from dovetail.runtime.decoding.engine import Engine
from dovetail.runtime.decoding.generation import RunSetup
from dovetail.runtime.decoding.round_planner import RoundPlanner
from dovetail.runtime.decoding.sequence import Sequence as TextSequence
from dovetail.runtime.decoding.stream import Stream
from dovetail.runtime.decoding.text_cache import TextCache
from dovetail.runtime.drafts.base import Draft, blind
from dovetail.runtime.drafts.graph_contract import DraftGraph
from dovetail.runtime.drafts.prompt_lookup import LookupDraft
from dovetail.runtime.policies.base import Policy
from dovetail.runtime.policies.costs import ASSUMED, Costs
from dovetail.runtime.policies.pace import Pace
from dovetail.runtime.sampling.config import GenerationConfig
from dovetail.runtime.sampling.sampler import Sampler
from dovetail.runtime.targets.base import TargetEngine
from dovetail.runtime.text.tokenizer import Tokenizer

PLAIN = Policy("plain")


class LetterTokenizer:
    """Token i is the letter number i; every one of them is a piece of its own."""

    def stream(self, skip_special_tokens: bool, behind: Sequence[int]) -> LetterTokenizer:
        """Of one text."""
        return self

    def skipped_text(self, token: int) -> str:
        """No letter is special."""
        return ""

    def push(self, ids: Sequence[int]) -> str:
        """The next tokens' text."""
        return "".join(chr(ord("a") + token) for token in ids)

    def finish(self) -> str:
        """Nothing is held back."""
        return ""


class FakePipeline:
    """An engine, and streams of it."""

    def __init__(
        self,
        target: TargetEngine,
        *,
        graph: DraftGraph | None = None,
        costs: Costs = ASSUMED,
        max_texts: int = 16,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        self.target, self.graph = target, graph
        self.engine = Engine(target, RoundPlanner(costs), graph, max_texts)
        self.tokenizer = tokenizer or LetterTokenizer()

    def conversation(self, model: Draft | None = None, looks_up: bool = False) -> Conversation:
        """Caches of a text."""
        lookup = LookupDraft() if looks_up else None
        return Conversation(self.engine, TextCache(self.target.sequence(), model, lookup))

    def stream(
        self,
        prompt: Sequence[int],
        config: GenerationConfig,
        policy: Policy = PLAIN,
        *,
        model: Draft | None = None,
        looks_up: bool = False,
        conversation: Conversation | None = None,
        number: int = 0,
    ) -> Stream:
        """One answer; `model` and `looks_up` are those of a conversation of its own."""
        owner = conversation or self.conversation(model, looks_up)
        sampler = Sampler(config, prompt, self.target.info.vocab_size, number)
        assert config.max_new_tokens is not None
        sequence = TextSequence(
            prompt,
            owner.cache,
            sampler=sampler,
            pace=Pace(policy),
            max_new_tokens=config.max_new_tokens,
            ends=frozenset() if config.ignore_eos else config.eos_token_id,
            foresight=sampler.foresee if config.temperature > 0 else blind,
            window=self.target.window,
        )
        return Stream(
            self.engine,
            sequence,
            config,
            conversation=owner,
            keeps_conversation=conversation is not None,
            sampler=sampler,
            tokenizer=self.tokenizer,  # type: ignore[arg-type]  # what a stream asks of it
            setup=RunSetup("fake", "fake", "exact", 1),
        )
