"""A long prompt beside texts that decode: how long these wait between two of their tokens, before it is admitted and
while it is read.

Usage: python tests/tools/measure_admission.py ARTIFACT [--texts 4] [--prompt 4000] [--beside 64] [--draft none]

`--beside` are the prompt tokens of a pass in which texts decode (`round_planner.PROMPT_TOKENS_BESIDE`).
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time

from dovetail import load
from dovetail.runtime.decoding import round_planner
from dovetail.runtime.evaluation.standard_library import held_out_files


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact")
    parser.add_argument("--texts", type=int, default=4)
    parser.add_argument("--prompt", type=int, default=4000)
    parser.add_argument("--beside", type=int, default=round_planner.PROMPT_TOKENS_BESIDE)
    parser.add_argument("--draft", default="none")
    options = parser.parse_args()
    round_planner.PROMPT_TOKENS_BESIDE = options.beside
    ctx_size = options.prompt + 512
    with load(options.artifact, draft=options.draft, ctx_size=ctx_size, sequences=options.texts + 1) as pipe:
        words = "\n".join(text for _, text in itertools.islice(held_out_files(), 40))
        ids = pipe.encode(words[: 16 * options.prompt])
        passes = -(-options.prompt // options.beside)
        controls = {"ignore_eos": True, "temperature": 0.0}
        streams = [
            pipe.stream(ids[64 * i : 64 * i + 64], max_new_tokens=passes + 40, **controls) for i in range(options.texts)
        ]
        for stream in streams:
            stream.open()
        for _ in range(24):
            next(streams[0])
        gaps: dict[bool, list[float]] = {False: [], True: []}
        long, then = None, time.perf_counter()
        for step in range(16 + passes):
            if step == 16:
                long = pipe.stream(ids[: options.prompt], max_new_tokens=1, **controls)
                long.open()
                started = time.perf_counter()
            next(streams[0])
            now = time.perf_counter()
            gaps[step >= 16].append(1e3 * (now - then))
            then = now
        assert long is not None
        long.finish()
        read_s = time.perf_counter() - started
        for stream in streams:
            stream.close()
    for reading, name in ((False, "before"), (True, "while it is read")):
        values = gaps[reading]
        median, longest = statistics.median(values), max(values)
        print(f"{name:<18} median {median:7.1f} ms, longest {longest:7.1f} ms, {len(values)} tokens")
    print(f"{options.prompt} tokens of prompt were read in {read_s:.1f} s beside {options.texts} texts")


if __name__ == "__main__":
    main()
