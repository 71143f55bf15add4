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


@given(PIECES, st.lists(st.text("ab\n", max_size=2), min_size=12, max_size=12), STOPS, st.booleans())
@example(["a", "b"], ["", "ab", *[""] * 10], ["bab"], True)
def test_hidden_text_stops_and_is_not_shown(
    pieces: list[str], hidden: list[str], stops: list[str], include: bool
) -> None:
    """Hidden letters are capitals for the one who looks on."""
    scanner = StopScanner(stops, include)
    shown = "".join(scanner.feed(piece, secret) for piece, secret in zip(pieces, hidden, strict=False))
    shown += scanner.finish()
    whole = "".join(piece + secret for piece, secret in zip(pieces, hidden, strict=False))
    marks = "".join(piece + secret.upper().replace("\n", "N") for piece, secret in zip(pieces, hidden, strict=False))
    text, found = obvious(whole, stops, include)
    assert found == scanner.found
    assert shown == "".join(char for char in marks[: len(text)] if not char.isupper())


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
