"""Proves what a calibration asks: passages, questions of a file through the template, the model's own; and that what it
records of the answers is what the model says, to the end and no further.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from models.tiny_pipeline import assert_nothing_is_taken

from dovetail.calibration.choose.calibration import Effort
from dovetail.calibration.commands.calibration_prompts import by_flags
from dovetail.calibration.measure.pair import PipelinePair
from dovetail.calibration.measure.prompts import Prompts, conversations, passages, passages_of, questions_of
from dovetail.runtime import load
from dovetail.runtime.batch.question_file import Question, read_questions
from dovetail.runtime.errors import UserError
from dovetail.runtime.evaluation import exchanges
from dovetail.runtime.pipeline import Pipeline
from dovetail.runtime.policies.base import Policy


@pytest.fixture(scope="module")
def pipe(chat_artifact: Path) -> Iterator[Pipeline]:
    with load(chat_artifact, profile=None, sequences=16) as opened:
        yield opened


def said(number: int, text: str, category: str = "qa") -> Question:
    return Question(number, "mt-bench", (text, "And then?"), category, True)


def test_passages_are_spread_over_the_text() -> None:
    found = passages(list(range(1000)), 5, 100)
    assert [len(one) for one in found] == [100] * 5
    assert found[0][0] == 0
    assert found[-1][-1] == 999
    assert passages(list(range(100)), 1, 100) == [list(range(100))]
    mixed = passages_of("a.txt", list(range(1000)), 5, 100)
    assert sorted(mixed.token_ids) == found != mixed.token_ids
    assert mixed == passages_of("a.txt", list(range(1000)), 5, 100)
    assert mixed.described(5) == "5 passages of a.txt"


def test_a_text_too_short_says_how_much_is_needed() -> None:
    with pytest.raises(UserError, match=r"expected at least 500 tokens \(5 passages of 100\).*got 37") as caught:
        passages(list(range(37)), 5, 100)
    assert "\n" not in str(caught.value)


def test_questions_go_through_the_template_if_they_are_said(pipe: Pipeline) -> None:
    questions = [said(1, "What is x?"), Question(2, "humaneval", ("def f(x):",), None, False)]
    found = questions_of("q\x1b.jsonl", questions, pipe, 10)
    messages = [{"role": "user", "content": "What is x?"}]
    assert sorted(found.token_ids) == sorted([pipe.encode(messages), pipe.encode("def f(x):")])
    assert found.described(2) == "2 questions of q\ufffd.jsonl"


def test_some_questions_of_each_category_and_the_long_ones_left_out(pipe: Pipeline) -> None:
    questions = [said(i, f"What is {i}?", "qa" if i < 30 else "math") for i in range(33)]
    found = questions_of("q.jsonl", [*questions, said(40, "x = 1\n" * 200, "long")], pipe, 7)
    assert len(found.token_ids) == 6
    texts = [pipe.tokenizer.decode(ids) for ids in found.token_ids]
    assert sum(f"What is {i}?" in text for i in (30, 31, 32) for text in texts) == 3
    with pytest.raises(UserError, match=r"q\.jsonl: expected questions of at most 256 tokens, got 1 that"):
        questions_of("q.jsonl", [said(1, "x = 1\n" * 200)], pipe, 7)


def test_a_chat_model_asks_itself_the_same_every_time(pipe: Pipeline) -> None:
    shares: list[float] = []
    found = conversations(pipe, 3, shares.append)
    assert shares == [pytest.approx(i / 3) for i in range(4)]
    assert len({tuple(ids) for ids in found.token_ids}) == 3
    assert found == conversations(pipe, 3)
    assert found.described(3) == "3 conversations, self-made"
    opening = exchanges.user_opening(pipe)
    assert all(ids[: len(opening)] == opening for ids in found.token_ids)
    assert by_flags(None, None)(pipe, Effort(conversations=3), lambda what, share: None) == found, "the default"
    assert_nothing_is_taken(pipe)


def test_a_model_that_makes_up_nothing_is_told_so(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchanges, "_FEWEST_CHARACTERS", 10_000)
    monkeypatch.setattr(exchanges, "_PATIENCE", 3)
    with pytest.raises(UserError, match=r"got 3 texts in a row that are none.*give questions \(`prompts`\)"):
        conversations(pipe, 1)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_what_is_recorded_is_what_a_user_gets(pipe: Pipeline, temperature: float) -> None:
    prompts = [pipe.encode([{"role": "user", "content": f"What is {i}?"}]) for i in range(10)]
    ended = 0
    for number, text in enumerate(PipelinePair(pipe).texts(prompts, 40, temperature)):
        answer = pipe.stream(prompts[number], temperature=temperature, max_new_tokens=40, sequence=number).finish()
        assert text.tokens[text.prompt_length :].tolist() == answer.token_ids
        assert text.has_ended == (answer.finish_reason == "stop")
        assert len(text.features) == len(text.tokens) - 1
        ended += text.has_ended
    assert 0 < ended < 10, "some end, others are cut off"
    assert_nothing_is_taken(pipe)


def test_a_run_ends_with_its_text(pipe: Pipeline) -> None:
    pair = PipelinePair(pipe)
    prompts = [pipe.encode([{"role": "user", "content": f"What is {i}?"}]) for i in range(10)]
    lengths = [len(text.tokens) - text.prompt_length for text in pair.texts(prompts, 40, 0.0)]
    runs = [pair.generate(prompt, Policy("plain"), 0.0, 0, 40) for prompt in prompts]
    assert [run.tokens for run in runs] == [length - 1 for length in lengths]
    assert all(run.rounds == run.tokens for run in runs)


def test_what_a_file_holds_in_words(tmp_path: Path, pipe: Pipeline) -> None:
    (tmp_path / "q.jsonl").write_text(json.dumps({"question": "Why?"}) + "\n")
    found = questions_of("q.jsonl", read_questions(tmp_path / "q.jsonl"), pipe, 64)
    assert found.described(len(found.token_ids)) == "1 question of q.jsonl"
    assert Prompts("conversation", ", self-made", []).described(0) == "0 conversations, self-made"
