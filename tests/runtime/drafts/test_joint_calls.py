"""Proves that texts which share a draft's calls get the trees that each would get alone, wherever their rows lie; that
what goes wrong with one costs no other its text; and that rows, memory and bound calls do not pile up.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from texts.drafted_texts import BUDGET, DraftedText, ExportedDrafts, agreed_depth, scores_of, text_of

from dovetail.runtime.drafts.base import Draft
from dovetail.runtime.drafts.graph_contract import Children, DraftCall, DraftGraph
from dovetail.runtime.drafts.guard import GuardedDraft
from dovetail.runtime.drafts.joint_calls import MAX_ROWS, JointCalls
from dovetail.runtime.drafts.model_draft import ModelDraft
from dovetail.runtime.drafts.onnxruntime_graph import MAX_BOUND, OnnxRuntimeGraph
from dovetail.runtime.drafts.row_pool import ROWS_A_BLOCK, RowPool
from dovetail.runtime.policies.base import DepthBudget, TreeBudget
from dovetail.runtime.trees.tree import CandidateTree
from dovetail.runtime.trees.verified import Verified

KINDS, DEVICES = ["dgf", "eagle3", "lm"], ["cpu", "openvino:CPU"]
CLOSE = 1e-3  # nats
GROUP = MAX_ROWS // BUDGET.width  # texts that share a call


@pytest.fixture(scope="module")
def exported(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> ExportedDrafts:
    return ExportedDrafts(tiny_checkpoint, tmp_path_factory.mktemp("drafts"))


def guarded(graph: DraftGraph, seed: int) -> DraftedText:
    return text_of(graph, GuardedDraft(ModelDraft(graph)), seed)


def failure(one: DraftedText) -> str | None:
    assert isinstance(one.draft, GuardedDraft)
    return one.draft.failure


def rows_of(draft: Draft) -> list[int]:
    """Blocks of rows that a text holds, in its order."""
    assert isinstance(draft, GuardedDraft)
    assert isinstance(draft._draft, ModelDraft)
    return draft._draft._table._blocks


def grow_together(
    calls: JointCalls, texts: Sequence[DraftedText], budget: TreeBudget = BUDGET
) -> tuple[list[CandidateTree], int]:
    """The trees, and how many calls they took."""
    growths = [one.draft.grow(one.tokens[-1], budget) for one in texts]
    times = calls.grow(growths, budget.width)
    return [growth.candidates for growth in growths], len(times)


@dataclasses.dataclass
class Twins:
    """One text twice: `ours` shares its calls, `alone` has a graph for itself."""

    ours: DraftedText
    alone: DraftedText

    @classmethod
    def begun(cls, graphs: Sequence[DraftGraph], seed: int, length: int) -> Twins:
        made = cls(*(guarded(graph, seed) for graph in graphs))
        made.each("go_on", length)
        return made

    def each(self, what: str, *args: int) -> None:
        for one in (self.ours, self.alone):
            getattr(one, what)(*args)

    def close(self) -> None:
        for one in (self.ours, self.alone):
            one.draft.close()


class Company:
    """Texts that grow together and each alone."""

    def __init__(self, exported: ExportedDrafts, kind: str, device: str) -> None:
        self.graphs = [exported.open(kind, device) for _ in range(2)]
        self.joint, self._single = map(JointCalls, self.graphs)
        self.twins: list[Twins] = []

    def begin(self, *lengths: int) -> None:
        self.twins += [Twins.begun(self.graphs, 100 * i + length, length) for i, length in enumerate(lengths)]

    def compare(self, budget: DepthBudget = BUDGET) -> float:
        """Grow all trees both ways; to which depth they are the same, on the average."""
        trees, _ = grow_together(self.joint, [twins.ours for twins in self.twins], budget)
        depths = []
        for twins, tree in zip(self.twins, trees, strict=True):
            expected = scores_of(twins.alone.grow(self._single, budget))
            assert len(expected) == len(scores_of(tree)) > 0
            depths.append(agreed_depth(scores_of(tree), expected, CLOSE))
            assert failure(twins.ours) is None
        return float(np.mean(depths))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", KINDS)
def test_together_is_as_each_alone(exported: ExportedDrafts, kind: str, device: str) -> None:
    """Over many rounds, beside prompts of hundreds of tokens, with texts that are rolled back, that end and that begin
    in between, so that rows of all lie scattered among each other's.
    """
    company, rng = Company(exported, kind, device), np.random.default_rng(0)
    company.begin(3, 300, 20, 70, 1)
    depths, scattered = [company.compare()], False
    for turn in range(8):
        for twins in company.twins:
            twins.each("go_on", int(rng.integers(1, 6)))
        if turn in (1, 4):
            twins = company.twins[turn]
            twins.each("cut", len(twins.ours.tokens) // 2)
            twins.each("go_on", 2)
        if turn in (2, 5):  # its rows are taken by those that grow, and by the new one
            company.twins.pop(0).close()
            company.twins[0].each("go_on", 90)
            company.begin(40, 17)
        if turn == 3:
            company.twins.pop(1).close()
            company.begin(280)
        depths.append(company.compare(BUDGET if turn % 3 else DepthBudget(3, 2)))
        blocks = [rows_of(twins.ours.draft) for twins in company.twins]
        scattered |= any(one != list(range(min(one), min(one) + len(one))) for one in blocks)
    assert scattered, "the test was to scatter rows"
    assert np.mean(depths) > 0.8 * BUDGET.depth
    for twins in company.twins:
        twins.close()
    for graph in company.graphs:
        assert graph.pool.num_free == graph.pool.max_blocks


@pytest.mark.parametrize("kind", KINDS)
def test_levels_of_several_texts_are_one_call(exported: ExportedDrafts, kind: str) -> None:
    company = Company(exported, kind, "cpu")
    company.begin(*range(5, 5 + GROUP))
    texts = [twins.ours for twins in company.twins]
    assert grow_together(company.joint, texts)[1] == BUDGET.depth
    company.begin(3)
    for twins in company.twins:
        twins.each("go_on", 2)
    texts.append(company.twins[-1].ours)
    assert grow_together(company.joint, texts)[1] == 2 * BUDGET.depth, f"{GROUP} share a call at most"
    for one in texts:
        one.go_on(2)
    texts[1].go_on(200)
    assert grow_together(company.joint, texts)[1] == 2 * BUDGET.depth + 1, "a long text is read before, alone"


def test_a_text_that_grows_less_deep_leaves_the_others(exported: ExportedDrafts) -> None:
    """And one that has nothing to read yet takes no part."""
    graph, other = (exported.open("dgf", "cpu") for _ in range(2))
    texts, twins = ([guarded(one, seed) for seed in range(4)] for one in (graph, other))
    budgets = [DepthBudget(depth, 3) for depth in (1, 5, 3, 4)]
    for one in (*texts[:3], *twins[:3]):
        one.go_on(9)
    growths = [one.draft.grow(one.tokens[-1], budget) for one, budget in zip(texts, budgets, strict=True)]
    times = JointCalls(graph).grow(growths, 3)
    assert [time.rows for time in times] == [27, 6, 6, 3, 3]
    assert [time.reads_text for time in times] == [True, False, False, False, False]
    assert len(growths[3].candidates) == 0
    for growth, twin, budget in zip(growths[:3], twins, budgets, strict=False):
        expected = scores_of(twin.grow(JointCalls(other), budget))
        assert agreed_depth(scores_of(growth.candidates), expected, CLOSE) == budget.depth


# What must not pile up.


@pytest.mark.parametrize("device", DEVICES)
def test_a_thousand_texts_need_the_rows_of_those_that_run(exported: ExportedDrafts, device: str) -> None:
    graph: Any = exported.open("dgf", device, context_length=100_000)
    calls, rng, running = JointCalls(graph), np.random.default_rng(1), list[DraftedText]()
    rows = set()
    for number in range(1000):
        running.append(guarded(graph, number))
        running[-1].go_on(int(rng.integers(1, 40)))
        if len(running) == 6:
            grow_together(calls, running, DepthBudget(2, 2))
            rows.add(graph._rows)
            for _ in range(4):
                running.pop(int(rng.integers(len(running)))).draft.close()
    for one in running:
        one.draft.close()
    assert len(rows) == 1
    assert graph.pool.num_free == graph.pool.max_blocks
    assert graph.pool._begun <= 6 * 2
    if isinstance(graph, OnnxRuntimeGraph):
        assert len(graph._bound) <= MAX_BOUND


def test_sizes_of_calls_are_bound_and_forgotten(exported: ExportedDrafts) -> None:
    """However many sizes there are; and a size that was forgotten is bound again."""
    graph = exported.open("lm", "cpu")
    assert isinstance(graph, OnnxRuntimeGraph)
    calls, sizes = JointCalls(graph), 0
    company = Company(exported, "lm", "cpu")
    company.begin(4)
    for count in range(1, MAX_BOUND + 9):
        one = guarded(graph, count)
        one.go_on(count)
        one.grow(calls, DepthBudget(1, 1))
        one.draft.close()
        sizes = max(sizes, len(graph._bound))
    assert sizes == len(graph._bound) == MAX_BOUND
    again = guarded(graph, 4)  # the first text of the company
    again.go_on(4)
    expected = scores_of(company.twins[0].alone.grow(JointCalls(company.graphs[1])))
    assert agreed_depth(scores_of(again.grow(calls)), expected, CLOSE) == BUDGET.depth


# What goes wrong.


class Failing:
    """A graph whose call for several texts fails, or whose answers to some are spoilt."""

    def __init__(self, graph: DraftGraph, *, when: int = 0) -> None:
        self._graph, self._when, self.shared = graph, when, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._graph, name)

    def run(self, calls: Sequence[DraftCall]) -> list[Children]:
        if len(calls) > 1:
            self.shared += 1
            if self.shared > self._when:
                raise RuntimeError("out of memory")
        return self._graph.run(calls)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("when", [0, 2])
def test_a_shared_call_that_fails_stops_no_text(
    exported: ExportedDrafts, device: str, when: int, caplog: pytest.LogCaptureFixture
) -> None:
    """The draft forgets the texts, calls for each alone from then on, and goes on as if each had begun there."""
    graph, other = (exported.open("dgf", device) for _ in range(2))
    failing: Any = Failing(graph, when=when)
    calls, texts = JointCalls(failing), [guarded(graph, seed) for seed in range(3)]
    for one in texts:
        one.go_on(8)
    trees, _ = grow_together(calls, texts)
    assert [tree.depth for tree in trees] == [when] * 3, "what had grown may be verified"
    assert len(caplog.records) == 1
    assert "out of memory" in caplog.text
    assert graph.pool.num_free == graph.pool.max_blocks
    for turn in range(3):
        for one in texts:
            one.go_on(3)
        trees, count = grow_together(calls, texts)
        assert count == 3 * BUDGET.depth
        for one, tree in zip(texts, trees, strict=True):
            assert failure(one) is None
            expected = begun_at(other, one, 8)
            assert agreed_depth(scores_of(tree), expected, CLOSE) >= BUDGET.depth - 1, turn
    assert len(caplog.records) == 1


def begun_at(graph: DraftGraph, one: DraftedText, begin: int) -> dict[tuple[int, ...], float]:
    """The tree of a draft that was told of the text from position `begin` on."""
    draft = ModelDraft(graph)
    draft.tell(Verified(begin, np.array(one.tokens[begin:]), one.features[begin:]))
    growth = draft.grow(one.tokens[-1], BUDGET)
    JointCalls(graph).grow([growth], BUDGET.width)
    draft.close()
    return scores_of(growth.candidates)


def tell_no_numbers(one: DraftedText) -> None:
    """Two more tokens, whose features are none."""
    begin = len(one.features)
    new = np.full((2, one.features.shape[1]), np.nan, np.float32)
    one.tokens += [5, 6]
    one.features = np.concatenate([one.features, new])
    one.draft.tell(Verified(begin, np.array(one.tokens[begin:]), new))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", ["dgf", "eagle3"])
def test_no_numbers_end_the_draft_of_one_text(
    exported: ExportedDrafts, kind: str, device: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Those that share its call, and those that get its rows afterwards, draft as ever: a mask does not keep out what
    is no number, so all of them call alone from then on.
    """
    company = Company(exported, kind, device)
    company.begin(12, 30, 7)
    texts = [twins.ours for twins in company.twins]
    grow_together(company.joint, texts)
    for _ in range(2):
        for one in (texts[0], texts[2]):
            one.go_on(2)
        tell_no_numbers(texts[1])
        trees, _ = grow_together(company.joint, texts)
    assert caplog.text.count("they call alone from now on") == 1
    assert [failure(one) is None for one in texts] == [True, False, True]
    assert [len(tree) > 0 for tree in trees] == [True, False, True]
    company.twins.clear()
    for one in texts:
        one.draft.close()
    company.begin(12, 30, 7)
    assert company.compare() >= BUDGET.depth - 1


# No room.


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_text_without_room_goes_on_without_a_tree_until_there_is_some(
    exported: ExportedDrafts, kind: str, device: str
) -> None:
    company = Company(exported, kind, device)
    company.graphs[0].pool = RowPool(2 * ROWS_A_BLOCK)
    company.begin(20, 10, 8)
    third = company.twins[2]
    for turn in range(4):
        trees, _ = grow_together(company.joint, [twins.ours for twins in company.twins])
        assert [tree.depth for tree in trees] == [BUDGET.depth, BUDGET.depth, 0], "two blocks, each a text's"
        assert rows_of(third.ours.draft) == []
        for twins in company.twins:
            twins.each("go_on", 1 + turn)
    company.twins.pop(0).close()
    assert company.compare() >= BUDGET.depth - 1
    assert third.ours.draft.known == third.alone.draft.known
    for twins in company.twins:
        twins.each("go_on", 2)
    assert company.compare() >= BUDGET.depth - 1


def test_a_tree_that_outgrows_the_pool_stays_as_it_is(exported: ExportedDrafts) -> None:
    graph, other = (exported.open("dgf", "cpu") for _ in range(2))
    graph.pool = RowPool(ROWS_A_BLOCK)
    texts = [guarded(one, 3) for one in (graph, other)]
    for one in texts:
        one.go_on(ROWS_A_BLOCK - 6)
    cut, whole = texts[0].grow(JointCalls(graph)), texts[1].grow(JointCalls(other))
    assert (cut.depth, whole.depth) == (2, 5), "a level of four rows, and no room for another"
    assert agreed_depth(scores_of(cut), {p: s for p, s in scores_of(whole).items() if len(p) <= 2}, CLOSE) == 2
    texts[0].go_on(1)
    assert texts[0].grow(JointCalls(graph)).depth == 2
    assert failure(texts[0]) is None
