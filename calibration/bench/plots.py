"""The plots of `dovetail bench --plots`: speed, where a round's time goes, and growth with the context."""

from __future__ import annotations

from pathlib import Path
from typing import Any

_OURS, _THEIRS, _PLAIN = "#1f6f8b", "#b08968", "#8d99ae"
_PARTS = (("verify_ms", "target", "#1f6f8b"), ("draft_ms", "draft", "#e07a5f"), ("host_ms", "host", "#8d99ae"))


def write_plots(document: dict[str, Any], folder: Path) -> list[Path]:
    """PNG files into `folder`, which is made; what there are no figures for is left out. Returns the files."""
    import matplotlib as mpl

    mpl.use("Agg")  # no display needed
    from matplotlib import pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    written = []
    style = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.titlelocation": "left"}
    with plt.style.context(style):
        for name, draw in (("speed", _speed), ("round", _round), ("growth", _growth)):
            figure = draw(document, plt)
            if figure is not None:
                path = folder / f"{name}.png"
                figure.savefig(path, dpi=150, bbox_inches="tight")
                plt.close(figure)
                written.append(path)
    return written


def _title(document: dict[str, Any]) -> str:
    model, machine = document["model"], document["machine"]
    like = f", inflated to {model['like']}" if model["like"] else ""
    return f"{model['name']}, {model['parameters'] / 1e6:,.0f} M {model['weight_format']}{like}; {machine['cpu']}, " + (
        f"{machine['threads']} threads"
    )


def _speed(document: dict[str, Any], plt: Any) -> Any:
    """A bar per runner and temperature: times the fastest plain decoding."""
    cells = [cell for cell in document["cells"] if cell["category"] == "all" and cell["speedup_over_fastest_plain"]]
    if not cells:
        return None
    temperatures = list(dict.fromkeys(cell["temperature"] for cell in cells))
    runners = [row["name"] for row in document["runners"] if row["available"]][::-1]
    figure, panels = plt.subplots(
        1, len(temperatures), figsize=(4.6 * len(temperatures), 0.6 + 0.34 * len(runners)), sharey=True, squeeze=False
    )
    for panel, temperature in zip(panels[0], temperatures, strict=True):
        by_runner = {cell["runner"]: cell for cell in cells if cell["temperature"] == temperature}
        for y, runner in enumerate(runners):
            if runner not in by_runner:
                continue
            cell = by_runner[runner]
            ours = runner.startswith("dovetail")
            ratio = cell["speedup_over_fastest_plain"]
            panel.barh(y, ratio, color=_OURS if ours else _THEIRS if cell["accept_length_mean"] is not None else _PLAIN)
            panel.text(ratio, y, f" {ratio:.2f}   {cell['tokens_per_second']:,.1f}/s", va="center", fontsize=8)
        panel.set_xlim(0, 1.35 * max(cell["speedup_over_fastest_plain"] for cell in by_runner.values()))
        panel.axvline(1, color="black", linewidth=0.8, linestyle=":")
        panel.set_yticks(range(len(runners)), runners)
        panel.set_xlabel(f"times the fastest plain decoding, temperature {temperature:g}")
    figure.suptitle(_title(document), x=0.01, ha="left", fontsize=9)
    figure.tight_layout()
    return figure


def _round(document: dict[str, Any], plt: Any) -> Any:
    """What a mean round takes, split, with the tokens it gives."""
    rows = [row for row in document["runners"] if row["available"] and row["verify_ms"] is not None][::-1]
    if not rows:
        return None
    figure, panel = plt.subplots(figsize=(7.5, 1.2 + 0.34 * len(rows)))
    for y, row in enumerate(rows):
        left = 0.0
        for key, label, colour in _PARTS:
            panel.barh(y, row[key], left=left, color=colour, label=label if y == 0 else None)
            left += row[key]
        tokens = 1 + (row["accept_length_mean"] or 0)
        panel.text(left, y, f" {left:,.1f} ms for {tokens:.2f} tokens", va="center", fontsize=8)
    panel.set_xlim(0, 1.4 * max(sum(row[key] for key, _, _ in _PARTS) for row in rows))
    panel.set_yticks(range(len(rows)), [row["name"] for row in rows])
    panel.set_xlabel("milliseconds a round")
    panel.set_title(_title(document), fontsize=9)
    panel.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    return figure


def _growth(document: dict[str, Any], plt: Any) -> Any:
    """ms a token by context, a line per runner."""
    if not document["growth"]:
        return None
    figure, panel = plt.subplots(figsize=(7.5, 4))
    panel.set_prop_cycle(color=plt.get_cmap("tab20").colors[::2] + plt.get_cmap("tab20").colors[1::2])
    for runner in dict.fromkeys(row["runner"] for row in document["growth"]):
        points = [
            (row["context"], row["ms_per_token"])
            for row in document["growth"]
            if row["runner"] == runner and row["ms_per_token"] is not None
        ]
        ours = runner == "plain" or runner.startswith("dovetail")
        line = "-" if ours else "--"
        panel.plot(*zip(*points, strict=True), line, marker="o", markersize=3, linewidth=2 if ours else 1, label=runner)
    values = [row["ms_per_token"] for row in document["growth"] if row["ms_per_token"]]
    if values and max(values) > 8 * min(values):
        panel.set_yscale("log")
    else:
        panel.set_ylim(bottom=0)
    panel.set_xlabel("tokens of context")
    panel.set_ylabel("ms a token")
    panel.set_title(_title(document), fontsize=9)
    panel.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    return figure
