"""A benchmark's child that makes no text but plays a part: python peer.py JSON.

The JSON may hold `tokens` (a list that repeats), `round` (tokens a delivery), `round_ms`, `draft_ms` and `verify_ms` (a
round), `margin`, `log` (a file that every run is noted in), and what goes wrong: `refuse` (load fails with this line),
`die_at`, `hang_at`, `garbage_at`, `short_at` (the number of the run, the warm-up being 0).
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from dovetail.calibration.bench.peers.protocol import Answer, Loaded, serve
from dovetail.runtime.errors import UserError

PART: dict[str, Any] = json.loads(sys.argv[1])


class FakePeer:
    def __init__(self, **options: Any) -> None:
        if "refuse" in PART:
            raise UserError(PART["refuse"])
        print("an engine that prints on stdout")
        self.runs = -1
        self.loaded = Loaded(0.1, 0.2, {"fake": "1"}, {"threads": options["threads"]}, "fake", PART.get("bytes"))

    def run(self, ids: list[int], max_new_tokens: int, temperature: float, seed: int, margins: bool = False) -> Answer:
        self.runs += 1
        if PART.get("log"):
            with Path(PART["log"]).open("a") as file:
                file.write(f"{PART['name']} {len(ids)} {temperature:g} {seed} {max_new_tokens}\n")
        if PART.get("die_at") == self.runs:
            print("last words", file=sys.stderr, flush=True)
            os.abort()
        if PART.get("hang_at") == self.runs:
            time.sleep(60)
        if PART.get("garbage_at") == self.runs:
            os.write(int(PART.get("fd", 3)), b"not json\n")
        tokens = PART.get("tokens", [1, 2, 3])
        texts = [tokens[i % len(tokens)] for i in range(max_new_tokens - (PART.get("short_at") == self.runs))]
        size, ms = PART.get("round", 1), PART.get("round_ms", 10.0)
        counts = [1] + [min(size, len(texts) - start) for start in range(1, len(texts), size)]
        rounds = [(100.0 + i * ms, count) for i, count in enumerate(counts)]
        answer = Answer(texts, rounds, margins=[PART.get("margin", 0.5)] * len(texts) if margins else None)
        if "verify_ms" in PART:
            answer.draft_ms, answer.verify_ms = (PART[key] * (len(counts) - 1) for key in ("draft_ms", "verify_ms"))
            answer.timed_ms, answer.num_timed_rounds = rounds[-1][0] - 100.0, len(counts) - 1
        return answer


if __name__ == "__main__":
    serve(FakePeer)
