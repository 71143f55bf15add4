"""From timed rounds to prices: medians, their uncertainty, and the tables that a policy reads."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence

import numpy as np

from dovetail.runtime.decoding.engine import PassCost
from dovetail.runtime.policies.base import PLAIN_TREE
from dovetail.runtime.policies.costs import Costs
from dovetail.runtime.trees.shape import TreeShape


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


@dataclasses.dataclass(slots=True)
class Sample:
    """One round, and how slow the machine was in its epoch. `is_switch`: the pass before had another number of rows."""

    context: int
    texts: int
    shape: TreeShape
    epoch: int
    cost: PassCost
    is_switch: bool = False
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


@dataclasses.dataclass(frozen=True, slots=True)
class Samples:
    """What was timed at one context with one number of texts, by the shape of their trees."""

    context: int
    texts: int
    by_shape: dict[TreeShape, list[Sample]]  # behind passes of as many rows
    switches: list[Sample]  # the others


def timing(values: Sequence[float]) -> Timing:
    """Of repeated times in milliseconds."""
    low, middle, high = np.percentile(values, [25, 50, 75]).tolist()
    return Timing(middle, (high - low) / middle if middle else 0.0, len(values))


def fitted(
    alone: Sequence[Samples], together: Sequence[Samples], nodes: Sequence[int], seconds: float, *, branches_cost: bool
) -> Latency:
    """The tables: passes and draft calls from texts that were timed `alone`, what a further text adds from those timed
    `together`. `nodes` are the tree sizes of the former, `seconds` how long it all took.
    """
    contexts = tuple(one.context for one in alone)
    verify: dict[tuple[int, int], Timing] = {}
    plain, passes, first, levels = [], [], [], []
    widths = tuple(
        sorted({rows for one in alone for samples in one.by_shape.values() for s in samples for rows, _ in s.levels})
    )
    everything: list[Sample] = []
    for one in alone:
        by_nodes: dict[int, list[float]] = defaultdict(list)
        by_width: dict[int, list[float]] = defaultdict(list)
        firsts: list[float] = []
        for shape, samples in one.by_shape.items():
            everything += samples
            by_nodes[shape.nodes] += [sample.verify_ms for sample in samples]
            for sample in samples:
                firsts += sample.first_ms
                for rows, ms in sample.levels:
                    by_width[rows].append(ms)
        for count in nodes:
            verify[one.context, count] = timing(by_nodes[count])
        timings = [verify[one.context, count] for count in nodes]
        plain.append(statistics.median(sample.cost.total_ms / sample.slowness for sample in one.by_shape[PLAIN_TREE]))
        passes.append(rising([timing.median for timing in timings], [timing.count for timing in timings]))
        first.append(statistics.median(firsts))
        of_widths = {rows: statistics.median(times) for rows, times in by_width.items()}
        counts = [len(by_width[rows]) for rows in widths]
        levels.append(rising(_filled(widths, of_widths), [max(count, 1) for count in counts]))
    text_ms = _of_a_text(together, alone, nodes, passes)
    all_rows, passes = _with_shared_rows(together, nodes, contexts, passes, text_ms)
    shared_plain = _shared_plain(alone, together, plain)
    costs = Costs(
        contexts=contexts,
        nodes=all_rows,
        widths=widths,
        plain_ms=tuple(plain),
        verify_ms=tuple(passes),
        first_ms=tuple(first),
        level_ms=tuple(levels),
        text_ms=tuple(text_ms(context) for context in contexts),
        shared_texts=tuple(shared_plain),
        shared_plain=tuple(shared_plain.values()),
        switch_ms=_of_a_switch([*alone, *together]),
        branches_cost=branches_cost,
        **_host([sample for sample in everything if sample.cost.draft_calls]),
    )
    error = statistics.median(timing.error for timing in verify.values())
    return Latency(costs, verify, error, len(everything), seconds)


def _of_a_switch(found: Sequence[Samples]) -> float:
    """What a pass costs more than another one of as many rows if the pass before had another number of rows."""
    extra = []
    for one in found:
        steady = {
            shape: statistics.median(sample.verify_ms for sample in samples)
            for shape, samples in one.by_shape.items()
            if samples
        }
        extra += [sample.verify_ms - steady[sample.shape] for sample in one.switches if sample.shape in steady]
    return max(statistics.median(extra), 0.0) if extra else 0.0


def _filled(points: Sequence[int], values: dict[int, float]) -> list[float]:
    """A value at every point, linear between those that there are."""
    known = sorted(values)
    return [float(np.interp(point, known, [values[one] for one in known])) for point in points]


def _of_a_text(
    together: Sequence[Samples], alone: Sequence[Samples], nodes: Sequence[int], passes: Sequence[Sequence[float]]
) -> Callable[[int], float]:
    """Context -> what every further text adds to a pass of as many rows: the median over passes of several texts less
    the pass of one, by a line over the contexts; never less than nothing.
    """
    contexts = [one.context for one in alone]
    medians = {}
    for context in sorted({one.context for one in together}):
        added = []
        for one in (one for one in together if one.context == context):
            for shape, samples in one.by_shape.items():
                rows = one.texts * shape.nodes
                if samples and shape != PLAIN_TREE and rows <= nodes[-1]:
                    at_contexts = [float(np.interp(rows, nodes, row)) for row in passes]
                    pass_ms = float(np.interp(context, contexts, at_contexts))
                    median = statistics.median(sample.verify_ms for sample in samples)
                    added.append((median - pass_ms) / (one.texts - 1))
        if added:
            medians[context] = statistics.median(added)
    points = sorted(medians)
    values = [max(medians[point], 0.0) for point in points]
    slope = max((values[-1] - values[0]) / (points[-1] - points[0]), 0.0) if len(points) > 1 else 0.0
    return lambda context: max(values[0] + slope * (context - points[0]), 0.0) if points else 0.0


def _shared_plain(alone: Sequence[Samples], together: Sequence[Samples], plain: Sequence[float]) -> dict[int, float]:
    """Number of texts -> a plain round of theirs over one of one text, at contexts where both were timed."""
    contexts = [one.context for one in alone]
    ratios: dict[int, list[float]] = defaultdict(list)
    for one in together:
        samples = one.by_shape.get(PLAIN_TREE)
        if samples:
            median = statistics.median(sample.cost.total_ms / sample.slowness for sample in samples)
            ratios[one.texts].append(median / float(np.interp(one.context, contexts, plain)))
    return {texts: statistics.median(ratios[texts]) for texts in sorted(ratios)}


def _with_shared_rows(
    together: Sequence[Samples],
    nodes: Sequence[int],
    contexts: Sequence[int],
    passes: Sequence[Sequence[float]],
    text_ms: Callable[[int], float],
) -> tuple[tuple[int, ...], list[tuple[float, ...]]]:
    """The table of passes with the row counts that only several texts together have: their passes less what the texts
    add, as multiples of the longest pass of one text.
    """
    ratios: dict[int, list[float]] = defaultdict(list)
    for one in together:
        longest = float(np.interp(one.context, contexts, [row[-1] for row in passes]))
        for shape, samples in one.by_shape.items():
            rows = one.texts * shape.nodes
            if samples and rows > nodes[-1]:
                median = statistics.median(sample.verify_ms for sample in samples)
                ratio = (median - (one.texts - 1) * text_ms(one.context)) / longest
                ratios[rows].append(max(ratio, 1.0))  # more rows are never cheaper
    further = sorted(ratios)
    extended = []
    for row in passes:
        values = [*row, *(row[-1] * statistics.median(ratios[rows]) for rows in further)]
        extended.append(rising(values, [1.0] * len(values)))
    return (*nodes, *further), extended


def _host(samples: Sequence[Sample]) -> dict[str, float]:
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
