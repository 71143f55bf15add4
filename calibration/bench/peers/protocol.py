"""The child's side of a benchmark: JSON lines in, JSON lines out, one engine.

    {"do": "load", ...}                                               -> Loaded
    {"do": "run", "ids", "max_new_tokens", "temperature", "seed", ...} -> Answer
    {"do": "stats"}                                                    -> {"peak_rss_mb"}

Every answer is one line; a mistake is {"error": line}. What the engine prints goes to stderr.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from dovetail.runtime.errors import UserError


@dataclasses.dataclass(frozen=True, slots=True)
class Loaded:
    """An engine that is ready. `weights` names the numbers it computes with, `bytes_per_pass` how many of their bytes
    one pass reads (an embedding table that is only looked up is not read).
    """

    import_s: float
    load_s: float
    versions: dict[str, str]
    settings: dict[str, Any]
    weights: str
    bytes_per_pass: int | None


@dataclasses.dataclass(slots=True)
class Answer:
    """A text. `rounds` holds, per delivery, milliseconds since the call and how many tokens came.

    `draft_ms` and `verify_ms` are spent in the two models during `num_timed_rounds` rounds, which took `timed_ms`;
    None where an engine does not tell. `margins`, if asked for, is per token how far the best logit was above the next.
    """

    token_ids: list[int]
    rounds: list[tuple[float, int]]
    draft_ms: float | None = None
    verify_ms: float | None = None
    timed_ms: float | None = None
    num_timed_rounds: int | None = None
    margins: list[float] | None = None


class Peer(Protocol):
    """One engine. Making it loads the model."""

    loaded: Loaded

    def run(
        self, ids: list[int], max_new_tokens: int, temperature: float, seed: int, margins: bool = False
    ) -> Answer: ...


class Served(Protocol):
    """What `serve` needs: a `Peer`, or an engine that is asked for something else. `run` gives a dataclass."""

    loaded: Loaded

    def run(self, *args: Any, **fields: Any) -> Any: ...


class Stopwatch:
    """Collects the rounds of one answer."""

    def __init__(self) -> None:
        self.token_ids: list[int] = []
        self.rounds: list[tuple[float, int]] = []
        self._start = time.perf_counter()

    def delivered(self, tokens: Sequence[int], *, same_round: bool = False) -> None:
        """These tokens are there now; `same_round`: they belong to what was delivered last."""
        now = 1e3 * (time.perf_counter() - self._start)
        self.token_ids += [int(token) for token in tokens]
        before = self.rounds.pop()[1] if same_round and self.rounds else 0
        self.rounds.append((now, before + len(tokens)))

    def answer(self) -> Answer:
        """What was collected."""
        return Answer(self.token_ids, self.rounds)


def serve(peer_class: Callable[..., Served]) -> None:
    """Answer requests from stdin until it ends; `peer_class` takes the fields of the load request as keywords."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # an engine that prints must not break the protocol
    peer: Served | None = None
    for request in _requests():
        do = request.pop("do")
        try:
            if do == "load":
                peer = peer_class(**request)
                reply = dataclasses.asdict(peer.loaded)
            elif do == "stats":
                reply = {"peak_rss_mb": peak_rss_mb()}
            else:
                assert do == "run"
                assert peer is not None, "load comes first"
                reply = dataclasses.asdict(peer.run(**request))
        except (UserError, ImportError) as error:
            reply = {"error": " ".join(str(error).split())}
        print(json.dumps(reply), file=answers, flush=True)


def _requests() -> Iterator[dict[str, Any]]:
    for line in sys.stdin:
        request: dict[str, Any] = json.loads(line)
        yield request


def peak_rss_mb() -> float:
    """The most memory this process ever had resident, mapped files included, in MB of 1e6 bytes. getrusage would count
    what the parent had when it forked.
    """
    line = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert line is not None, "every Linux tells it"
    return int(line[1]) * 1024 / 1e6


def versions(*packages: str) -> dict[str, str]:
    """Installed versions by distribution name; those that are not installed are left out."""
    from importlib.metadata import PackageNotFoundError, version

    installed = {}
    for package in packages:
        try:
            installed[package] = version(package)
        except PackageNotFoundError:
            continue
    return installed
