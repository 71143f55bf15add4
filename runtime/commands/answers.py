"""Answers on the terminal: the text as it comes, the draft's guesses in colour, and the report on what it cost."""

from __future__ import annotations

import itertools
import os
import sys
from typing import TYPE_CHECKING

import click

from dovetail.runtime.terminal.console import notice, stderr_console, waiting

if TYPE_CHECKING:
    from dovetail.runtime.decoding.generation import Generation
    from dovetail.runtime.decoding.stream import Stream

_GUESSED, _PLAIN = "\x1b[32m", "\x1b[0m"


class Printer:
    """Prints one answer."""

    def __init__(self, show_draft: bool) -> None:
        """`show_draft` counts on a terminal only, and not under NO_COLOR."""
        self._colour = show_draft and sys.stdout.isatty() and not os.environ.get("NO_COLOR")

    def show(self, stream: Stream, quiet: bool = False) -> Generation:
        """Run `stream` to its end, printing as it goes unless `quiet`. Ctrl-C ends the text, not the report on it."""
        try:
            with waiting("reading the prompt") as done_waiting:
                chunks = [chunk] if (chunk := next(stream, None)) else []
                done_waiting()
            for chunk in itertools.chain(chunks, stream):
                if quiet:
                    continue
                for piece, guessed in zip(chunk.pieces, chunk.drafted, strict=True):
                    coloured = self._colour and guessed
                    click.echo(f"{_GUESSED}{piece}{_PLAIN}" if coloured else piece, nl=False, color=self._colour)
        except KeyboardInterrupt:
            stream.close()
        if not quiet:
            click.echo()
        return stream.finish()


def report(result: Generation, stats: bool) -> None:
    """One line on stderr, or the table of `--stats`."""
    totals = result.totals
    n = len(result.token_ids)
    notice(
        f"{n} tokens in {result.decode_ms / 1e3:.2f} s, {result.tokens_per_second:.1f} tokens/s, "
        f"accept length {totals.accept_length_mean:.2f}, seed {result.seed}"
    )
    if not stats:
        return
    from rich.table import Table

    table = Table(show_header=False)
    per_round = max(1, totals.rounds)
    rows = {
        "prompt / generated": f"{result.prompt_tokens} / {n} tokens ({result.finish_reason})",
        "prefill": f"{result.prefill_ms:.1f} ms",
        "decode": f"{result.decode_ms:.1f} ms, {result.tokens_per_second:.1f} tokens/s",
        "rounds": f"{totals.rounds}, {n / per_round:.2f} tokens each, {totals.texts / per_round:.1f} texts a pass",
        "accept length": f"{totals.accept_length_mean:.2f} of {totals.drafted_tokens / per_round:.1f} drafted",
        "accept histogram": "  ".join(f"{a}:{count}" for a, count in enumerate(totals.accept_histogram)),
        "verify_ms": f"{totals.verify_ms / per_round:.2f} a round on {result.setup.target_device}",
        "draft_ms": f"{totals.draft_ms / per_round:.2f} a round on {result.setup.draft_device}",
        "host_ms": f"{totals.host_ms / per_round:.2f} a round",
        "bytes to draft": f"{result.bytes_to_draft / per_round:.0f} a round",
        "bytes from draft": f"{result.bytes_from_draft / per_round:.0f} a round",
        "draft's health": result.draft_failure or (f"{result.draft_rests} rests" if result.draft_rests else "good"),
        "numerics": f"{result.setup.numerics}, {result.setup.threads} threads",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    stderr_console().print(table)
