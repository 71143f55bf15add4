"""What is learnt of one text while it is made: how far its drafts can be believed, and whether they pay.

Everything is by the measured prices, nothing by the clock: the same text learns the same in any company.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence

from dovetail.runtime.policies.base import Policy

_MEMORY = 0.95  # weight of the past, a round: what is learnt of a text is of its last 20 rounds
_PRIOR_ROUNDS = 12.0  # as many rounds of what the policy expects stand before the first
_SHORT_MEMORY = 0.9  # of what decides between matches and the model
_SHORT_PRIOR = 4.0
_PRIOR_ACCEPTED = 2.0  # of a round of the model, before its first
_PRIOR_AGREED = 1.0  # rounds: after some fifteen that brought nothing it is a stranger
_RETRIAL = 0.1  # of a round: what matches get back of their credit in every round without them
_MARGIN = 0.98  # of plain decoding's speed: below it a text's draft rests
_PROBE = 4  # rounds between two rests
_FIRST_REST, _LONGEST_REST = 16, 512
_STRANGER = 0.05  # a draft with which the target agrees less often was hardly trained for it

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, slots=True)
class Verdict:
    """How one round's tree fared."""

    source: str  # model, matches, or none: the root alone
    accepted: int  # drafted tokens
    hoped: float  # accepted tokens, by the chances alone
    extra_ms: float  # what the tree cost beyond a round without it
    plain_rate: float  # tokens per millisecond that plain decoding of the pass's texts makes


class Pace:
    """One text's. A question changes nothing; `observe` does."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.rests = 0
        self._tokens = _Mean(1.0, _PRIOR_ROUNDS, _MEMORY)  # made a round
        self._plain_tokens = _Mean(1.0 / max(policy.gain, 1e-3), _PRIOR_ROUNDS, _MEMORY)  # plainly made in the time
        self._hoped = _Mean(1.0, _PRIOR_ROUNDS, _MEMORY)
        self._accepted = _Mean(1.0, _PRIOR_ROUNDS, _MEMORY)
        self._agreed = _Mean(1.0, _PRIOR_AGREED, _MEMORY)
        self._match_trust = _Mean(1.0, _SHORT_PRIOR, _SHORT_MEMORY)
        self._model_accepted = _Mean(_PRIOR_ACCEPTED, _SHORT_PRIOR, _SHORT_MEMORY)
        self._model_cost = _Mean((1 + _PRIOR_ACCEPTED) / max(policy.gain, 1e-3) - 1, _SHORT_PRIOR, _SHORT_MEMORY)
        self._model_tokens = _Mean(1.0, _PRIOR_ROUNDS, _MEMORY)
        self._model_plain_tokens = _Mean(1.0 / max(policy.gain, 1e-3), _PRIOR_ROUNDS, _MEMORY)
        self._rest, self._next_rest, self._probes = 0, _FIRST_REST, 0
        self._is_told_of = False  # that it is a stranger

    @property
    def trust(self) -> float:
        """Accepted over hoped tokens of the model's trees."""
        return self._accepted.value / self._hoped.value

    @property
    def match_trust(self) -> float:
        """Accepted over hoped tokens of matches."""
        return self._match_trust.value

    @property
    def is_resting(self) -> bool:
        """Whether the model is left alone this round."""
        return self._rest > 0

    def model_gain(self, gain: float) -> float:
        """What a round of the model is worth: tokens, less what its time makes anyway at `gain` times plain speed."""
        return self._model_accepted.value - gain * self._model_cost.value

    def observe(self, verdict: Verdict) -> None:
        """A round is over."""
        cost = verdict.plain_rate * verdict.extra_ms  # tokens that plain decoding would have made meanwhile
        self._tokens.add(1 + verdict.accepted)
        self._plain_tokens.add(1 + cost)
        if verdict.source == "matches":
            if verdict.hoped:
                self._match_trust.add(verdict.accepted / verdict.hoped)
            return
        self._match_trust.add(1.0, _RETRIAL)
        if self._rest:
            self._rest -= 1
            return
        if self.policy.kind not in ("fixed", "adaptive"):
            return
        self._model_accepted.add(verdict.accepted)
        self._model_cost.add(cost)
        self._model_tokens.add(1 + verdict.accepted)
        self._model_plain_tokens.add(1 + cost)
        if verdict.source == "model":
            self._hoped.add(verdict.hoped)
            self._accepted.add(verdict.accepted)
            self._agreed.add(float(verdict.accepted > 0))
        if self.policy.is_wish:  # whoever asks for a tree gets it
            return
        self._probes -= 1
        if self._model_tokens.value < _MARGIN * self._model_plain_tokens.value and self._probes <= 0:
            self._rest_now()

    def _rest_now(self) -> None:
        if not self._is_told_of and self._agreed.value < _STRANGER:
            self._is_told_of = True
            _log.warning(
                "the target agrees with the draft in %.0f %% of rounds, so the draft rests for %d rounds. Was it "
                "trained for this target?",
                100 * self._agreed.value,
                self._next_rest,
            )
        self.rests += 1
        self._rest, self._next_rest = self._next_rest, min(2 * self._next_rest, _LONGEST_REST)
        self._probes = _PROBE


def speed_gain(paces: Sequence[Pace]) -> float:
    """How many times plain decoding's speed these texts are made, together; never below 1, which is to be had."""
    tokens = sum(pace._tokens.value for pace in paces)
    plain_tokens = sum(pace._plain_tokens.value for pace in paces)
    return max(tokens / plain_tokens, 1.0) if paces else 1.0


class _Mean:
    """A running mean that begins with a prior and forgets."""

    def __init__(self, prior: float, weight: float, memory: float) -> None:
        self._sum, self._weight, self._memory = weight * prior, weight, memory

    @property
    def value(self) -> float:
        return self._sum / self._weight

    def add(self, value: float, weight: float = 1.0) -> None:
        kept = self._memory**weight
        self._sum = kept * self._sum + weight * value
        self._weight = kept * self._weight + weight
