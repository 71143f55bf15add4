"""Looks for borders: sizes and cuts of a pass at which a row gets other bits than plain decoding gives it. What
`runtime/targets/row_check.py` does in a dozen passes when an artifact is first loaded, at every context, row count and
cut where a kernel might change.

    python tests/tools/check_rows.py ARTIFACT ... [--numerics fast exact] [--threads 1 2] [--contexts 5 31 ...]

A line per border: rows that are equal and rows that are not, over all contexts, and at which contexts those were. The
last line of each way to run an artifact is a row of a table: see docs/lossless.md.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import logging
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from dovetail.runtime import load
from dovetail.runtime.targets.base import PREFILL_CHUNK, Step, TargetEngine, TargetSequence
from dovetail.runtime.trees.shape import MAX_TREE_NODES
from dovetail.runtime.trees.tree import Float32s, Int64s, Tree, chain

CONTEXTS = (5, 31, 32, 33, 64, 200, 700, 1500)
COUNTS = (*range(2, 10), 16, 33, 64, 128, 256)  # rows of a pass
FEW_COUNTS = (2, 3, 8, 16, 33, 64, 256)  # behind long contexts, where every pass takes long
CUTS = (1, 2, 31, 32, 33, 63, 255, 256, 257)  # of a prompt
LONG = 200  # tokens of a context
DECODED = 40  # tokens that are decoded one by one, to compare with


@dataclasses.dataclass
class Border:
    """What was found at one."""

    equal: int = 0
    different: int = 0
    largest: float = 0.0  # logits
    contexts: set[int] = dataclasses.field(default_factory=set)  # where rows were different

    def __str__(self) -> str:
        where = f", up to {self.largest:.2g} logits, behind {sorted(self.contexts)} tokens" if self.different else ""
        return f"{self.equal} equal, {self.different} different{where}"


class Search:
    """Of one engine. A text is P given tokens and DECODED drawn ones; row i is the one behind drawn token i."""

    def __init__(self, engine: TargetEngine) -> None:
        self.borders: dict[str, Border] = defaultdict(Border)
        self._engine = engine
        self._vocab_size = engine.info.vocab_size
        self._context = 0
        self._expected = self._first = np.empty((0, 0), np.float32)
        self._drawn = self._tokens(0, DECODED)

    def behind(self, context: int) -> None:
        """Look at every border behind so many given tokens."""
        self._context = context
        prompt = self._tokens(1, context)
        with self._read(prompt, range(PREFILL_CHUNK, context, PREFILL_CHUNK)) as (sequence, first):
            self._first = first
            fork = sequence.fork()
            self._expected = self._decoded(fork, self._drawn)
            fork.close()
            self._chains(sequence)
            self._beside_texts(sequence)
            self._beside_prompts(sequence)
            self._filled(sequence)
            self._branches(sequence)
        self._cuts(prompt)
        self._read_again(prompt)

    # Borders.

    def _chains(self, sequence: TargetSequence) -> None:
        counts = [count for count in self._counts if count <= DECODED]
        for count in (*counts, DECODED):
            self._compare(f"a chain of {count}", self._pass(Step(sequence, chain(self._drawn[:count]))))
            fork = sequence.fork()
            self._pass(Step(fork, chain(self._drawn[:count])))
            fork.commit(range(count - 1))
            rows = self._decoded(fork, self._drawn[count - 1 : count + 1])
            self._compare("what is decoded behind a chain", rows, count - 1)
            fork.close()

    def _beside_texts(self, sequence: TargetSequence) -> None:
        for count in self._counts:
            with contextlib.ExitStack() as stack:
                others, left = [], count - 1
                while left:
                    length = min(left, 7, MAX_TREE_NODES)
                    other, _ = stack.enter_context(self._read(self._tokens(2 + len(others), 9), ()))
                    others.append(Step(other, chain(self._tokens(90, length))))
                    left -= length
                self._compare(f"beside {count - 1} rows of others", self._pass(Step(sequence, self._root), *others))
                self._compare("the last of many texts", self._pass(*others, Step(sequence, self._root), which=-1))

    def _beside_prompts(self, sequence: TargetSequence) -> None:
        for count in self._counts:
            other = self._engine.sequence()
            step = Step(other, chain(self._tokens(3, count)), [], is_prompt=True)
            self._compare(f"beside a prompt of {count}", self._pass(Step(sequence, self._root), step))
            rows = self._pass(Step(sequence, chain(self._drawn[:5])), step)
            self._compare("a chain beside prompts", rows)
            other.close()

    def _filled(self, sequence: TargetSequence) -> None:
        for count in self._counts:
            if count <= MAX_TREE_NODES:
                (out,) = self._engine.forward([Step(sequence, self._root)], count)
                self._compare(f"filled up to {count}", out.logits.copy())
                (out,) = self._engine.forward([Step(sequence, chain(self._drawn[:3]), [2])], count)
                self._compare("one row wanted of a chain", out.logits.copy(), 2)

    def _branches(self, sequence: TargetSequence) -> None:
        """The drawn tokens as one of several branches, which leave at some depth and cross pages."""
        for length in (2, 3, 8, 34):
            for leaving in sorted({0, 1, length // 2}):
                for others in (1, 3):
                    self._branch(sequence, length, min(leaving, length - 2), others)

    def _branch(self, sequence: TargetSequence, length: int, leaving: int, others: int) -> None:
        """`others` paths leave behind node `leaving`, and come before the drawn tokens."""
        tokens, parents = self._drawn[: leaving + 1].tolist(), list(range(-1, leaving))
        for i in range(others):
            parent = leaving
            for token in self._tokens(5 + i, length - leaving - 1).tolist():
                tokens.append((token + (token == self._drawn[leaving + 1])) % self._vocab_size)
                parents.append(parent)
                parent = len(tokens) - 1
        path, parent = list(range(leaving + 1)), leaving
        for token in self._drawn[leaving + 1 : length].tolist():
            tokens.append(token)
            parents.append(parent)
            path.append(parent := len(tokens) - 1)
        tree = Tree(np.array(tokens), np.array(parents))
        with contextlib.closing(sequence.fork()) as fork:
            self._compare(f"a branch of {length}", self._pass(Step(fork, tree))[path])
            fork.commit(path)
            self._compare("what is decoded behind a branch", self._decoded(fork, self._drawn[length:][:2]), length)

    def _cuts(self, prompt: Int64s) -> None:
        ways = {f"a prompt cut at {cut}": (cut,) for cut in CUTS if cut < len(prompt)}
        ways["a prompt up to its last token"] = (len(prompt) - 1,)
        ways |= {f"a prompt in chunks of {size}": range(size, len(prompt), size) for size in (7, 32, 64)}
        if len(prompt) <= LONG:
            ways["a prompt token by token"] = range(1, len(prompt))
        for name, cuts in ways.items():
            self._compare_prompt(name, prompt, cuts)
        with self._read(self._tokens(2, 9), ()) as (other, _):
            self._compare_prompt("a prompt beside texts", prompt, (), Step(other, chain(self._tokens(4, 3))))
        with self._read(self._tokens(2, 2), ()) as (other, _):
            step = Step(other, chain(self._tokens(4, 1)), [], is_prompt=True)
            self._compare_prompt("a prompt beside a prompt", prompt, (), step)

    def _read_again(self, prompt: Int64s) -> None:
        """After preemption: what was given in blocks, what was drawn row by row."""
        for count in (1, 2, 7, 33):
            with self._read(prompt, range(PREFILL_CHUNK, len(prompt), PREFILL_CHUNK)) as (sequence, _):
                rows = self._pass(Step(sequence, chain(self._drawn[:count]), [count - 1]))
                sequence.commit(range(count))
                self._compare("read again", rows, count - 1)
                self._compare("decoded when read again", self._decoded(sequence, self._drawn[count:][:2]), count)

    # Passes.

    @property
    def _counts(self) -> Sequence[int]:
        return COUNTS if self._context <= LONG else FEW_COUNTS

    @property
    def _root(self) -> Tree:
        return chain(self._drawn[:1])

    def _tokens(self, seed: int, count: int) -> Int64s:
        return np.random.default_rng([7, seed]).integers(0, self._vocab_size, count)

    def _decoded(self, sequence: TargetSequence, tokens: Int64s) -> Float32s:
        rows = []
        for token in tokens:
            rows.append(self._pass(Step(sequence, chain(np.array([token])))))
            sequence.commit([0])
        return np.concatenate(rows)

    def _pass(self, *steps: Step, which: int = 0) -> Float32s:
        return self._engine.forward(steps)[which].logits.copy()

    @contextlib.contextmanager
    def _read(self, tokens: Int64s, cuts: Sequence[int], *beside: Step) -> Iterator[tuple[TargetSequence, Float32s]]:
        """A text, and the row behind its last token."""
        with contextlib.closing(self._engine.sequence()) as sequence:
            row = np.empty((0, 0), np.float32)
            for part in np.split(tokens, list(cuts)):
                for begin in range(0, len(part), PREFILL_CHUNK):
                    piece = part[begin : begin + PREFILL_CHUNK]
                    step = Step(sequence, chain(piece), [len(piece) - 1], is_prompt=True)
                    row = self._engine.forward([*beside, step])[-1].logits.copy()
                    sequence.commit(range(len(piece)))
            yield sequence, row

    def _compare_prompt(self, name: str, prompt: Int64s, cuts: Sequence[int], *beside: Step) -> None:
        with self._read(prompt, cuts, *beside) as (sequence, first):
            self._note(name, first, self._first)
            self._compare(name, self._pass(Step(sequence, chain(self._drawn[:3]))))

    def _compare(self, name: str, rows: Float32s, begin: int = 0) -> None:
        self._note(name, rows, self._expected[begin : begin + len(rows)])

    def _note(self, name: str, got: Float32s, expected: Float32s) -> None:
        border = self.borders[name]
        same = (got == expected).all(axis=1)
        border.equal += int(same.sum())
        border.different += int((~same).sum())
        if not same.all():
            border.contexts.add(self._context)
            border.largest = max(border.largest, float(np.abs(got - expected).max()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifacts", nargs="+", type=Path)
    parser.add_argument("--numerics", nargs="+", default=["fast"])
    parser.add_argument("--threads", nargs="+", type=int, default=[None])
    parser.add_argument("--contexts", nargs="+", type=int, default=CONTEXTS)
    options = parser.parse_args()
    logging.disable(logging.WARNING)  # `load` makes a check of its own
    rows = []
    for path in options.artifacts:
        for numerics in options.numerics:
            for threads in options.threads:
                rows.append(searched(path, numerics, threads, options.contexts))
    print("| artifact | weights | numerics | threads | rows compared | borders | where rows differ |")
    print("|---|---|---|---|---|---|---|")
    print("\n".join(rows))


def searched(path: Path, numerics: str, threads: int | None, contexts: Sequence[int]) -> str:
    """A row of the table; the borders are printed."""
    start = time.perf_counter()
    with load(path, draft="none", numerics=numerics, threads=threads, sequences=4) as pipe:
        info = pipe.artifact.manifest.target
        print(f"{path.name}, {info.weight_format}, {numerics}, {pipe.threads} threads", flush=True)
        search = Search(pipe.target)
        for context in contexts:
            if context + DECODED + 1 <= pipe.ctx_size:
                search.behind(context)
        threads = pipe.threads
    for name, border in search.borders.items():
        print(f"  {name:36} {border}")
    equal, different = (sum(getattr(b, which) for b in search.borders.values()) for which in ("equal", "different"))
    print(f"  all: {equal} equal, {different} different, {time.perf_counter() - start:.0f} s", flush=True)
    where = "; ".join(name for name, border in search.borders.items() if border.different) or "nowhere"
    row = (
        f"| {path.name} | {info.weight_format} | {numerics} | {threads} | {equal + different} | {len(search.borders)} |"
    )
    return f"{row} {where} |"


if __name__ == "__main__":
    main()
