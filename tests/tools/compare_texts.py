"""Several texts at a time, beside OpenVINO GenAI's continuous batching: tokens per second and passes for 1, 2, 4, 8 and
16 texts, plain, with matches in the text, with the draft, with both; interleaved, medians and ratios.

Usage: python tests/tools/compare_texts.py ARTIFACT QUESTIONS.jsonl [--texts 1,2,4,8,16] [--tokens 64] [--rounds 3]
       [--profile FILE] [--temperature T] [--genai]

Questions are those that `bench --prompts` reads; each text is another one. Speeds are of decoding: of passes in which
no prompt is read and no text has ended. GenAI runs in a process of its own (extra `bench`).
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from dovetail.runtime.batch.question_file import read_questions
from dovetail.runtime.evaluation.repetition import repeated_share

RUNNERS = {
    "plain": {"draft": "none", "profile": None},
    "lookup": {"draft": "lookup"},
    "draft": {"draft": "artifact"},
    "auto": {"draft": "auto"},
}


def prompts_of(pipe: Any, path: Path, count: int, longest: int = 400) -> list[list[int]]:
    """Token ids of `count` questions of at most `longest` tokens, of all categories in turn."""
    by_category: dict[str, list[list[int]]] = defaultdict(list)
    for question in read_questions(path):
        text = question.turns[0]
        try:
            ids = pipe.encode([{"role": "user", "content": text}])
        except Exception:  # a model without a chat template continues the question
            ids = pipe.encode(text)
        if len(ids) <= longest:
            by_category[question.category or ""].append(ids)
    prompts: list[list[int]] = []
    turn = 0
    while len(prompts) < count:
        prompts += [ids[turn] for ids in by_category.values() if turn < len(ids)]
        turn += 1
    return prompts[:count]


class Ours:
    """An open pipeline, whose passes are counted."""

    def __init__(self, artifact: str, **config: Any) -> None:
        from dovetail import load

        self.pipe = load(artifact, ctx_size=1024, sequences=16, **config)
        self.costs: list[Any] = []
        forward = self.pipe.engine._round

        def counted(running: list[Any]) -> list[Any]:
            updates = forward(running)
            if updates and updates[0].cost is not None:
                made = sum(len(update.tokens) for update in updates) if all(update.nodes for update in updates) else 0
                self.costs.append((updates[0].cost, made))
            return updates

        self.pipe.engine._round = counted  # type: ignore[method-assign]  # a tool that looks inside

    def run(self, prompts: list[list[int]], tokens: int, temperature: float) -> dict[str, float]:
        """Decode all prompts at once."""
        self.costs.clear()
        start = time.perf_counter()
        texts = self.pipe.generate(prompts, max_new_tokens=tokens, ignore_eos=True, temperature=temperature, seed=1)
        seconds = time.perf_counter() - start
        decoding = [(cost, made) for cost, made in self.costs if made]
        alone = [one for one in decoding if one[0].texts == len(prompts)]
        ms = sum(cost.total_ms for cost, _ in alone)
        return {
            "all": sum(len(text.token_ids) for text in texts) / seconds,
            "decode": 1e3 * sum(made for _, made in alone) / ms,
            "passes": len(self.costs),
            "rows": statistics.mean(cost.rows for cost, _ in alone),
            "accepted": statistics.mean(text.totals.accept_length_mean for text in texts),
            "repeated": repeated_share([text.token_ids for text in texts]),
            "host_ms": statistics.mean(cost.host_ms for cost, _ in alone),
        }


def genai(job: dict[str, Any]) -> None:
    """In a process of its own: a JSON line of measurements per JSON line of prompts."""
    import numpy as np
    import openvino as ov
    import openvino_genai as g

    scheduler = g.SchedulerConfig()
    scheduler.enable_prefix_caching = False
    settings = {
        "INFERENCE_NUM_THREADS": job["threads"],
        "INFERENCE_PRECISION_HINT": "f32",
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": 64,
        "KV_CACHE_PRECISION": "f16",
    }
    pipe = g.ContinuousBatchingPipeline(str(Path(job["artifact"]) / "target"), scheduler, "CPU", settings)
    for line in sys.stdin:
        request = json.loads(line)
        config = g.GenerationConfig(max_new_tokens=request["tokens"], ignore_eos=True)
        config.do_sample, config.apply_chat_template = False, False
        texts: list[list[int]] = [[] for _ in request["prompts"]]
        start, first, before = time.perf_counter(), None, 0
        handles = [
            pipe.add_request(i, ov.Tensor(np.array([ids], np.int64)), config)
            for i, ids in enumerate(request["prompts"])
        ]
        while pipe.has_non_finished_requests():
            pipe.step()
            for handle, text in zip(handles, texts, strict=True):
                while handle.can_read():
                    for made in handle.read().values():
                        text.extend(made.generated_ids)
            if first is None and all(texts):
                first, before = time.perf_counter(), sum(map(len, texts))
        end = time.perf_counter()
        count = sum(map(len, texts))
        assert first is not None
        decode = (count - before) / (end - first)
        print(
            json.dumps({"all": count / (end - start), "decode": decode, "repeated": repeated_share(texts)}), flush=True
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact")
    parser.add_argument("questions", nargs="?")
    parser.add_argument("--texts", default="1,2,4,8,16")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--profile")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--runners", default="plain,lookup,draft,auto")
    parser.add_argument("--genai", action="store_true")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        genai(json.loads(options.job))
        return
    counts = [int(count) for count in options.texts.split(",")]
    runners = {
        name: Ours(options.artifact, **{"profile": options.profile or "auto", **RUNNERS[name]})
        for name in options.runners.split(",")
    }
    any_pipe = next(iter(runners.values())).pipe
    prompts = prompts_of(any_pipe, Path(options.questions), max(counts))
    child = None
    if options.genai:
        job = json.dumps({"artifact": options.artifact, "threads": any_pipe.threads})
        child = subprocess.Popen(
            [sys.executable, __file__, options.artifact, "--job", job],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask_genai(some: list[list[int]], tokens: int) -> dict[str, float]:
        assert child is not None
        assert child.stdin is not None
        assert child.stdout is not None
        child.stdin.write(json.dumps({"prompts": some, "tokens": tokens}) + "\n")
        child.stdin.flush()
        answer: dict[str, float] = json.loads(child.stdout.readline())
        return answer

    for runner in runners.values():
        runner.run(prompts[:1], 8, options.temperature)
    if child is not None:
        ask_genai(prompts[:1], 8)
    results: dict[tuple[str, int], list[dict[str, float]]] = defaultdict(list)
    names = [*runners, *(["genai"] if child is not None else [])]
    for turn in range(options.rounds):
        for i, count in enumerate(counts):
            first = (turn + i) % len(names)  # each comes behind another one every time
            for name in names[first:] + names[:first]:
                some = prompts[:count]
                if name == "genai":
                    results[name, count].append(ask_genai(some, options.tokens))
                else:
                    results[name, count].append(runners[name].run(some, options.tokens, options.temperature))
    _print_table(results, counts, names)
    if child is not None:
        assert child.stdin is not None
        child.stdin.close()
        child.wait()


def _print_table(results: dict[tuple[str, int], list[dict[str, float]]], counts: list[int], names: list[str]) -> None:
    print("| texts | runner | decode, tokens/s | over plain | passes | rows | accepted | 8-grams repeated | host ms |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for count in counts:
        for name in names:
            runs = results[name, count]
            speed = statistics.median(run["decode"] for run in runs)
            ratio = statistics.median(
                run["decode"] / plain["decode"] for run, plain in zip(runs, results["plain", count], strict=True)
            )
            more = [
                "" if key not in runs[0] else form.format(statistics.median(run[key] for run in runs))
                for key, form in (
                    ("passes", "{:.0f}"),
                    ("rows", "{:.1f}"),
                    ("accepted", "{:.2f}"),
                    ("repeated", "{:.1%}"),
                    ("host_ms", "{:.2f}"),
                )
            ]
            print(f"| {count} | {name} | {speed:.1f} | {ratio:.2f} | " + " | ".join(more) + " |")


if __name__ == "__main__":
    main()
