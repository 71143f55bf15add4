"""Made-up texts that a draft model is told of, the trees that it grows behind them, and how those are compared."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from models.draft_kinds import random_draft
from oracles.torch_drafts import weights_of

from dovetail.export.draft.onnx_graph import draft_info, export_draft
from dovetail.export.training.draft_model import DraftModel
from dovetail.runtime.drafts.base import Draft, Foresight, blind
from dovetail.runtime.drafts.graph_contract import DraftGraph
from dovetail.runtime.drafts.joint_calls import JointCalls
from dovetail.runtime.drafts.loading import load_draft
from dovetail.runtime.policies.base import DepthBudget, TreeBudget
from dovetail.runtime.trees.tree import CandidateTree, Float32s
from dovetail.runtime.trees.verified import Verified

Route = tuple[int, ...]
Scores = dict[Route, float]

BUDGET = DepthBudget(depth=5, width=4)


class DraftedText:
    """Random tokens and features; the target verifies as many of them as `go_on` says."""

    def __init__(self, draft: Draft, *, vocab_size: int, hidden_size: int, seed: int) -> None:
        self.draft = draft
        self._numbers, self._values = (np.random.default_rng([seed, stream]) for stream in range(2))
        self._vocab_size, self._hidden_size = vocab_size, hidden_size
        self.tokens = self._random_tokens(1)
        self.features = np.empty((0, hidden_size), np.float32)  # [len(tokens) - 1, D]

    def _random_tokens(self, count: int) -> list[int]:
        """The same ones however they are asked for, one by one or at once."""
        tokens: list[int] = (self._numbers.random(count) * self._vocab_size).astype(int).tolist()
        return tokens

    def go_on(self, count: int) -> None:
        """`count` more tokens are verified."""
        begin = len(self.features)
        self.tokens += self._random_tokens(count)
        new = self._values.standard_normal((count, self._hidden_size)).astype(np.float32)
        self.features = np.concatenate([self.features, new])
        self.draft.tell(Verified(begin, np.array(self.tokens[begin:]), new))

    def cut(self, known: int) -> None:
        """The text ends behind position `known`."""
        del self.tokens[known + 1 :]
        self.features = self.features[:known]
        self.draft.truncate(known)

    def grow(self, calls: JointCalls, budget: TreeBudget = BUDGET, foresight: Foresight = blind) -> CandidateTree:
        """The tree behind the last token, in calls of its own."""
        growth = self.draft.grow(self.tokens[-1], budget, foresight)
        calls.grow([growth], budget.width)
        return growth.candidates


class ExportedDrafts:
    """A random draft of each kind, as torch module and as graph."""

    def __init__(self, checkpoint: Path, folder: Path) -> None:
        self._checkpoint, self._folder = checkpoint, folder
        self._modules: dict[str, DraftModel] = {}

    def module(self, kind: str) -> DraftModel:
        """In float32. An `eagle3` draft has an LM head of its own, of every second token."""
        if kind not in self._modules:
            variant: dict[str, Any] = {"head_size": 200} if kind == "eagle3" else {}
            self._modules[kind] = random_draft(self._checkpoint, kind=kind, **variant)
            export_draft(weights_of(self._modules[kind]), self._folder / f"{kind}.onnx", weight_format="float32")
        return self._modules[kind]

    def open(self, kind: str, device: str, *, context_length: int = 2000) -> DraftGraph:
        """Its graph, loaded anew."""
        info = draft_info(weights_of(self.module(kind)))
        path = self._folder / f"{kind}.onnx"
        return load_draft(path, info, device=device, threads=2, context_length=context_length)


def text_of(graph: DraftGraph, draft: Draft, seed: int) -> DraftedText:
    """A text that `draft` can read, which runs `graph`."""
    return DraftedText(draft, vocab_size=512, hidden_size=graph.info.hidden_size, seed=seed)


def scores_of(tree: CandidateTree) -> Scores:
    """Every candidate as the tokens that lead to it, with its score."""
    return {tuple(tree.path_of(c)): score for c, score in zip(tree.ranked, tree.scores, strict=True)}


def obvious_tree(module: DraftModel, tokens: Sequence[int], features: Float32s, budget: DepthBudget) -> Scores:
    """The slow way: behind every path torch reads the whole text and the path anew, without any cache."""
    reads_features = module.kind.reads_features
    ids = list(tokens[1:] if reads_features else tokens)
    read = torch.from_numpy(features).half().float()  # as the graph is given them

    def children(path: Route, predicted: torch.Tensor) -> tuple[list[tuple[int, float]], torch.Tensor]:
        """The best next tokens with their log-probabilities, and the feature that is predicted behind the path."""
        pairs = torch.tensor([[*ids, *path]])
        given = torch.cat([read, predicted])[None] if reads_features else None
        with torch.no_grad():
            hidden, _ = module(pairs, given, torch.arange(pairs.shape[1]))
            best = torch.log_softmax(module.logits(hidden[0, -1]), -1).topk(budget.width)
        ids_of = best.indices if module.head_tokens is None else module.head_tokens[best.indices]
        return list(zip(ids_of.tolist(), best.values.tolist(), strict=True)), hidden[0, -1:].half().float()

    scores: Scores = {}
    level: list[tuple[Route, float, torch.Tensor]] = [((), 0.0, read[:0])]
    for _ in range(budget.depth):
        grown = []
        for path, score, predicted in level:
            best, feature = children(path, predicted)
            grown += [((*path, token), score + step, torch.cat([predicted, feature])) for token, step in best]
        scores |= {path: score for path, score, _ in grown}
        level = sorted(grown, key=lambda one: -one[1])[: budget.width]
    return scores


def agreed_depth(ours: Scores, theirs: Scores, atol: float) -> int:
    """How many levels of two trees are the same, with scores within `atol`. Where they part it must be at a near tie:
    what only one of them has scores, within twice `atol`, what stands in its place in the other.
    """
    depth = 0
    while True:
        a, b = ({p: s for p, s in scores.items() if len(p) == depth + 1} for scores in (ours, theirs))
        if not a and not b:
            return depth
        for path in a.keys() & b.keys():
            assert abs(a[path] - b[path]) <= atol, f"{path}: {a[path]} and {b[path]}"
        if a.keys() == b.keys():
            depth += 1
            continue
        expanded = {path[:-1] for path in a}, {path[:-1] for path in b}
        if expanded[0] != expanded[1]:
            rivals = [ours[path] for path in expanded[0] ^ expanded[1]]
            assert max(rivals) - min(rivals) <= 2 * atol, f"level {depth + 1} grows from other candidates"
        for parent in expanded[0] & expanded[1]:
            rivals = [s for p, s in a.items() if p not in b and p[:-1] == parent]
            rivals += [s for p, s in b.items() if p not in a and p[:-1] == parent]
            assert not rivals or max(rivals) - min(rivals) <= 2 * atol, f"other children of {parent}"
        return depth
