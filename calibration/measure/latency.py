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
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager

import numpy as np

from dovetail.calibration.measure.pair import Pair
from dovetail.runtime.decoding.rounds import Round
from dovetail.runtime.errors import UserError
from dovetail.runtime.policies.base import PLAIN, FixedGrowth, Growth
from dovetail.runtime.policies.costs import Costs
from dovetail.runtime.trees.shape import TreeShape

CONTEXTS = (64, 256, 1024, 2048)
QUICK_CONTEXTS = (256, 1024)
NODES = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 14, 16, 20, 24, 32, 48, 64)
QUICK_NODES = (1, 2, 4, 6, 8, 10, 12, 16, 24, 32)
WIDTHS = (1, 2, 3, 4, 6, 8, 10)
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


class Probe:
    """A policy that grows the shape it is told, and notes when the draft's calls ended."""

    def __init__(self, pair: Pair) -> None:
        self.shape = PLAIN
        self._pair = pair
        self.calls_ms: list[float] = []  # of the last round, one a level

    def begin(self) -> None:
        """Nothing to forget."""

    def growth(self, room: int, context: int) -> Growth:
        """The shape's, watched."""
        self.calls_ms.clear()
        return _Watched(self.shape, self._pair, self.calls_ms)

    def observe(self, accept_length: int) -> None:
        """Nothing to learn."""


class _Watched:
    matches = None

    def __init__(self, shape: TreeShape, pair: Pair, calls_ms: list[float]) -> None:
        self._inner, self._pair, self._calls_ms = FixedGrowth(shape), pair, calls_ms
        self.width = shape.width
        self._then = 0.0

    def goes_on(self, depth: int, scores: Sequence[float]) -> bool:
        now = self._pair.draft_s
        if depth:
            self._calls_ms.append(1e3 * (now - self._then))
        self._then = now
        return self._inner.goes_on(depth, scores)

    def drafted(self, scores: Sequence[float]) -> int:
        return self._inner.drafted(scores)


def contexts_for(context_length: int, wanted: Sequence[int] = CONTEXTS) -> tuple[int, ...]:
    """Those of `wanted` that leave `ROOM`, and the longest that does. Raises `UserError` where none does."""
    limit = context_length - ROOM - 1
    if limit < 16:
        raise UserError(f"expected a context of at least {ROOM + 17} tokens, got {context_length}; nothing to measure")
    return tuple(sorted({min(context, limit) for context in wanted}))


def shapes_for(nodes: Sequence[int], width: int) -> list[TreeShape]:
    """Two trees of every size, broad and deep, so that levels of every width are timed, too."""
    shapes = []
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
    shapes = [PLAIN, *shapes_for(nodes, pair.width)]
    benches = [_Bench(pair, _tiled(text, context)) for context in contexts_for(pair.context_length, contexts)]
    for bench in benches:  # the prompts are read, and the engines' first calls are slow
        bench.visit(shapes[-1])
        bench.visit(PLAIN)
        bench.samples.clear()
    least = [(bench, part) for bench in benches for _ in range(_SWEEPS) for part in _parts(rng, shapes)]
    rng.shuffle(least)
    begun, visited = time.perf_counter(), 0
    while visited < len(least) or time.perf_counter() - begun < seconds:
        bench, part = least[visited] if visited < len(least) else _uncertain(rng, benches, shapes)
        for shape in part:
            bench.visit(shape, epoch=visited // _EPOCH)
        visited += 1
        progress(min((time.perf_counter() - begun) / seconds, visited / len(least), 1.0))
    progress(1.0)
    _level_out([sample for bench in benches for samples in bench.samples.values() for sample in samples])
    return _fitted(benches, nodes, time.perf_counter() - start)


def _parts(rng: random.Random, shapes: list[TreeShape]) -> list[list[TreeShape]]:
    """All shapes in random order, a few at a time: between them the context changes."""
    mixed = rng.sample(shapes, len(shapes))
    return [mixed[i : i + _PART] for i in range(0, len(mixed), _PART)]


def _uncertain(rng: random.Random, benches: list[_Bench], shapes: list[TreeShape]) -> tuple[_Bench, list[TreeShape]]:
    """A context, and some of the shapes whose medians are less certain than others' there."""
    bench = rng.choice(benches)
    errors = {shape: _timing(bench.times(shape)).error for shape in shapes}
    worst = sorted(shapes, key=errors.__getitem__, reverse=True)[: len(shapes) // 2 + 1]
    return bench, rng.sample(worst, min(_PART, len(worst)))


def _level_out(samples: Sequence[_Sample]) -> None:
    """Divide every sample by how slow the machine was in its epoch: a neighbour's load lasts for seconds and slows down
    all that is timed then. Epochs and points are fitted in turns, each by medians (median polish, Tukey 1977).
    """
    points: dict[tuple[int, TreeShape], list[_Sample]] = defaultdict(list)
    epochs: dict[int, list[_Sample]] = defaultdict(list)
    for sample in samples:
        points[sample.context, sample.shape].append(sample)
        epochs[sample.epoch].append(sample)
    slowness = dict.fromkeys(epochs, 1.0)
    for _ in range(_POLISHES):
        typical = {
            point: statistics.median(_total(sample.round) / slowness[sample.epoch] for sample in found)
            for point, found in points.items()
        }
        for epoch, found in epochs.items():
            slowness[epoch] = statistics.median(
                _total(sample.round) / typical[sample.context, sample.shape] for sample in found
            )
        middle = statistics.median(slowness[sample.epoch] for sample in samples)
        slowness = {epoch: value / middle for epoch, value in slowness.items()}
    for sample in samples:
        sample.slowness = slowness[sample.epoch]


def _tiled(text: Sequence[int], length: int) -> list[int]:
    return (list(text) * (length // len(text) + 1))[:length]


@dataclasses.dataclass(slots=True)
class _Sample:
    """One round, what each call of the draft took, and how slow the machine was in its epoch."""

    context: int
    shape: TreeShape
    epoch: int
    round: Round
    calls_ms: list[float]
    slowness: float = 1.0

    @property
    def verify_ms(self) -> float:
        return self.round.verify_ms / self.slowness

    @property
    def levels_ms(self) -> list[float]:
        return [ms / self.slowness for ms in self.calls_ms]


class _Bench:
    """One context: rounds on demand, rolled back when the text has grown."""

    def __init__(self, pair: Pair, prompt: list[int]) -> None:
        self._pair, self._prompt, self._probe = pair, prompt, Probe(pair)
        self.context = len(prompt)
        self._rounds: Iterator[Round] = iter(())
        self.samples: dict[TreeShape, list[_Sample]] = defaultdict(list)

    def visit(self, shape: TreeShape, epoch: int = 0) -> None:
        """Time a round of `shape`; of plain decoding a few, because its caches are warm when it comes in a row."""
        self._probe.shape = shape
        count = _BURST if shape == PLAIN else 1
        made = [self._next() for _ in range(count)]
        for done in made[_BURST // 3 :] if shape == PLAIN else made:
            if done.nodes == shape.nodes:
                sample = _Sample(self.context, shape, epoch, done, list(self._probe.calls_ms))
                self.samples[shape].append(sample)

    def times(self, shape: TreeShape) -> list[float]:
        """Passes of the target, as they were."""
        return [sample.round.verify_ms for sample in self.samples[shape]]

    def _next(self) -> Round:
        done = next(self._rounds, None)
        if done is None:
            self._rounds = self._pair.continue_from(self._prompt, self._probe)
            for _ in range(2):  # the prompt's token, and the round in which the draft reads the prompt, are no samples
                next(self._rounds)
            done = next(self._rounds)
        return done


def _timing(values: Sequence[float]) -> Timing:
    low, middle, high = np.percentile(values, [25, 50, 75]).tolist()
    return Timing(middle, (high - low) / middle if middle else 0.0, len(values))


def _fitted(benches: Sequence[_Bench], nodes: Sequence[int], seconds: float) -> Latency:
    contexts = tuple(bench.context for bench in benches)
    verify: dict[tuple[int, int], Timing] = {}
    plain, passes, first, levels = [], [], [], []
    widths: tuple[int, ...] = ()
    everything: list[_Sample] = []
    for bench in benches:
        by_nodes: dict[int, list[float]] = defaultdict(list)
        by_width: dict[int, list[float]] = defaultdict(list)
        firsts: list[float] = []
        for shape, samples in bench.samples.items():
            everything += samples
            by_nodes[shape.nodes] += [sample.verify_ms for sample in samples]
            for sample in samples:
                firsts += sample.levels_ms[:1]
                by_width[shape.width] += sample.levels_ms[1:]
        for count in nodes:
            verify[bench.context, count] = _timing(by_nodes[count])
        timings = [verify[bench.context, count] for count in nodes]
        plain.append(statistics.median(_total(sample.round) / sample.slowness for sample in bench.samples[PLAIN]))
        passes.append(rising([timing.median for timing in timings], [timing.count for timing in timings]))
        first.append(statistics.median(firsts))
        widths = tuple(sorted(width for width, calls in by_width.items() if calls))
        levels.append(rising([statistics.median(by_width[w]) for w in widths], [len(by_width[w]) for w in widths]))
    costs = Costs(
        contexts,
        tuple(nodes),
        widths,
        tuple(plain),
        tuple(passes),
        tuple(first),
        tuple(levels),
        *_host([sample for sample in everything if sample.calls_ms]),
    )
    error = statistics.median(timing.error for timing in verify.values())
    return Latency(costs, verify, error, len(everything), seconds)


def _total(done: Round) -> float:
    return done.draft_ms + done.verify_ms + done.host_ms


def _host(samples: Sequence[_Sample]) -> tuple[float, float, float]:
    """(a round, every level, every node) by least squares over the medians of equal rounds, none below 0."""
    groups: dict[tuple[int, int], list[float]] = defaultdict(list)
    for sample in samples:
        groups[len(sample.calls_ms), sample.round.nodes].append(sample.round.host_ms / sample.slowness)
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
    return float(solution[0]), float(solution[1]), float(solution[2])


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
            bench = _Bench(pair, [1] * min(contexts_for(pair.context_length)[-1], 256))
            bench.visit(tree)
            bench.samples.clear()
            start = time.perf_counter()
            while time.perf_counter() - start < seconds or len(bench.samples[tree]) < 8:
                bench.visit(tree)
            calls = [ms for sample in bench.samples[tree] for ms in sample.calls_ms[1:]]
            found[count] = statistics.median(bench.times(tree)), statistics.median(calls)
            pair.close()
    best = [counts[0], counts[0]]
    for count in counts[1:]:
        for engine in (0, 1):
            if found[count][engine] < 0.95 * found[best[engine]][engine]:
                best[engine] = count
    return (best[0], best[1]), found
