"""How many texts of each way to decode are, token by token, those of plain decoding, and how fast each is.

    python tests/tools/compare_bytes.py ARTIFACT QUESTIONS.jsonl --texts 40 --new-tokens 64 --temperature 0 0.8

QUESTIONS is a file that `dovetail batch` reads. Every question is answered by every way before
the next one, beginning with another way each time. `together`: all questions at once, eight in a pass.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dovetail.runtime import load
from dovetail.runtime.batch.question_file import read_questions
from dovetail.runtime.evaluation.repetition import repeated_share
from dovetail.runtime.pipeline import Pipeline
from dovetail.runtime.trees.shape import TreeShape


def questions(path: Path, count: int) -> list[str]:
    """The first questions, spread evenly over the file."""
    found = [question.turns[0] for question in read_questions(path)]
    return found[:: max(len(found) // count, 1)][:count]


def ways(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Engine settings by name: draft[:nodes,depth,width][/acceptance]."""
    found = {}
    for name in names:
        kind, _, acceptance = name.partition("/")
        draft, _, tree = kind.partition(":")
        found[name] = {"draft": draft, "acceptance": acceptance or "confirmed"}
        if tree:
            found[name]["tree"] = TreeShape(*map(int, tree.split(",")))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact")
    parser.add_argument("questions", type=Path)
    parser.add_argument(
        "--ways",
        nargs="+",
        default=["none", "none/relaxed", "lookup", "artifact", "lookup/relaxed", "artifact/relaxed"],
    )
    parser.add_argument("--texts", type=int, default=40)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--temperature", type=float, nargs="+", default=[0.0])
    parser.add_argument("--numerics", default="fast")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--profile", help="prices of this host profile, for ways without a tree of their own")
    parser.add_argument("--together", action="store_true", help="also eight at a time")
    parser.add_argument("--only-together", action="store_true", help="alone by the first way only")
    options = parser.parse_args()
    asked = questions(options.questions, options.texts)
    with contextlib.ExitStack() as stack:
        pipes: dict[str, Pipeline] = {}
        for name, settings in ways(options.ways).items():
            has_prices = settings["draft"] in ("auto", "artifact") and "tree" not in settings
            profile = options.profile if has_prices and settings["acceptance"] == "confirmed" else None
            config = {"profile": profile, "numerics": options.numerics, "threads": options.threads, "sequences": 8}
            pipes[name] = stack.enter_context(load(options.artifact, trust=True, ctx_size=2048, **config, **settings))
        names = list(pipes)
        for temperature in options.temperature:
            texts: dict[str, list[list[int]]] = {name: [] for name in names}
            made: dict[str, list[Any]] = {name: [] for name in names}
            controls = {"temperature": temperature, "max_new_tokens": options.new_tokens, "ignore_eos": True}
            for number, question in enumerate(asked):
                alone = names[:1] if options.only_together else names
                for turn in range(len(alone)):
                    name = alone[(number + turn) % len(alone)]
                    prompt = [{"role": "user", "content": question}]
                    answer = pipes[name].generate(prompt, seed=number, **controls)
                    texts[name].append(answer.token_ids)
                    made[name].append(answer)
            plain = texts[names[0]]
            print(
                f"T = {temperature:g}, {len(asked)} texts of {options.new_tokens}, repeated {repeated_share(plain):.0%}"
            )
            for name in alone:
                equal = sum(a == b for a, b in zip(plain, texts[name], strict=True))
                rates = [1e3 * (g.completion_tokens - 1) / g.decode_ms for g in made[name]]
                base = [1e3 * (g.completion_tokens - 1) / g.decode_ms for g in made[names[0]]]
                ratio = statistics.median(a / b for a, b in zip(rates, base, strict=True))
                rounds = sum(g.totals.rounds for g in made[name])
                tokens = sum(g.completion_tokens - 1 for g in made[name])
                line = (
                    f"  {name:24} equal {equal:3}/{len(plain)}  {statistics.median(rates):6.1f} tokens/s  x{ratio:.2f}"
                )
                print(f"{line}  accepted {tokens / rounds - 1:.2f} a round", flush=True)
            if options.together or options.only_together:
                for name in names:
                    start = time.perf_counter()
                    streams = [
                        pipes[name].stream([{"role": "user", "content": question}], seed=number, **controls)
                        for number, question in enumerate(asked)
                    ]
                    for stream in streams:
                        stream.open()
                    answers = [stream.finish() for stream in streams]
                    seconds = time.perf_counter() - start
                    equal = sum(a == b.token_ids for a, b in zip(plain, answers, strict=True))
                    rate = sum(len(answer.token_ids) for answer in answers) / seconds
                    print(
                        f"  {name:24} eight together: equal {equal:3}/{len(plain)}  {rate:6.1f} tokens/s with prompts",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
