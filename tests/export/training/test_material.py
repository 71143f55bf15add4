"""Proves what a draft learns from: which positions count, what is held out, and that answers and features that are on
disk are not made again, whenever a run was stopped.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from dovetail.export.artifact.source_models import source_model
from dovetail.export.artifact.writing import write_artifact
from dovetail.export.sources.finding import find_source
from dovetail.export.sources.tensors import Matrix
from dovetail.export.target.compression import Compression
from dovetail.export.training import corpus, target_record
from dovetail.export.training.answering_target import open_target
from dovetail.export.training.conversations import make_exchanges
from dovetail.export.training.exchange_store import ExchangeStore
from dovetail.export.training.material import PROMPT_WEIGHT, Material, from_corpus, from_exchanges, make_material
from dovetail.export.training.target_record import EXPECTED, by_runtime, by_source, record
from dovetail.runtime.errors import ContextOverflowError, UserError
from dovetail.runtime.evaluation.exchanges import Exchange, FirstTurn

TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<|a|>{% endif %}"
)


def exchange(number: int, prompt: int = 4, answer: int = 3, temperature: float = 0.0) -> Exchange:
    tokens = tuple(range(10, 10 + prompt + answer))
    return Exchange(FirstTurn(f"q:{number}", f"question {number}"), temperature, tokens[:prompt], tokens[prompt:])


@pytest.fixture(scope="module")
def chat_checkpoint(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chat") / "checkpoint"
    folder.mkdir()
    for path in tiny_checkpoint.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": TEMPLATE}))
    return folder


def test_the_answers_count() -> None:
    split = from_exchanges([exchange(number) for number in range(200)])
    material = split.train
    assert 0 < len(split.held_out.lengths) < 20
    assert material.lengths[0] == 7
    # What is expected behind the last token of the prompt is the answer's first; behind the answer's last, nothing.
    assert material.weights[:7].tolist() == pytest.approx([PROMPT_WEIGHT] * 3 + [1, 1, 1, 0])
    frequencies = Material(material.ids[:7], material.weights[:7], (7,)).frequencies(20)
    assert frequencies[10] == 0
    assert frequencies[11] == pytest.approx(PROMPT_WEIGHT)
    assert frequencies[16] == 1


def test_a_question_is_held_out_with_all_its_answers() -> None:
    both = [exchange(number, temperature=t) for number in range(100) for t in (0.0, 0.7)]
    split = from_exchanges(both)
    assert split.about == "the target's 200 answers to 100 questions (100 of q)"
    assert len(split.held_out.lengths) % 2 == 0
    assert len(split.train.lengths) + len(split.held_out.lengths) == 200
    few = from_exchanges(both[:4])
    assert len(few.train.lengths) == len(few.held_out.lengths) == 2, "the hash chose none or all"
    with pytest.raises(UserError, match="at least two questions"):
        from_exchanges(both[:2])


def test_prose_is_text_and_data_is_not() -> None:
    prose = "It was the best of times, it was the worst of times, it was the age of wisdom. " * 20
    japanese = "吾輩は猫である。名前はまだ無い。" * 60
    numbers = "0.123, 4.567, 8.910, " * 80
    encoded = ("QUJDREVGR0hJSktMTU5PUFFSU1RVVldYWVo" * 20 + "\n") * 3
    documents = {"prose": prose, "japanese": japanese, "numbers": numbers, "encoded": encoded, "code": "x = 1\n" * 90}
    split = corpus.split(documents.items())
    assert {**split.train, **split.held_out}.keys() == {"prose", "japanese", "code"}


def test_answers_on_disk(tmp_path: Path) -> None:
    path = tmp_path / "exchanges.jsonl"
    store = ExchangeStore(path)
    for number in range(3):
        store.add(exchange(number))
    whole = path.read_bytes()
    path.write_bytes(whole[:-9])  # killed while it wrote the last line
    again = ExchangeStore(path)
    assert again.exchanges == [exchange(0), exchange(1)]
    assert again.has(exchange(1).question, 0.0)
    assert not again.has(exchange(1).question, 0.7)
    assert not again.has(FirstTurn("q:1", "another file of that name"), 0.0)
    again.add(exchange(2))
    assert path.read_bytes() == whole
    path.write_bytes(b'{"source": 1}\n' + whole)
    with pytest.raises(UserError, match="line 1: expected an answer made by this command"):
        ExchangeStore(path)


def test_a_chat_model_speaks_for_itself(chat_checkpoint: Path, tmp_path: Path) -> None:
    source = find_source(chat_checkpoint)
    questions = [FirstTurn("file:1", "what is x"), FirstTurn("file:2", "what is y")]
    made = make_exchanges(source, questions, 3, tmp_path)
    own = [e for e in made if e.question.source.startswith("self-made:")]
    assert len({e.question.source for e in own}) == 3
    assert len(made) == 2 * (2 + 3)
    assert sorted({e.temperature for e in made if e.question == questions[0]})[0] == 0
    lines = (tmp_path / "exchanges.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "exchanges.jsonl").write_bytes(b"".join(lines[:-3]))
    assert make_exchanges(source, questions, 3, tmp_path) == made, "stopped, it goes on with what is missing"
    assert {e.question for e in make_exchanges(source, questions[:1], 0, tmp_path)} == {questions[0]}
    split = make_material(source, [], 3, [], tmp_path)
    assert split.about == "the target's 6 answers to 3 questions (3 of its own)"
    material = split.train
    assert len(material.lengths)
    assert material.weights.max() == 1


def test_questions_that_can_not_be_asked(tiny_checkpoint: Path, chat_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="expected a model with a chat template"):
        make_exchanges(find_source(tiny_checkpoint), [], 1, tmp_path / "plain")
    with pytest.raises(ContextOverflowError, match="file:7: expected a question that leaves room for 320 tokens"):
        make_exchanges(find_source(chat_checkpoint), [FirstTurn("file:7", "x + y " * 200)], 0, tmp_path / "chat")
    with pytest.raises(UserError, match="expected something to learn from"):
        make_material(find_source(tiny_checkpoint), [], 0, [], tmp_path)


def test_what_the_target_makes_of_a_text_is_computed_once(tiny_checkpoint: Path, tmp_path: Path) -> None:
    model = source_model(find_source(tiny_checkpoint), Compression("int8"))
    _, head = model.embedding_and_head()
    rng, read_windows = np.random.default_rng(0), list[int]()

    def read(documents: Sequence[NDArray[np.int64]]) -> Iterator[tuple[Matrix, Matrix]]:
        read_windows.append(len(documents))
        return by_source(model, (), head)(documents)

    lengths = (40, 30, 50)
    material = Material(rng.integers(0, 512, 120).astype(np.int32), np.ones(120, np.float32), lengths)
    short = Material(material.ids[:70], material.weights[:70], lengths[:2])
    record(short, read, 64, 512, tmp_path, "reading")
    whole = record(material, read, 64, 512, tmp_path, "reading")
    assert read_windows == [2, 1], "what was there is not read again"
    right = np.concatenate(model.features(np.split(material.ids.astype(np.int64), [40, 70]), ()))
    np.testing.assert_allclose(whole.features, right, atol=2e-2)
    logits = right.astype(np.float64) @ head.T
    chances = np.exp(logits - logits.max(1, keepdims=True))
    chances /= chances.sum(1, keepdims=True)
    np.testing.assert_array_equal(whole.expected[:, 0], logits.argmax(1))
    np.testing.assert_allclose(whole.chances, -np.sort(-chances, axis=1)[:, :EXPECTED], atol=2e-3)
    other = dataclasses.replace(material, ids=material.ids[::-1].copy())
    record(other, read, 64, 512, tmp_path, "reading")
    assert read_windows == [2, 1, 3], "another text is read whole"


def test_the_artifact_reads_as_its_source_does(tiny_checkpoint: Path, tmp_path: Path) -> None:
    source = find_source(tiny_checkpoint)
    model = source_model(source, Compression("int8"))
    ids = np.random.default_rng(0).integers(0, 512, 300).astype(np.int32)
    material = Material(ids, np.ones(300, np.float32), (100, 200))
    write_artifact(str(tiny_checkpoint), tmp_path / "target", weight_format="fp32")
    with open_target(source, tmp_path, 1) as pipe:
        ours = record(material, by_runtime(pipe.target), 64, 512, tmp_path / "ours", "reading")
    reader = by_source(model, (), model.embedding_and_head()[1])
    theirs = record(material, reader, 64, 512, tmp_path / "theirs", "reading")
    np.testing.assert_allclose(ours.features, theirs.features, atol=2e-2)
    assert (ours.expected[:, 0] == theirs.expected[:, 0]).mean() > 0.98


@pytest.mark.parametrize("vocab_size", [20, 512])
def test_the_most_likely_tokens(vocab_size: int) -> None:
    logits = np.random.default_rng(0).normal(size=(7, vocab_size)).astype(np.float32)
    keep = min(EXPECTED, vocab_size)
    expected, chances = target_record._expected(logits, keep)
    np.testing.assert_array_equal(expected, np.argsort(-logits, axis=1)[:, :keep])
    softmax = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    np.testing.assert_allclose(chances, np.take_along_axis(softmax, expected, 1), rtol=2e-3)


def test_a_corpus_is_cut_to_whole_documents(tiny_checkpoint: Path) -> None:
    texts = {f"{number}.txt": f"text {number} of some words\n" * 30 for number in range(60)}
    source = find_source(tiny_checkpoint)
    whole = from_corpus(corpus.split(texts.items()), source)
    part = from_corpus(corpus.split(texts.items()), source, most=1000)
    assert 1000 <= len(part.train.ids) < 1000 + max(whole.train.lengths)
    assert part.train.lengths == whole.train.lengths[: len(part.train.lengths)]
