"""The page of `dovetail calibrate --report`: one HTML file with its plots inside, to be read at a glance."""

from __future__ import annotations

import dataclasses
import html
import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dovetail.calibration.choose import search
from dovetail.calibration.measure import acceptance
from dovetail.runtime.artifact import strict_json
from dovetail.runtime.errors import UserError

if TYPE_CHECKING:
    from dovetail.calibration.choose.calibration import Calibration, Decision

_BLUE, _RED, _GREY, _SAND = "#1f6f8b", "#e07a5f", "#8d99ae", "#b08968"
_STYLE = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.titlelocation": "left"}
_STYLE |= {"svg.fonttype": "none", "font.family": "sans-serif"}
_SWEEP_NODES, _SWEEP_DEPTHS = (2, 4, 6, 8, 10, 12, 16, 24, 32), (1, 2, 3, 4, 5, 6, 8, 10)

_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{{ name }}: calibration</title>
<style>
  body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 1080px; margin: 2em auto; padding: 0 1em }
  h1 { font-size: 1.5em; margin: 0 } h2 { font-size: 1.15em; margin: 2em 0 .3em; border-bottom: 1px solid #ddd }
  .machine, figcaption, .note { color: #666; font-size: .9em } .cards { display: flex; gap: 1em; margin: 1.2em 0 }
  .card { flex: 1; background: #f4f6f8; border-radius: 8px; padding: .8em 1em }
  .card b { font-size: 1.6em; color: {{ blue }} }
  figure { margin: .8em 0 } svg { max-width: 100%; height: auto } .row { display: flex; gap: 1em } .row > * { flex: 1 }
  table { border-collapse: collapse } td, th { padding: .15em .9em .15em 0; text-align: right } th { font-weight: 600 }
  td:first-child, th:first-child { text-align: left } tr.chosen { font-weight: 600; color: {{ blue }} }
</style>
<h1>{{ name }} on this machine</h1>
<p class="machine">{{ machine }}</p>
<p class="machine">What was said: {{ text }}</p>
{% if too_noisy %}
<p><b>Nothing was decided:</b> {{ too_noisy }}.</p>{% endif %}
<div class="cards">
{% for one in decisions %}<div class="card">temperature {{ one.temperature }}<br>
<b>{{ one.gain }} times</b> plain decoding<br>{{ one.choice }}<br>
<span class="note">{{ one.note }}</span></div>{% endfor %}
</div>
<h2>What a pass costs</h2>
<div class="row"><figure>{{ verify }}</figure><figure>{{ draft }}</figure></div>
<p class="note">{{ rounds }} rounds in {{ seconds }} s, interleaved; medians are certain to {{ error }}. A pass never
gets cheaper with more nodes: where medians said so they were pooled.</p>
{% for one in decisions %}
<h2>Temperature {{ one.temperature }}</h2>
<p class="note">{{ one.texts }}.</p>
<div class="row"><figure>{{ one.heat }}</figure><figure>{{ one.by_rank }}</figure></div>
<div class="row"><figure>{{ one.by_score }}</figure><figure>{{ one.bars }}</figure></div>
<table><tr><th>policy</th><th>nodes</th><th>depth</th><th>width</th><th>foretold, tokens/s</th><th>measured</th>
<th>error</th><th>over plain, foretold</th><th>measured</th><th>accept length</th></tr>
{% for line in one.table %}<tr{% if line.chosen %} class="chosen"{% endif %}>
{% for cell in line.cells %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</table>
{% endfor %}
<p class="note">{{ versions }}</p>
</html>
"""


def require_plots() -> None:
    """Raise `UserError` where the plots' package is missing, before anything is measured."""
    try:
        import matplotlib as mpl
    except ImportError:
        raise UserError(
            "--report: expected matplotlib for the plots, got none; pip install 'dovetail[bench]' or drop the option"
        ) from None
    mpl.use("Agg")  # no display needed


def write_report(path: Path, name: str, document: dict[str, Any], result: Calibration) -> None:
    """Write the page to `path`. `document` is the one of `--json`. Raises `UserError` when it can't be written."""
    import jinja2
    from matplotlib import pyplot as plt

    machine, engines = document["machine"], document["engines"]
    with plt.style.context(_STYLE):
        page = (
            jinja2.Environment(autoescape=False)
            .from_string(_PAGE)
            .render(
                name=html.escape(name),
                blue=_BLUE,
                machine=html.escape(
                    f"{machine['cpu']}, GPU {machine['gpu']}; {engines['threads']} threads, draft on "
                    f"{engines['draft_device']} with {engines['draft_threads']}, {engines['numerics']} numerics"
                ),
                text=html.escape(result.text),
                versions=html.escape(", ".join(f"{tool} {version}" for tool, version in machine["versions"].items())),
                too_noisy=html.escape(result.too_noisy or ""),
                verify=_verify_plot(result),
                draft=_draft_plot(result),
                rounds=result.latency.rounds,
                seconds=f"{result.latency.seconds:.0f}",
                error=f"{result.latency.error:.1%}",
                decisions=[_decision(decision, result) for decision in result.decisions],
            )
        )
    try:
        strict_json.write(path, page)
    except OSError as error:
        raise UserError(f"--report {path}: expected a writable path, got {error.strerror}; give another") from None


def _decision(decision: Decision, result: Calibration) -> dict[str, Any]:
    chosen, choice = decision.chosen, decision.choice
    replay, tree = chosen.replay, chosen.tree
    about = {
        "plain": "plain decoding: the draft does not pay",
        "lookup": "matches in the text alone: the draft does not pay",
        "fixed": f"always {tree.nodes} nodes, depth {tree.depth}, width {tree.width}, behind matches in the text",
        "adaptive": (
            f"adaptive: {replay.nodes / replay.rounds:.1f} nodes and {replay.levels / replay.rounds:.1f} levels on "
            f"average, width {tree.width}, behind matches in the text"
        ),
    }
    gain = decision.compared[chosen.kind].over(decision.compared["plain"])[0]
    return {
        "texts": decision.texts_summary,
        "temperature": f"{decision.temperature:g}",
        "gain": f"{gain:.2f}",
        "choice": about[chosen.kind],
        "note": (
            f"{choice.measured:.1f} tokens/s measured, {choice.predicted:.1f} foretold; accept length "
            f"{choice.accept_length:.2f}, break-even {choice.break_even_accept_length:.2f}"
        ),
        "heat": _heat_plot(decision, result),
        "by_rank": _rank_plot(decision),
        "by_score": _score_plot(decision),
        "bars": _bar_plot(decision),
        "table": _table(decision),
    }


def _table(decision: Decision) -> list[dict[str, Any]]:
    lines, plain = [], decision.candidates.plain.replay.tokens_per_second
    for name, one in decision.candidates.named().items():
        measured, foretold = decision.compared[name], one.replay.tokens_per_second
        sizes = ("", "", "") if name in ("plain", "lookup") else dataclasses.astuple(one.tree)
        if name == "adaptive":
            sizes = (
                f"{one.replay.nodes / one.replay.rounds:.1f}",
                f"{one.replay.levels / one.replay.rounds:.1f}",
                sizes[2],
            )
        cells = [
            "the artifact's tree" if name == "default" else name,
            *sizes,
            f"{foretold:.1f}",
            f"{measured.tokens_per_second:.1f}",
            f"{foretold / measured.tokens_per_second - 1:+.0%}",
            f"{foretold / plain:.2f}",
            f"{measured.over(decision.compared['plain'])[0]:.2f}",
            f"{measured.accept_length:.2f}",
        ]
        lines.append({"cells": cells, "chosen": name == decision.chosen.kind})
    return lines


def _svg(figure: Any) -> str:
    """The figure as an element for a page."""
    from matplotlib import pyplot as plt

    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", bbox_inches="tight")
    plt.close(figure)
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def _panel(title: str, x: str, y: str) -> tuple[Any, Any]:
    from matplotlib import pyplot as plt

    figure, panel = plt.subplots(figsize=(5.2, 3.2))
    panel.set(title=title, xlabel=x, ylabel=y)
    return figure, panel


def _verify_plot(result: Calibration) -> str:
    costs = result.latency.costs
    figure, panel = _panel("One pass of the target", "rows of the pass", "ms")
    for row, context in enumerate(costs.contexts):
        shade = 0.35 + 0.65 * (row + 1) / len(costs.contexts)
        panel.plot(costs.nodes, costs.verify_ms[row], color=_BLUE, alpha=shade, label=f"{context} tokens of context")
        alone = [count for count in costs.nodes if (context, count) in result.latency.verify]
        timings = [result.latency.verify[context, count] for count in alone]
        panel.errorbar(
            alone,
            [timing.median for timing in timings],
            [timing.median * timing.error for timing in timings],
            fmt=".",
            color=_BLUE,
            alpha=shade,
        )
    panel.set_ylim(bottom=0)
    panel.legend(frameon=False)
    return _svg(figure)


def _draft_plot(result: Calibration) -> str:
    costs = result.latency.costs
    figure, panel = _panel("One call of the draft", "rows (width)", "ms")
    for row, context in enumerate(costs.contexts):
        shade = 0.35 + 0.65 * (row + 1) / len(costs.contexts)
        panel.plot(
            costs.widths, costs.level_ms[row], ".-", color=_RED, alpha=shade, label=f"{context} tokens of context"
        )
    panel.set_ylim(bottom=0)
    panel.legend(frameon=False)
    return _svg(figure)


def _heat_plot(decision: Decision, result: Calibration) -> str:
    """Foretold speed of every fixed tree, of the best one's width."""
    import numpy as np

    fixed = decision.candidates.fixed
    best = fixed.tree
    nodes = [count for count in _SWEEP_NODES if count <= result.latency.costs.nodes[-1]]
    depths = [depth for depth in _SWEEP_DEPTHS if depth <= len(decision.choice.chances.by_rank)]
    speeds = search.sweep(
        decision.texts,
        result.latency.costs,
        nodes,
        depths,
        best.width,
        fixed,
        decision.candidates.plain.replay,
    )
    grid = np.array([[speeds[count, depth] for count in nodes] for depth in depths])
    grid /= decision.candidates.plain.replay.tokens_per_second
    figure, panel = _panel(f"Fixed trees of width {best.width}: times plain decoding, foretold", "nodes", "depth")
    image = panel.imshow(grid, aspect="auto", origin="lower", cmap="viridis")
    panel.set_xticks(range(len(nodes)), nodes)
    panel.set_yticks(range(len(depths)), depths)
    for y, x in np.ndindex(*grid.shape):
        light = grid[y, x] < (grid.min() + grid.max()) / 2
        panel.text(x, y, f"{grid[y, x]:.2f}", ha="center", va="center", fontsize=7, color="white" if light else "black")
    x = float(np.interp(best.nodes, nodes, range(len(nodes))))
    y = float(np.interp(best.depth, depths, range(len(depths))))
    panel.plot(x, y, "o", markersize=24, markerfacecolor="none", markeredgecolor=_RED, markeredgewidth=2)
    figure.colorbar(image)
    return _svg(figure)


def _rank_plot(decision: Decision) -> str:
    figure, panel = _panel("Accepted, given that the parent was", "depth", "share of positions")
    rows = decision.choice.chances.by_rank
    bottom = [0.0] * len(rows)
    for rank in range(min(4, len(rows[0]))):
        share = [row[rank] for row in rows]
        panel.bar(
            range(1, len(rows) + 1), share, bottom=bottom, color=_BLUE, alpha=1 - 0.23 * rank, label=f"child {rank + 1}"
        )
        bottom = [a + b for a, b in zip(bottom, share, strict=True)]
    panel.set_ylim(0, 1)
    panel.legend(frameon=False, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.15))
    return _svg(figure)


def _score_plot(decision: Decision) -> str:
    import numpy as np

    from dovetail.runtime.policies.chances import SCORE_STEP

    figure, panel = _panel(
        "The draft's confidence and what comes true", "probability of the path, by the draft", "accepted"
    )
    confidence = np.exp(-SCORE_STEP * (np.arange(len(decision.choice.chances.by_score)) + 0.5))
    panel.plot([0, 1], [0, 1], color=_GREY, linestyle=":", label="as it says")
    for depth, shade in ((1, 0.3), (2, 0.5), (4, 0.7)):
        panel.plot(
            confidence, acceptance.by_score(decision.texts, depth), color=_SAND, alpha=shade, label=f"at depth {depth}"
        )
    panel.plot(confidence, decision.choice.chances.by_score, color=_BLUE, linewidth=2, label="at any depth")
    panel.legend(frameon=False)
    return _svg(figure)


def _bar_plot(decision: Decision) -> str:
    figure, panel = _panel("Foretold and measured", "", "tokens/s")
    named = decision.candidates.named()
    for x, (name, one) in enumerate(named.items()):
        measured = decision.compared[name].tokens_per_second
        panel.bar(x - 0.2, one.replay.tokens_per_second, 0.38, color=_GREY, label="" if x else "foretold")
        panel.bar(x + 0.2, measured, 0.38, color=_BLUE, label="" if x else "measured")
    panel.set_xticks(range(len(named)), ["the artifact's" if name == "default" else name for name in named])
    panel.legend(frameon=False)
    return _svg(figure)
