"""What a draft is trained on: one stream of tokens, documents or conversations one after the other, and how much each
position counts.

Letters: N tokens, S documents.
"""

from __future__ import annotations

import dataclasses
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from dovetail.export.draft.config import block_sizes
from dovetail.export.sources.base import Source
from dovetail.export.training.conversations import make_exchanges
from dovetail.export.training.corpus import Corpus, text_files
from dovetail.runtime.errors import UserError
from dovetail.runtime.evaluation.exchanges import SELF_MADE, Exchange, first_turns
from dovetail.runtime.evaluation.standard_library import is_held_out, path_hash

PROMPT_WEIGHT = 0.2  # of what a user said; of what the target says: 1
READ_TOGETHER = 1024  # tokens of a document: its further parts are documents of their own
MOST_TOKENS = 2_000_000  # of a corpus: an hour on a CPU sees no more of them twice

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, slots=True)
class Material:
    """`weights[i]`: how much it counts what the target expects behind token i. 0 at the last token of a document,
    because what follows there is another one.
    """

    ids: NDArray[np.int32]  # [N]
    weights: NDArray[np.float32]  # [N]
    lengths: tuple[int, ...]  # [S] of the documents

    def __post_init__(self) -> None:
        assert len(self.ids) == len(self.weights) == sum(self.lengths), "material of unequal parts"

    def frequencies(self, vocab_size: int) -> NDArray[np.float64]:
        """How often each token occurs, counted by its weight.  # [V]"""
        counted = np.zeros(len(self.ids), np.float64)
        counted[1:] = self.weights[:-1]
        return np.bincount(self.ids, weights=counted, minlength=vocab_size).astype(np.float64)


@dataclasses.dataclass(frozen=True, slots=True)
class Split:
    """What is trained on, and what is held out by the hash of its path or of its question; `about` both, in words."""

    train: Material
    held_out: Material
    about: str


def from_corpus(corpus: Corpus, source: Source, most: int = MOST_TOKENS) -> Split:
    """Texts, in which every position counts as much as any other. Special tokens in them are single ids. Of a corpus of
    more than `most` tokens whole documents are left out, chosen by the hash of their path.
    """
    tokenizer, together = Tokenizer.from_str(source.tokenizer), min(READ_TOGETHER, block_sizes(source).context_length)

    def parts(texts: Mapping[str, str]) -> Iterator[tuple[Sequence[int], int]]:
        paths, used = sorted(texts, key=path_hash), 0
        for number, path in enumerate(paths):
            if used >= most:
                _log.info("text: %d of %d documents are used, %d tokens", number, len(paths), used)
                return
            ids = tokenizer.encode(texts[path]).ids
            used += len(ids)
            for begin in range(0, len(ids), together):
                yield ids[begin : begin + together], 0

    about = f"{len(corpus.train) + len(corpus.held_out):,} documents"
    return Split(_material(parts(corpus.train)), _material(parts(corpus.held_out)), about)


def from_exchanges(exchanges: Sequence[Exchange]) -> Split:
    """Conversations, in which the answers count. Raises `UserError` where there are too few to hold some out."""
    questions = {exchange.question.text for exchange in exchanges}
    if len(questions) < 2:
        raise UserError(
            f"expected at least two questions, one of them to be held out, got {len(questions)}; give more of them "
            f"(`prompts`), or let the model make up more (`self_made`)"
        )
    held_out = {text for text in questions if is_held_out(text)} or {min(questions, key=path_hash)}
    if held_out == questions:
        held_out.remove(max(questions, key=path_hash))

    def part(is_wanted: bool) -> Material:
        chosen = (exchange for exchange in exchanges if (exchange.question.text in held_out) == is_wanted)
        return _material((exchange.tokens, len(exchange.prompt_tokens)) for exchange in chosen)

    return Split(part(False), part(True), _about(exchanges))


def _about(exchanges: Sequence[Exchange]) -> str:
    """How many questions from where, and how many answers."""
    files = Counter(source.rpartition(":")[0] for source in {exchange.question.source for exchange in exchanges})
    counted = [f"{count:,} of {name}" for name, count in sorted(files.items()) if name != SELF_MADE.rstrip(":")]
    own = files[SELF_MADE.rstrip(":")]
    counted += [f"{own:,} of its own"] if own else []
    return f"the target's {len(exchanges):,} answers to {files.total():,} questions ({', '.join(counted)})"


def make_material(
    source: Source, prompts: Sequence[Path], self_made: int, texts: Sequence[Path], work: Path, most: int = MOST_TOKENS
) -> Split:
    """What the options of `dovetail-export draft` ask for: `source`'s own answers to the questions in the files
    `prompts` and to `self_made` ones, and `texts`. Answers are kept in `work`. Raises `UserError` for none of them.
    """
    splits = []
    if prompts or self_made:
        questions = [turn for path in prompts for turn in first_turns(path)]
        splits.append(from_exchanges(make_exchanges(source, questions, self_made, work)))
    if texts:
        splits.append(from_corpus(text_files(texts), source, most))
    if not splits:
        raise UserError(
            "expected something to learn from, got nothing; give questions (`prompts`), let the model make some up "
            "(`self_made` 1000), or give `text`"
        )
    about = " and ".join(split.about for split in splits)
    return Split(_joined([split.train for split in splits]), _joined([split.held_out for split in splits]), about)


def _material(documents: Iterable[tuple[Sequence[int], int]]) -> Material:
    """Of documents with the length of what the target did not say itself in front."""
    ids: list[NDArray[np.int32]] = []
    weights: list[NDArray[np.float32]] = []
    for tokens, given in documents:
        weight = np.ones(len(tokens), np.float32)
        weight[: max(0, given - 1)] = PROMPT_WEIGHT
        weight[-1] = 0
        ids.append(np.asarray(tokens, np.int32))
        weights.append(weight)
    if not ids:
        return Material(np.zeros(0, np.int32), np.zeros(0, np.float32), ())
    return Material(np.concatenate(ids), np.concatenate(weights), tuple(map(len, ids)))


def _joined(parts: Sequence[Material]) -> Material:
    return Material(
        np.concatenate([part.ids for part in parts]),
        np.concatenate([part.weights for part in parts]),
        sum((part.lengths for part in parts), ()),
    )
