"""Proves stop strings over any cut of a text into pieces, against searching the whole text; and that nothing shown is
ever taken back.
"""

from __future__ import annotations

from hypothesis import example, given
from hypothesis import strategies as st

from dovetail.runtime.text.stop_strings import StopScanner

PIECES = st.lists(st.text("ab\n", max_size=5), max_size=12)
STOPS = st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=3)


def obvious(text: str, stops: list[str], include: bool) -> tuple[str, bool]:
    """The text up to the stop string whose last character comes first: that is when a reader of the text would stop."""
    hits = [(text.find(stop), stop) for stop in stops if stop in text]
    if not hits:
        return text, False
    at, stop = min(hits, key=lambda hit: (hit[0] + len(hit[1]), hit[0]))
    return (text[: at + len(stop)] if include else text[:at]), True


@given(PIECES, STOPS, st.booleans())
@example(["aab"], ["ab", "b"], False)
@example(["\nab"], ["\nab", "a"], False)
@example(["a", "b"], ["ab", "b"], True)
def test_any_cut_gives_the_same_text(pieces: list[str], stops: list[str], include: bool) -> None:
    scanner = StopScanner(stops, include)
    shown = ""
    for piece in pieces:
        shown += scanner.feed(piece)
    shown += scanner.finish()
    assert (shown, scanner.found) == obvious("".join(pieces), stops, include)


def test_what_may_become_a_stop_string_is_held_back() -> None:
    scanner = StopScanner(["\n\n"], include=False)
    assert scanner.feed("one\n") == "one"
    assert scanner.feed("two") == "\ntwo"
    assert scanner.feed("\n") == ""
    assert scanner.feed("\nthree") == ""
    assert scanner.found
    assert scanner.finish() == ""
    assert scanner.feed("more") == ""


def test_without_stop_strings_everything_passes() -> None:
    scanner = StopScanner([], include=False)
    assert scanner.feed("text") == "text"
    assert scanner.finish() == ""
