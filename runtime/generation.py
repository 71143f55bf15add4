"""One generation's result: the text, why it ended, and what its rounds did and cost."""

from __future__ import annotations

import dataclasses
from typing import Any

from dovetail.runtime.engine import Round
from dovetail.runtime.sampling import TokenLogprobs


@dataclasses.dataclass(slots=True)
class RoundTotals:
    """Sums over the rounds of one text. Times in milliseconds."""

    rounds: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    draft_ms: float = 0.0
    verify_ms: float = 0.0
    host_ms: float = 0.0
    accept_histogram: list[int] = dataclasses.field(default_factory=list)
    """Entry a counts the rounds that accepted a drafted tokens."""

    def add(self, done: Round) -> None:
        """Count one round."""
        self.rounds += 1
        self.drafted_tokens += done.nodes - 1
        self.accepted_tokens += done.accept_length
        self.draft_ms += done.draft_ms
        self.verify_ms += done.verify_ms
        self.host_ms += done.host_ms
        missing = done.accept_length + 1 - len(self.accept_histogram)
        self.accept_histogram += [0] * missing
        self.accept_histogram[done.accept_length] += 1

    @property
    def accept_length_mean(self) -> float:
        """Accepted drafted tokens per round, the bonus token not counted."""
        return self.accepted_tokens / self.rounds if self.rounds else 0.0


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
    """A finished text.

    `finish_reason` is `stop` (end-of-sequence token or stop string), `length`, or `cancelled`. `prefill_ms` is the
    target's reading of the prompt; `decode_ms` runs from there to the last token and contains the draft's reading of
    it. `draft_failure` says why the draft was given up in the middle, if it was.
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
    bytes_to_draft: int
    bytes_from_draft: int
    draft_failure: str | None
    draft_rests: int
    target_device: str
    draft_device: str
    numerics: str
    seed: int
    threads: int

    @property
    def tokens_per_second(self) -> float:
        """Emitted tokens per second of decoding, prefill not counted."""
        return 1e3 * len(self.token_ids) / self.decode_ms if self.decode_ms else 0.0

    def as_dict(self) -> dict[str, Any]:
        """The fields of `--json`: totals flattened, host time also per round."""
        fields = {
            f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in ("totals", "logprobs")
        }
        totals = self.totals
        return {
            **fields,
            "logprobs": [dataclasses.asdict(entry) for entry in self.logprobs],
            "completion_tokens": len(self.token_ids),
            **dataclasses.asdict(totals),
            "accept_length_mean": totals.accept_length_mean,
            "host_ms_per_round": totals.host_ms / totals.rounds if totals.rounds else 0.0,
            "tokens_per_second": self.tokens_per_second,
        }
