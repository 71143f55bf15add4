"""What a round costs on this host: every part timed inside real rounds, interleaved, with its spread.

A pass of the target behind several calls of the draft is not the pass of plain decoding: the caches are cold, and the
draft's threads have just gone to sleep. So nothing is timed alone. Rounds of all sizes follow one another, a few of
each in a row: the first of them has the price of another size than the one before, the others have not.
"""

from __future__ import annotations

import random
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

from dovetail.calibration.measure.pair import Pair, Rounds
from dovetail.calibration.measure.price_tables import Latency, Sample, Samples, fitted, timing
from dovetail.runtime.errors import UserError
from dovetail.runtime.policies.base import PLAIN_TREE
from dovetail.runtime.trees.shape import TreeShape

CONTEXTS = (64, 256, 1024, 2048)
QUICK_CONTEXTS = (256, 1024)
NODES = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 14, 16, 20, 24, 32, 48, 64)
QUICK_NODES = (1, 2, 4, 6, 8, 10, 12, 16, 24, 32)
WIDTHS = (1, 2, 3, 4, 6, 8, 10)
TEXTS = (2, 4, 8)  # that share a pass
SHARED_CONTEXTS = (64, 256)  # of each of them; what a text adds grows with its context along a line
SHARED_NODES = {2: (1, 4, 8), 4: (1, 4, 16), 8: (1, 2, 4, 8, 12, 16)}  # of each text's tree
ROOM = 192  # tokens that a text may grow behind its context before it is rolled back
_ROW = 3  # rounds of a shape in a row
_BURST = 12  # plain rounds in a row, of which the first third is not counted: plain decoding finds its caches warm
_SWEEPS = 2  # visits of every shape at every context, at least
_PART = 4  # shapes in a row at one context
_POLISHES = 4

Progress = Callable[[float], None]
"""Told the share that is done."""


def contexts_for(context_length: int, wanted: Sequence[int] = CONTEXTS) -> tuple[int, ...]:
    """Those of `wanted` that leave `ROOM`, and the longest that does. Raises `UserError` where none does."""
    limit = context_length - ROOM - 1
    if limit < 16:
        raise UserError(f"expected a context of at least {ROOM + 17} tokens, got {context_length}; nothing to measure")
    return tuple(sorted({min(context, limit) for context in wanted}))


def shapes_for(nodes: Sequence[int], width: int) -> list[TreeShape]:
    """Two trees of every size, broad and deep, so that levels of every width are timed, too."""
    shapes: list[TreeShape] = []
    widths = [w for w in WIDTHS if w <= width]
    for i, count in enumerate(nodes[1:]):
        for rows in {widths[i % len(widths)], widths[-1 - i % len(widths)]}:
            depth = 1
            while (rows if depth == 1 else rows + (depth - 1) * rows * rows) < count - 1:
                depth += 1
            shapes.append(TreeShape(count, min(max(depth, 2 + i % 3), 64), rows))
    return shapes


def measure(
    pair: Pair,
    text: Sequence[int],
    *,
    seconds: float,
    nodes: Sequence[int] = NODES,
    contexts: Sequence[int] = CONTEXTS,
    seed: int = 0,
    progress: Progress = lambda share: None,
) -> Latency:
    """Time rounds behind the first tokens of `text` (repeated as needed) for about `seconds`, and at least so long that
    every shape of tree was visited twice at each context. Where medians are least certain the rest of the time is
    spent. Raises `UserError` when the model's context is too short for any.
    """
    rng, start = random.Random(seed), time.perf_counter()
    shapes = [PLAIN_TREE, *shapes_for(nodes, pair.width)]
    benches = [Bench(pair, _tiled(text, context), shapes) for context in contexts_for(pair.context_length, contexts)]
    for texts in TEXTS:
        shared = [_shared_shape(count, pair.width) for count in SHARED_NODES[texts]]
        for context in contexts_for(pair.context_length, SHARED_CONTEXTS)[: len(SHARED_CONTEXTS)]:
            benches.append(Bench(pair, _tiled(text, context), shared, texts))
    for bench in benches:  # the prompts are read, and the engines' first calls are slow
        bench.visit(bench.shapes[-1])
        bench.visit(PLAIN_TREE)
        bench.samples.clear()
        bench.switches.clear()
    least = [(bench, part) for bench in benches for _ in range(_SWEEPS) for part in _parts(rng, bench.shapes)]
    rng.shuffle(least)
    begun, visited = time.perf_counter(), 0
    while visited < len(least) or time.perf_counter() - begun < seconds:
        bench, part = least[visited] if visited < len(least) else _uncertain(rng, benches)
        for shape in part:
            bench.visit(shape, epoch=visited)  # a part is one moment of the machine
        visited += 1
        progress(min((time.perf_counter() - begun) / seconds, visited / len(least), 1.0))
    progress(1.0)
    for bench in benches:
        bench.close()
    _level_out(
        [sample for bench in benches for samples in (*bench.samples.values(), bench.switches) for sample in samples]
    )
    alone, together = (
        [
            Samples(bench.context, bench.texts, bench.samples, bench.switches)
            for bench in benches
            if (bench.texts > 1) is shared
        ]
        for shared in (False, True)
    )
    return fitted(alone, together, nodes, time.perf_counter() - start, branches_cost=pair.branches_cost)


def _shared_shape(nodes: int, width: int) -> TreeShape:
    if nodes == 1:
        return PLAIN_TREE
    rows = min(4, width)
    return TreeShape(nodes, 2 + nodes // 8, rows)


def _parts(rng: random.Random, shapes: list[TreeShape]) -> list[list[TreeShape]]:
    """All shapes in random order, a few at a time: between them the context changes."""
    mixed = rng.sample(shapes, len(shapes))
    return [mixed[i : i + _PART] for i in range(0, len(mixed), _PART)]


def _uncertain(rng: random.Random, benches: list[Bench]) -> tuple[Bench, list[TreeShape]]:
    """A context, and some of the shapes whose medians are less certain than others' there."""
    bench = rng.choice(benches)
    errors = {shape: timing(bench.times(shape)).error for shape in bench.shapes if bench.times(shape)}
    worst = sorted(errors, key=errors.__getitem__, reverse=True)[: len(errors) // 2 + 1]
    return bench, rng.sample(worst, min(_PART, len(worst)))


def _level_out(samples: Sequence[Sample]) -> None:
    """Divide every sample by how slow the machine was in its epoch: a neighbour's load lasts for seconds and slows down
    all that is timed then. Epochs and points are fitted in turns, each by medians (median polish, Tukey 1977).
    """
    points: dict[tuple[int, int, TreeShape, bool], list[Sample]] = defaultdict(list)
    epochs: dict[int, list[Sample]] = defaultdict(list)
    for sample in samples:
        points[sample.texts, sample.context, sample.shape, sample.is_switch].append(sample)
        epochs[sample.epoch].append(sample)
    slowness = dict.fromkeys(epochs, 1.0)
    for _ in range(_POLISHES):
        typical = {
            point: statistics.median(sample.cost.total_ms / slowness[sample.epoch] for sample in found)
            for point, found in points.items()
        }
        for epoch, found in epochs.items():
            slowness[epoch] = statistics.median(
                sample.cost.total_ms / typical[sample.texts, sample.context, sample.shape, sample.is_switch]
                for sample in found
            )
        middle = statistics.median(slowness[sample.epoch] for sample in samples)
        slowness = {epoch: value / middle for epoch, value in slowness.items()}
    for sample in samples:
        sample.slowness = slowness[sample.epoch]


def _tiled(text: Sequence[int], length: int) -> list[int]:
    return (list(text) * (length // len(text) + 1))[:length]


class Bench:
    """One context and number of texts: rounds on demand."""

    def __init__(self, pair: Pair, prompt: list[int], shapes: list[TreeShape], texts: int = 1) -> None:
        self.context, self.texts, self.shapes = len(prompt), texts, shapes
        self._rounds: Rounds = pair.rounds(prompt, texts, ROOM)
        self.samples: dict[TreeShape, list[Sample]] = defaultdict(list)
        self.switches: list[Sample] = []

    def visit(self, shape: TreeShape, epoch: int = 0) -> None:
        """Time some rounds of `shape`; of plain decoding more, because its caches are warm when it comes in a row."""
        is_plain = shape == PLAIN_TREE
        costs = [self._rounds.next(shape) for _ in range(_BURST if is_plain else _ROW)]
        unlike = _BURST // 3 if is_plain else 1  # the first ones, which are not like the rest
        for i, cost in enumerate(costs):
            if cost.rows != self.texts * shape.nodes:  # the draft had no more to give
                continue
            sample = Sample(self.context, self.texts, shape, epoch, cost, is_switch=i == 0)
            if i >= unlike:
                self.samples[shape].append(sample)
            elif not is_plain:
                self.switches.append(sample)

    def times(self, shape: TreeShape) -> list[float]:
        """Passes of the target, as they were."""
        return [sample.cost.verify_ms for sample in self.samples[shape]]

    def close(self) -> None:
        """Forget the texts."""
        self._rounds.close()


def fastest_threads(
    opening: Callable[[int], AbstractContextManager[Pair]], counts: Sequence[int], seconds: float = 4.0
) -> tuple[tuple[int, int], dict[int, tuple[float, float]]]:
    """((target's, draft's) best number of threads, and per number the milliseconds of a pass of 8 nodes and of a draft
    call). The first of `counts` stays unless another is faster by more than 5 %: they can't be interleaved, and noise
    should not decide.
    """
    found: dict[int, tuple[float, float]] = {}
    tree = TreeShape(8, 3, 4)
    for count in counts:
        with opening(count) as pair:
            bench = Bench(pair, [1] * min(contexts_for(pair.context_length)[-1], 256), [tree])
            bench.visit(tree)
            bench.samples.clear()
            start = time.perf_counter()
            while time.perf_counter() - start < seconds or len(bench.samples[tree]) < 8:
                bench.visit(tree)
            calls = [ms for sample in bench.samples[tree] for _, ms in sample.levels]
            found[count] = statistics.median(bench.times(tree)), statistics.median(calls)
            bench.close()
    best = [counts[0], counts[0]]
    for count in counts[1:]:
        for engine in (0, 1):
            if found[count][engine] < 0.95 * found[best[engine]][engine]:
                best[engine] = count
    return (best[0], best[1]), found
