"""The tables of `dovetail bench` on stdout."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import rich.box
from rich.console import Console
from rich.table import Table

from dovetail.calibration.bench.markdown import DASH, by_category, category_title, like_sentence, number

_WIDTH = 160  # off a terminal


def print_tables(document: dict[str, Any]) -> None:
    """What the runners did, then growth, then a row a category."""
    console = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else _WIDTH)
    model, machine = document["model"], document["machine"]
    console.print(
        f"{model['name']}: {model['parameters'] / 1e6:.1f} M parameters {model['weight_format']}, {machine['cpu']}, "
        f"{machine['threads']} threads, memory read at {document['read_bandwidth_gb_per_s']:.1f} GB/s"
    )
    if model["like"]:
        console.print(like_sentence(model))
    temperature = document["workload"]["temperatures"][0]
    console.print(
        _runners(document, f"all prompts, temperature {temperature:g}, medians; * is the fastest plain", _SPEED)
    )
    console.print(_runners(document, "a round, a pass over the weights, and the process", _COST))
    for row in document["runners"]:
        if not row["available"]:
            console.print(f"{row['name']}: left out, {row['reason']}")
        elif row["tokens_match"] is False:
            first = row["first_divergence"]
            margin = DASH if first["margin"] is None else f"{first['margin']:.4f}"
            console.print(
                f"{row['name']}: {row['texts_departed']} of {row['texts_compared']} greedy texts depart from plain's, "
                f"first at token {first['position']} of {first['prompt']}, where its two best logits are {margin} apart"
            )
    if document["growth"]:
        console.print(_growth(document))
    for temperature, rows in by_category(document).items():
        console.print(_by_category(category_title(temperature), rows))


_Column = tuple[str, str, Callable[[Any], str]]
_SPEED: list[_Column] = [
    ("tokens/s", "tokens_per_second", lambda v: number(v, 1)),
    ("ms a token", "ms_per_token", lambda v: number(v, 2)),
    ("over fastest plain", "speedup_over_fastest_plain", lambda v: number(v, 2)),
    ("first token ms", "ttft_ms", lambda v: number(v, 0)),
    ("accept length", "accept_length_mean", lambda v: number(v, 2)),
    ("same tokens", "tokens_match", lambda v: DASH if v is None else "yes" if v else "no"),
]
_COST: list[_Column] = [
    ("draft ms", "draft_ms", lambda v: number(v, 2)),
    ("verify ms", "verify_ms", lambda v: number(v, 2)),
    ("host ms", "host_ms", lambda v: number(v, 2)),
    ("GB/s", "gb_per_s", lambda v: number(v, 1)),
    ("of limit", "bandwidth_share", lambda v: DASH if v is None else f"{v:.0%}"),
    ("peak MB", "peak_rss_mb", lambda v: number(v, 0)),
    ("load s", "load_s", lambda v: number(v, 1)),
    ("import s", "import_s", lambda v: number(v, 1)),
]


def _runners(document: dict[str, Any], title: str, columns: list[_Column]) -> Table:
    table = Table(title=title, box=rich.box.SIMPLE, title_justify="left")
    table.add_column("runner", no_wrap=True)
    for heading, _, _ in columns:
        table.add_column(heading, justify="right")
    for row in document["runners"]:
        if row["available"]:
            name = f"{row['name']} *" if row["name"] == document["fastest_plain"] else row["name"]
            table.add_row(name, *(show(row[key]) for _, key, show in columns))
    return table


def _by_category(title: str, rows: list[list[str]]) -> Table:
    table = Table(title=title, box=rich.box.SIMPLE, title_justify="left")
    for name in rows[0]:
        table.add_column(name, justify="left" if name == rows[0][0] else "right")
    for row in rows[1:]:
        table.add_row(*row)
    return table


def _growth(document: dict[str, Any]) -> Table:
    table = Table(title="ms a token by tokens of context", box=rich.box.SIMPLE, title_justify="left")
    rows = {(row["runner"], row["context"]): row for row in document["growth"]}
    contexts = sorted({context for _, context in rows})
    table.add_column("runner", no_wrap=True)
    for context in contexts:
        table.add_column(str(context), justify="right")
    for runner in dict.fromkeys(name for name, _ in rows):
        by_context = [rows.get((runner, context)) for context in contexts]
        table.add_row(runner, *(DASH if row is None else number(row["ms_per_token"], 2) for row in by_context))
    return table
