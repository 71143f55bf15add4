"""A benchmark's JSON documents as a Markdown page: `docs/performance.md` is this function's output.

Usage: python -m dovetail.calibration.bench.markdown OUT.md DOCUMENT.json ...
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from dovetail.calibration.bench.workload import ALL, MEAN
from dovetail.runtime.artifact import strict_json
from dovetail.runtime.errors import UserError
from dovetail.runtime.terminal.console import run

DASH = "\u2013"

_HEAD = """# Performance

Written by `dovetail bench` from its JSON; not by hand. How to read it:

- Every runner is a process of its own and does the same work: token ids in, so many token ids out, ends of text
  ignored. To a question they are as many as plain decoding's greedy answer has. All are loaded before the first text
  and take turns at every prompt, their order turned by one each time; nothing else of the benchmark runs meanwhile.
  Each warms up on one text that is not counted.
- **tokens/s** and **ms a token** count the tokens behind the first delivery; reading the prompt is in **first token**.
  Medians over prompts. **Over fastest plain** is the median over prompts of the time per token of the fastest plain
  decoding of *any* engine over this runner's, on the same prompt.
- **Mean of categories** counts each category alike, however many prompts it has. **Repeated** 8-grams of tokens had
  occurred before in the same answer: a text that loops is easy to draft.
- **Accept length**: accepted drafted tokens a round; the bonus token is not counted.
- **Draft, verify, host**: milliseconds of a mean round in the draft, in the target's engine, and in neither; a draft's
  reading of the prompt is in its time.
- **GB/s**: bytes of weights that one pass of the target reads, over the time of a pass; **of limit**: its share of what
  this machine reads from memory in a loop that does nothing else. A model that fits the caches can exceed it.
- **Same tokens**: whether the greedy texts are those of Dovetail's plain decoding. Weights in another format are
  another model, so runners on other weights may differ. Runners on the same weights sum in another order: a near-tie
  can flip.
"""


def number(value: float | None, digits: int) -> str:
    """A figure for a table; a dash where there is none."""
    return DASH if value is None else f"{value:,.{digits}f}"


def like_sentence(model: dict[str, Any]) -> str:
    """What an inflated model's figures mean."""
    return (
        f"This model was inflated to the shape of {model['like']}: it computes the function of the small trained pair "
        "at the cost of the big shape. Texts and acceptance are the trained pair's, times are the big shape's."
    )


def markdown(documents: Sequence[dict[str, Any]]) -> str:
    """The page for one or several runs."""
    return "\n".join([_HEAD, *(_section(document) for document in documents)])


def _section(document: dict[str, Any]) -> str:
    model, machine, work = document["model"], document["machine"], document["workload"]
    available = [row for row in document["runners"] if row["available"]]
    title = f"## {model['name']}, {model['parameters'] / 1e6:,.1f} M parameters, {model['weight_format']}"
    kinds: dict[str, list[int]] = {}
    for prompt in work["prompts"]:
        kinds.setdefault(prompt["category"], []).append(prompt["tokens"])
    bandwidth = document["read_bandwidth"]
    parts = [
        title,
        "",
        *([f"**{like_sentence(model)}**", ""] if model["like"] else []),
        f"    {document['command']}",
        "",
        f"- Machine: {machine['cpu']}, {machine['threads']} threads of {machine['logical_cpus']}, "
        f"{', '.join(machine['matrix_instructions'])}; "
        f"{', '.join(f'{name} {size}' for name, size in machine['caches'].items())}; {machine['memory_gb']} GB; "
        f"{machine['system']}; load average at the start {machine['load_average']}"
        + "".join(f"; {name}={value}" for name, value in machine["environment"].items())
        + ".",
        f"- Read bandwidth {document['read_bandwidth_gb_per_s']:.1f} GB/s: {bandwidth['kernel']} over "
        f"{bandwidth['array_bytes'] >> 20} MiB by {bandwidth['threads']} threads, best of {bandwidth['repeats']}.",
        f"- Versions: {', '.join(f'{name} {version}' for name, version in _versions(document).items())}.",
        "- Prompts: "
        + ", ".join(f"{len(sizes)} {kind} ({min(sizes)} to {max(sizes)} tokens)" for kind, sizes in kinds.items())
        + f"; {_lengths(work)}, {work['repeats']} time(s), seed {document['seed']}.",
        *_grouped(work["groups"]),
        "",
        f"All prompts, temperature {available[0]['temperature']:g}:",
        "",
        *_table(
            _SPEED_TITLES,
            [_speed_row(row, document["fastest_plain"]) for row in available],
        ),
        "",
        f"The fastest plain decoding here is {document['fastest_plain'] or DASH}.",
        "",
        *_table(
            ["runner", "peak MB", "load s", "import s", "same tokens", "settings"],
            [_cost_row(row) for row in available],
        ),
        "",
        *_divergences(available),
        *_histograms(available),
        *_growth(document["growth"]),
        *_by_category(document),
        *[f"- {row['name']}: left out, {row['reason']}." for row in document["runners"] if not row["available"]],
        "",
    ]
    return "\n".join(parts)


def _lengths(work: dict[str, Any]) -> str:
    if all(prompt.get("answer_tokens") is None for prompt in work["prompts"]):
        return f"{work['max_new_tokens']} tokens each"
    return (
        f"up to {work['max_new_tokens']} tokens each, ended where plain decoding's greedy answer ends, which is also "
        "the history of a next turn"
    )


def _versions(document: dict[str, Any]) -> dict[str, str]:
    merged = dict(document["versions"])
    for row in document["runners"]:
        merged.update({name: text for name, text in (row["versions"] or {}).items() if name != "features"})
    return merged


def _grouped(groups: list[list[str]]) -> list[str]:
    if len(groups) < 2:
        return []
    return [
        "- Memory did not hold all runners at once; groups that took turns: "
        + "; ".join(", ".join(group) for group in groups)
        + "."
    ]


_WORDS = ("runner", "weights", "settings", "category")  # columns of text; the others are figures
_LONGEST = 8


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    rules = ["---" if title in _WORDS else "---:" for title in titles]
    lines = [f"| {' | '.join(titles)} |", f"| {' | '.join(rules)} |"]
    return lines + [f"| {' | '.join(row)} |" for row in rows]


_SPEED_TITLES = (
    *("runner", "weights", "tokens/s", "ms a token", "over fastest plain", "first token ms", "accept length"),
    *("draft ms", "verify ms", "host ms", "GB/s", "of limit"),
)


def _speed_row(row: dict[str, Any], fastest: str | None) -> list[str]:
    share = DASH if row["bandwidth_share"] is None else f"{row['bandwidth_share']:.0%}"
    return [
        f"**{row['name']}**" if row["name"] == fastest else row["name"],
        row["weights"] or DASH,
        number(row["tokens_per_second"], 1),
        number(row["ms_per_token"], 2),
        number(row["speedup_over_fastest_plain"], 2),
        number(row["ttft_ms"], 0),
        number(row["accept_length_mean"], 2),
        *(number(row[key], 2) for key in ("draft_ms", "verify_ms", "host_ms")),
        number(row["gb_per_s"], 1),
        share,
    ]


def _cost_row(row: dict[str, Any]) -> list[str]:
    match = row["tokens_match"]
    settings = ", ".join(f"{name} {value}" for name, value in (row["settings"] or {}).items() if value is not None)
    return [
        row["name"],
        number(row["peak_rss_mb"], 0),
        number(row["load_s"], 1),
        number(row["import_s"], 1),
        DASH if match is None else "yes" if match else f"{row['texts_departed']} of {row['texts_compared']} depart",
        settings or DASH,
    ]


def by_category(document: dict[str, Any]) -> dict[float, list[list[str]]]:
    """A table for every temperature, where there is more than one row in all: a head, then a row a category, their
    mean, and all prompts.
    """
    cells = {(cell["temperature"], cell["category"], cell["runner"]): cell for cell in document["cells"]}
    runners = list(dict.fromkeys(runner for _, _, runner in cells))
    names = list(dict.fromkeys(category for _, category, _ in cells))
    rows = {name: name for name in names if name not in (MEAN, ALL)}
    rows |= {name: title for name, title in ((MEAN, "mean of categories"), (ALL, "all prompts")) if name in names}
    temperatures = list(dict.fromkeys(temperature for temperature, _, _ in cells))
    if len(rows) * len(temperatures) < 2:
        return {}
    return {
        temperature: [
            ["category", *runners],
            *(
                [title, *(_cell(cells.get((temperature, name, runner))) for runner in runners)]
                for name, title in rows.items()
            ),
        ]
        for temperature in temperatures
    }


def _cell(cell: dict[str, Any] | None) -> str:
    """Tokens/s (times the fastest plain runner) accept length, share of repeated 8-grams."""
    if cell is None:
        return DASH
    length = "" if cell["accept_length_mean"] is None else f" {cell['accept_length_mean']:.2f}"
    speed = f"{number(cell['tokens_per_second'], 1)} ({number(cell['speedup_over_fastest_plain'], 2)})"
    share = cell.get("repeated_8grams")  # documents of before have none
    return f"{speed}{length}" if share is None else f"{speed}{length}, {share:.0%}"


def category_title(temperature: float) -> str:
    """What stands above a table of `by_category`."""
    return (
        f"T = {temperature:g}, by category: tokens/s (times the fastest plain runner), accept length, share of the "
        "answers' 8-grams that are repeated"
    )


def _by_category(document: dict[str, Any]) -> list[str]:
    lines = []
    for temperature, (head, *rows) in by_category(document).items():
        lines += [f"{category_title(temperature)}:", "", *_table(head, rows), ""]
    return lines


def _divergences(available: list[dict[str, Any]]) -> list[str]:
    lines = []
    for row in available:
        first = row["first_divergence"]
        if first is None:
            continue
        margin = DASH if first["margin"] is None else f"{first['margin']:.4f}"
        largest = DASH if row["largest_margin"] is None else f"{row['largest_margin']:.4f}"
        lines.append(
            f"- {row['name']} departs first at token {first['position']} of {first['prompt']}, where plain decoding's "
            f"two best logits are {margin} apart; over all departures at most {largest}."
        )
    return [*lines, ""] if lines else []


def _histograms(available: list[dict[str, Any]]) -> list[str]:
    rows = [row for row in available if row["accept_histogram"]]
    if not rows:
        return []
    shares = []
    for row in rows:
        counts = row["accept_histogram"]
        total = sum(counts)
        shown = [*(counts[i] if i < len(counts) else 0 for i in range(_LONGEST)), sum(counts[_LONGEST:])]
        shares.append([row["name"], *(f"{count / total:.0%}" for count in shown)])
    titles = ["runner", *map(str, range(_LONGEST)), f"{_LONGEST} or more"]
    return ["Rounds by accept length:", "", *_table(titles, shares), ""]


def _growth(growth: list[dict[str, Any]]) -> list[str]:
    if not growth:
        return []
    rows = {(row["runner"], row["context"]): row for row in growth}
    contexts = sorted({context for _, context in rows})
    table = []
    for runner in dict.fromkeys(name for name, _ in rows):
        by_context = [rows.get((runner, context)) for context in contexts]
        table.append([runner, *(DASH if row is None else number(row["ms_per_token"], 2) for row in by_context)])
    return ["ms a token by tokens of context:", "", *_table(["runner", *map(str, contexts)], table), ""]


@click.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.argument("documents", nargs=-1, required=True, type=click.Path(path_type=Path))
def report(out: Path, documents: tuple[Path, ...]) -> None:
    """Write the page OUT from what `dovetail bench --json` printed last."""
    read = []
    for path in documents:
        try:
            document = json.loads(path.read_text(encoding="utf-8").strip().splitlines()[-1])
        except (OSError, ValueError, IndexError) as error:
            raise UserError(f"expected the JSON document of dovetail bench, got {path}: {error}") from None
        if not isinstance(document, dict) or document.get("benchmark") != "dovetail bench":
            raise UserError(f"expected the JSON document of dovetail bench, got another document in {path}")
        read.append(document)
    strict_json.write(out, markdown(read))


if __name__ == "__main__":
    run(report, "python -m dovetail.calibration.bench.markdown")
