"""What a round costs on this host: every part timed inside real rounds, interleaved, with its spread.

A pass of the target behind several calls of the draft is not the pass of plain decoding: the caches are cold, and the
draft's threads have just gone to sleep. So nothing is timed alone; rounds of all sizes follow one another.
"""

from __future__ import annotations

import dataclasses
import math
import random
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import numpy as np

from dovetail.calibration.measure.pair import Pair, Rounds
from dovetail.runtime.decoding.engine import PassCost
from dovetail.runtime.errors import UserError
from dovetail.runtime.policies.base import PLAIN_TREE
from dovetail.runtime.policies.costs import Costs
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
_BURST = 12  # plain rounds in a row, of which the first third is not counted: plain decoding finds its caches warm
_SWEEPS = 2  # visits of every shape at every context, at least
_PART = 4  # shapes in a row at one context
_EPOCH = 3  # parts that count as one moment of the machine
_POLISHES = 4

Progress = Callable[[float], None]
"""Told the share that is done."""


@dataclasses.dataclass(frozen=True, slots=True)
class Timing:
    """Repeated times of one thing, in milliseconds."""

    median: float
    spread: float  # interquartile range over median
    count: int

    @property
    def error(self) -> float:
        """Standard error of the median over the median, for a normal distribution's ratio of quartiles to width."""
        return 0.93 * self.spread / math.sqrt(self.count)


@dataclasses.dataclass(frozen=True, slots=True)
class Latency:
    """The costs, and what they were smoothed from."""

    costs: Costs
    verify: dict[tuple[int, int], Timing]  # (context, nodes); one node: a plain pass
    error: float  # median over all points of the target's pass
    rounds: int
    seconds: float


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
    least = [(bench, part) for bench in benches for _ in range(_SWEEPS) for part in _parts(rng, bench.shapes)]
    rng.shuffle(least)
    begun, visited = time.perf_counter(), 0
    while visited < len(least) or time.perf_counter() - begun < seconds:
        bench, part = least[visited] if visited < len(least) else _uncertain(rng, benches)
        for shape in part:
            bench.visit(shape, epoch=visited // _EPOCH)
        visited += 1
        progress(min((time.perf_counter() - begun) / seconds, visited / len(least), 1.0))
    progress(1.0)
    for bench in benches:
        bench.close()
    _level_out([sample for bench in benches for samples in bench.samples.values() for sample in samples])
    alone = [bench for bench in benches if bench.texts == 1]
    together = [bench for bench in benches if bench.texts > 1]
    return _fitted(alone, together, nodes, time.perf_counter() - start)


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
    errors = {shape: _timing(bench.times(shape)).error for shape in bench.shapes if bench.times(shape)}
    worst = sorted(errors, key=errors.__getitem__, reverse=True)[: len(errors) // 2 + 1]
    return bench, rng.sample(worst, min(_PART, len(worst)))


def _level_out(samples: Sequence[_Sample]) -> None:
    """Divide every sample by how slow the machine was in its epoch: a neighbour's load lasts for seconds and slows down
    all that is timed then. Epochs and points are fitted in turns, each by medians (median polish, Tukey 1977).
    """
    points: dict[tuple[int, int, TreeShape], list[_Sample]] = defaultdict(list)
    epochs: dict[int, list[_Sample]] = defaultdict(list)
    for sample in samples:
        points[sample.texts, sample.context, sample.shape].append(sample)
        epochs[sample.epoch].append(sample)
    slowness = dict.fromkeys(epochs, 1.0)
    for _ in range(_POLISHES):
        typical = {
            point: statistics.median(sample.cost.total_ms / slowness[sample.epoch] for sample in found)
            for point, found in points.items()
        }
        for epoch, found in epochs.items():
            slowness[epoch] = statistics.median(
                sample.cost.total_ms / typical[sample.texts, sample.context, sample.shape] for sample in found
            )
        middle = statistics.median(slowness[sample.epoch] for sample in samples)
        slowness = {epoch: value / middle for epoch, value in slowness.items()}
    for sample in samples:
        sample.slowness = slowness[sample.epoch]


def _tiled(text: Sequence[int], length: int) -> list[int]:
    return (list(text) * (length // len(text) + 1))[:length]


@dataclasses.dataclass(slots=True)
class _Sample:
    """One round, and how slow the machine was in its epoch."""

    context: int
    texts: int
    shape: TreeShape
    epoch: int
    cost: PassCost
    slowness: float = 1.0

    @property
    def verify_ms(self) -> float:
        return self.cost.verify_ms / self.slowness

    @property
    def host_ms(self) -> float:
        return self.cost.host_ms / self.slowness

    @property
    def first_ms(self) -> list[float]:
        """Of the calls that read what was verified."""
        return [call.ms / self.slowness for call in self.cost.draft_calls if call.reads_text]

    @property
    def levels(self) -> list[tuple[int, float]]:
        """Rows and milliseconds of the further calls."""
        return [(call.rows, call.ms / self.slowness) for call in self.cost.draft_calls if not call.reads_text]


class Bench:
    """One context and number of texts: rounds on demand."""

    def __init__(self, pair: Pair, prompt: list[int], shapes: list[TreeShape], texts: int = 1) -> None:
        self.context, self.texts, self.shapes = len(prompt), texts, shapes
        self._rounds: Rounds = pair.rounds(prompt, texts, ROOM)
        self.samples: dict[TreeShape, list[_Sample]] = defaultdict(list)

    def visit(self, shape: TreeShape, epoch: int = 0) -> None:
        """Time a round of `shape`; of plain decoding a few, because its caches are warm when it comes in a row."""
        count = _BURST if shape == PLAIN_TREE else 1
        costs = [self._rounds.next(shape) for _ in range(count)]
        for cost in costs[_BURST // 3 :] if shape == PLAIN_TREE else costs:
            if cost.rows == self.texts * shape.nodes:
                self.samples[shape].append(_Sample(self.context, self.texts, shape, epoch, cost))

    def times(self, shape: TreeShape) -> list[float]:
        """Passes of the target, as they were."""
        return [sample.cost.verify_ms for sample in self.samples[shape]]

    def close(self) -> None:
        """Forget the texts."""
        self._rounds.close()


def _timing(values: Sequence[float]) -> Timing:
    low, middle, high = np.percentile(values, [25, 50, 75]).tolist()
    return Timing(middle, (high - low) / middle if middle else 0.0, len(values))


def _fitted(alone: Sequence[Bench], together: Sequence[Bench], nodes: Sequence[int], seconds: float) -> Latency:
    contexts = tuple(bench.context for bench in alone)
    verify: dict[tuple[int, int], Timing] = {}
    plain, passes, first, levels = [], [], [], []
    widths = tuple(
        sorted({rows for bench in alone for samples in bench.samples.values() for s in samples for rows, _ in s.levels})
    )
    everything: list[_Sample] = []
    for bench in alone:
        by_nodes: dict[int, list[float]] = defaultdict(list)
        by_width: dict[int, list[float]] = defaultdict(list)
        firsts: list[float] = []
        for shape, samples in bench.samples.items():
            everything += samples
            by_nodes[shape.nodes] += [sample.verify_ms for sample in samples]
            for sample in samples:
                firsts += sample.first_ms
                for rows, ms in sample.levels:
                    by_width[rows].append(ms)
        for count in nodes:
            verify[bench.context, count] = _timing(by_nodes[count])
        timings = [verify[bench.context, count] for count in nodes]
        plain.append(statistics.median(sample.cost.total_ms / sample.slowness for sample in bench.samples[PLAIN_TREE]))
        passes.append(rising([timing.median for timing in timings], [timing.count for timing in timings]))
        first.append(statistics.median(firsts))
        of_widths = {rows: statistics.median(times) for rows, times in by_width.items()}
        counts = [len(by_width[rows]) for rows in widths]
        levels.append(rising(_filled(widths, of_widths), [max(count, 1) for count in counts]))
    text_ms = _of_a_text(together, alone, nodes, passes)
    all_rows, passes = _with_shared_rows(together, nodes, contexts, passes, text_ms)
    costs = Costs(
        contexts=contexts,
        nodes=all_rows,
        widths=widths,
        plain_ms=tuple(plain),
        verify_ms=tuple(passes),
        first_ms=tuple(first),
        level_ms=tuple(levels),
        text_ms=tuple(text_ms(context) for context in contexts),
        **_host([sample for sample in everything if sample.cost.draft_calls]),
    )
    error = statistics.median(timing.error for timing in verify.values())
    return Latency(costs, verify, error, len(everything), seconds)


def _filled(points: Sequence[int], values: dict[int, float]) -> list[float]:
    """A value at every point, linear between those that there are."""
    known = sorted(values)
    return [float(np.interp(point, known, [values[one] for one in known])) for point in points]


def _of_a_text(
    together: Sequence[Bench], alone: Sequence[Bench], nodes: Sequence[int], passes: Sequence[Sequence[float]]
) -> Callable[[int], float]:
    """Context -> what every further text adds to a pass of as many rows: the median over passes of several texts less
    the pass of one, by a line over the contexts; never less than nothing.
    """
    contexts = [bench.context for bench in alone]
    medians = {}
    for context in sorted({bench.context for bench in together}):
        added = []
        for bench in (bench for bench in together if bench.context == context):
            for shape, samples in bench.samples.items():
                rows = bench.texts * shape.nodes
                if samples and rows <= nodes[-1]:
                    one = [np.interp(rows, nodes, row) for row in passes]
                    pass_ms = float(np.interp(context, contexts, one))
                    median = statistics.median(sample.verify_ms for sample in samples)
                    added.append((median - pass_ms) / (bench.texts - 1))
        if added:
            medians[context] = statistics.median(added)
    points = sorted(medians)
    values = [max(medians[point], 0.0) for point in points]
    slope = max((values[-1] - values[0]) / (points[-1] - points[0]), 0.0) if len(points) > 1 else 0.0
    return lambda context: max(values[0] + slope * (context - points[0]), 0.0) if points else 0.0


def _with_shared_rows(
    together: Sequence[Bench],
    nodes: Sequence[int],
    contexts: Sequence[int],
    passes: Sequence[Sequence[float]],
    text_ms: Callable[[int], float],
) -> tuple[tuple[int, ...], list[tuple[float, ...]]]:
    """The table of passes with the row counts that only several texts together have: their passes less what the texts
    add, as multiples of the longest pass of one text.
    """
    ratios: dict[int, list[float]] = defaultdict(list)
    for bench in together:
        longest = float(np.interp(bench.context, contexts, [row[-1] for row in passes]))
        for shape, samples in bench.samples.items():
            rows = bench.texts * shape.nodes
            if samples and rows > nodes[-1]:
                median = statistics.median(sample.verify_ms for sample in samples)
                ratios[rows].append((median - (bench.texts - 1) * text_ms(bench.context)) / longest)
    further = sorted(ratios)
    extended = []
    for row in passes:
        values = [*row, *(row[-1] * statistics.median(ratios[rows]) for rows in further)]
        extended.append(rising(values, [1.0] * len(values)))
    return (*nodes, *further), extended


def _host(samples: Sequence[_Sample]) -> dict[str, float]:
    """The host's time of a round, of every level and every node: least squares over the medians of equal rounds, none
    below 0.
    """
    groups: dict[tuple[int, int], list[float]] = defaultdict(list)
    for sample in samples:
        groups[len(sample.cost.draft_calls), sample.cost.rows].append(sample.host_ms)
    rows = np.array([[1, depth, nodes] for depth, nodes in groups], np.float64)
    weights = np.sqrt([len(values) for values in groups.values()])
    medians = np.array([statistics.median(values) for values in groups.values()])
    active = [0, 1, 2]
    while True:
        fit = np.linalg.lstsq(rows[:, active] * weights[:, None], medians * weights, rcond=None)[0]
        if (fit >= 0).all() or len(active) == 1:
            break
        active.remove(active[int(fit.argmin())])
    solution = np.zeros(3)
    solution[active] = np.maximum(fit, 0)
    names = ("host_ms", "host_level_ms", "host_node_ms")
    return {name: float(value) for name, value in zip(names, solution, strict=True)}


def rising(values: Sequence[float], weights: Sequence[float]) -> tuple[float, ...]:
    """The nearest values, by weighted squares, that never fall: pool adjacent violators (Ayer et al. 1955).

    More nodes are never cheaper; where the medians say so it is noise.
    """
    pools: list[tuple[float, float, int]] = []  # mean, weight, length
    for value, weight in zip(values, weights, strict=True):
        mean, total, length = float(value), float(weight), 1
        while pools and pools[-1][0] >= mean:
            before, its_weight, its_length = pools.pop()
            mean = (before * its_weight + mean * total) / (its_weight + total)
            total, length = total + its_weight, length + its_length
        pools.append((mean, total, length))
    return tuple(mean for mean, _, length in pools for _ in range(length))


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
