"""One generation's result: the text, why it ended, and what its rounds did and cost."""

from __future__ import annotations

import dataclasses
from typing import Any

from dovetail.runtime.decoding.engine import Update
from dovetail.runtime.sampling.sampler import TokenLogprobs


@dataclasses.dataclass(slots=True)
class RoundTotals:
    """Sums over the rounds of one text, whose passes it may have shared. Times in milliseconds, of whole passes;
    `host_ms` is all that is in neither model's engine.
    """

    rounds: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    draft_ms: float = 0.0
    verify_ms: float = 0.0
    host_ms: float = 0.0
    texts: int = 0  # of each round's pass
    bytes_to_draft: int = 0
    bytes_from_draft: int = 0
    accept_histogram: list[int] = dataclasses.field(default_factory=list)
    """Entry a counts the rounds that accepted a drafted tokens."""

    def add(self, update: Update, host_ms: float) -> None:
        """Count one round, in which detokenising and looking for stop strings took `host_ms` besides."""
        assert update.cost is not None
        self.rounds += 1
        self.drafted_tokens += update.nodes - 1
        self.accepted_tokens += update.accept_length
        self.draft_ms += update.cost.draft_ms
        self.verify_ms += update.cost.verify_ms
        self.host_ms += update.cost.host_ms + host_ms
        self.texts += update.cost.texts
        self.bytes_to_draft += update.cost.bytes_to_draft
        self.bytes_from_draft += update.cost.bytes_from_draft
        missing = update.accept_length + 1 - len(self.accept_histogram)
        self.accept_histogram += [0] * missing
        self.accept_histogram[update.accept_length] += 1

    @property
    def accept_length_mean(self) -> float:
        """Accepted drafted tokens per round, the bonus token not counted."""
        return self.accepted_tokens / self.rounds if self.rounds else 0.0


@dataclasses.dataclass(frozen=True, slots=True)
class RunSetup:
    """Where and how a text was made."""

    target_device: str
    draft_device: str
    numerics: str
    threads: int


@dataclasses.dataclass(frozen=True, slots=True)
class Chunk:
    """What one round added to a text. Pieces may lag behind tokens by an unfinished character or stop string."""

    pieces: list[str]  # per token: the text that it let out
    token_ids: list[int]
    drafted: list[bool]  # per token: whether the draft had guessed it
    logprobs: list[TokenLogprobs]  # per token, if asked for
    finish_reason: str | None  # on the last chunk

    @property
    def text(self) -> str:
        """What the round added to the text."""
        return "".join(self.pieces)


@dataclasses.dataclass(frozen=True, slots=True)
class Generation:
    """A finished text. Every key of `as_dict`, the document of `--json`, is an attribute too.

    `finish_reason` is `stop` (end-of-sequence token or stop string), `length`, `cancelled` or `error`. `prefill_ms` is
    the target's reading of the prompt, with which the first token comes; `decode_ms` runs from there to the last token
    and contains the draft's reading of it. `draft_failure` says why the draft was given up, if it was; `draft_rests`
    how often it was put to rest; `preemptions` how often the text gave up its place in a full cache and was read again.
    """

    text: str
    token_ids: list[int]
    drafted: list[bool]
    logprobs: list[TokenLogprobs]
    finish_reason: str
    prompt_tokens: int
    reused_tokens: int  # of the prompt, found in the cache of an earlier turn
    totals: RoundTotals
    prefill_ms: float
    decode_ms: float
    draft_failure: str | None
    draft_rests: int
    preemptions: int
    seed: int
    setup: RunSetup

    @property
    def completion_tokens(self) -> int:
        """Emitted tokens, an end-of-sequence token included."""
        return len(self.token_ids)

    @property
    def tokens_per_second(self) -> float:
        """Emitted tokens per second of decoding; the prefill, and the token that comes with it, not counted."""
        return 1e3 * (len(self.token_ids) - 1) / self.decode_ms if self.decode_ms else 0.0

    @property
    def host_ms_per_round(self) -> float:
        """Time in neither engine, a round."""
        return self.totals.host_ms / self.totals.rounds if self.totals.rounds else 0.0

    def __getattr__(self, name: str) -> Any:
        """The fields of `totals` and `setup`."""
        if name not in ("totals", "setup") and not name.startswith("_"):
            for part in (self.totals, self.setup):
                if hasattr(part, name):
                    return getattr(part, name)
        raise AttributeError(f"a Generation has no {name!r}")

    def as_dict(self) -> dict[str, Any]:
        """The document of `--json`."""
        own = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        totals, setup = own.pop("totals"), own.pop("setup")
        return {
            **own,
            "logprobs": [dataclasses.asdict(entry) for entry in self.logprobs],
            **dataclasses.asdict(totals),
            **dataclasses.asdict(setup),
            "accept_length_mean": totals.accept_length_mean,
            "completion_tokens": self.completion_tokens,
            "host_ms_per_round": self.host_ms_per_round,
            "tokens_per_second": self.tokens_per_second,
        }
