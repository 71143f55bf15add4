"""The artifact that ships, from nothing but the running interpreter: tokenizer, target, draft, artifact, model card."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path

from dovetail.export.artifact.atomic_folder import check_goal
from dovetail.export.artifact.writing import write_artifact
from dovetail.export.demo.model_card import model_card
from dovetail.export.sources.finding import find_source
from dovetail.export.training import corpus as corpora
from dovetail.export.training.draft import DraftRecipe, train_draft
from dovetail.export.training.material import from_corpus
from dovetail.export.training.target import train_target
from dovetail.runtime.artifact.manifest import Manifest
from dovetail.runtime.errors import UserError
from dovetail.runtime.trees.shape import TreeShape

_log = logging.getLogger(__name__)

# At this size the paper's weight of 0.1 on the soft cross-entropy is too little, and on a CPU a second block costs more
# than it brings (docs/drafts.md).
SOFT_WEIGHT = 1.0
BLOCKS = 1

# From the finished artifact folder -> rows for the card's table, such as the accept length.
Measure = Callable[[Path], Mapping[str, str]]


@dataclasses.dataclass(frozen=True, slots=True)
class DemoRecipe:
    """What `dovetail-export demo` makes. `warm_start_minutes` is what the weights of `warm_start` were trained for
    before.
    """

    minutes_target: float = 90.0
    minutes_draft: float = 30.0
    seed: int = 0
    warm_start: Path | None = None
    warm_start_minutes: float = 0.0

    def __post_init__(self) -> None:
        for name, minutes in (("minutes_target", self.minutes_target), ("minutes_draft", self.minutes_draft)):
            if not 0 < minutes < 1e6:
                raise UserError(f"expected `{name}` above 0, got {minutes:g}; give the time the stage may take")
        if self.warm_start is not None and not (self.warm_start / "tokenizer.json").is_file():
            raise UserError(
                f"expected a checkpoint folder with tokenizer.json to start from, got {self.warm_start}; check "
                f"`warm_start`"
            )


def make_demo(
    out: Path,
    work: Path,
    recipe: DemoRecipe,
    *,
    tree: TreeShape | None = None,
    measure: Measure | None = None,
    force: bool = False,
) -> Manifest:
    """Make the demo artifact `out`. `work` keeps what a killed run goes on from; run with the same recipe to go on."""
    check_goal(out, force)
    work.mkdir(parents=True, exist_ok=True)
    _same_recipe(work, recipe)
    corpus = corpora.standard_library()
    _log.info(f"standard library: {len(corpus.train)} files to train on, {len(corpus.held_out)} held out")
    source, target_report = train_target(
        corpus,
        work,
        minutes=recipe.minutes_target,
        seed=recipe.seed,
        warm_start=recipe.warm_start,
        warm_start_minutes=recipe.warm_start_minutes,
    )
    draft_recipe = DraftRecipe(blocks=BLOCKS, minutes=recipe.minutes_draft, seed=recipe.seed, soft_weight=SOFT_WEIGHT)
    target = find_source(str(source))
    material = from_corpus(corpus, target)
    draft_report = train_draft(target, material, work / "draft", draft_recipe, work=work)

    def card(folder: Path, manifest: Manifest) -> str:
        return model_card(
            manifest,
            target_report,
            draft_report,
            draft_recipe,
            train_files=len(corpus.train),
            held_out_files=len(corpus.held_out),
            measured=measure(folder) if measure is not None else {},
        )

    return write_artifact(source, out, draft=work / "draft", tree=tree, card=card, force=force)


def _same_recipe(work: Path, recipe: DemoRecipe) -> None:
    """The minutes may change between runs; what the weights start from may not."""
    path = work / "recipe.json"
    start = str(recipe.warm_start.resolve()) if recipe.warm_start is not None else None
    wanted = {"seed": recipe.seed, "warm_start": start}
    if path.is_file():
        earlier = json.loads(path.read_text(encoding="utf-8"))
        if earlier != wanted:
            raise UserError(
                f"expected the recipe that {work} was begun with, {earlier}, got {wanted}; choose another `work` folder"
            )
    path.write_text(json.dumps(wanted) + "\n", encoding="utf-8")
