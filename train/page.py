"""One figure of several runs, and a page of HTML that holds it with nothing outside of itself."""

import html
import io
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from train.recorded import Run, curve, number, timeline

# Colours of different brightness, dashes and marks: told apart in black and white too.
_COLOURS = ("#000000", "#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#999999")
_DASHES = ("-", "--", "-.", ":")
_MARKS = "osD^vPX*"
_POINTS = 300  # at most of a line; a window of more rows gives its least and its greatest

Curve = tuple[np.ndarray, np.ndarray]


def write(runs: Sequence[Run], rows: Sequence[Sequence[str]], notes: Sequence[str]) -> str:
    """The page: table, remarks, figure.

    Args:
      runs: what is drawn.
      rows: the table's, as of `train.compare.table`.
      notes: remarks on single runs.
    """
    names = "".join(f"<th scope=col>{html.escape(run.name)}</th>" for run in runs)
    body = "".join(
        f"<tr><th scope=row>{html.escape(first)}</th>"
        + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells)
        + "</tr>\n"
        for first, *cells in rows
    )
    remarks = "".join(f"<li>{html.escape(note)}</li>\n" for note in notes)
    return _PAGE.format(
        names=names, rows=body, remarks=f"<ul>\n{remarks}</ul>" if notes else "", figure=draw(runs)
    )


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>Training runs</title>
<style>
body {{ font: 15px/1.5 sans-serif; margin: 2em auto; max-width: 75em; padding: 0 1em; color: #111;
  background: #fff }}
table {{ border-collapse: collapse }}
th, td {{ border-bottom: 1px solid #bbb; padding: .2em 1em .2em 0; text-align: left }}
td {{ font-variant-numeric: tabular-nums }}
thead th {{ border-bottom: 2px solid #111 }}
.wide {{ overflow-x: auto }}
svg {{ max-width: 100%; height: auto }}
</style>
</head>
<body>
<h1>Training runs</h1>
{remarks}
<div class="wide"><table>
<thead><tr><th></th>{names}</tr></thead>
<tbody>
{rows}</tbody>
</table></div>
<h2>Curves</h2>
<p>Training losses are means over windows of steps; open marks are evaluations on a part of the
held-out split, filled ones on all of it. Time is that of training alone.</p>
<div class="wide">{figure}</div>
</body>
</html>
"""


def draw(runs: Sequence[Run]) -> str:
    """The figure as an SVG element: losses, gradient norm, rate, captured energy, throughput."""
    # Letters stay letters, which can be read aloud and searched.
    plain: Any = {"svg.fonttype": "none", "svg.hashsalt": "runs"}
    with matplotlib.rc_context(plain):
        figure = Figure(figsize=(12, 12.5), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.subplots(3, 2)
        handles = [_draw_run(axes.ravel(), run, number) for number, run in enumerate(runs)]
        for place, title, x, y, scale in _PANELS:
            panel = axes[place]
            panel.set(title=title, xlabel=x, ylabel=y)
            if scale == "log" and any(np.any(line.get_ydata() > 0) for line in panel.lines):
                panel.set_yscale("log")
            if scale == "from 0":
                panel.set_ylim(bottom=0)
            panel.grid(alpha=0.3)
            if not panel.lines:
                panel.text(0.5, 0.5, "not measured", ha="center", transform=panel.transAxes)
        # (A name that begins with an underscore would be left out by itself.)
        names = [f"{number}: {run.name}" for number, run in enumerate(runs, 1)]
        legend = figure.legend(handles, names, loc="outside upper center", ncols=min(3, len(runs)))
        for name in legend.get_texts():
            name.set_parse_math(False)  # a dollar in a name is no formula
        text = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(text, format="svg", metadata=nothing)
    element = text.getvalue()
    element = element[element.index("<svg") :]
    return element.replace("<svg", '<svg role="img" aria-label="curves of the runs"', 1)


_PANELS = (
    ((0, 0), "Loss by tokens", "tokens trained on", "loss (nats a token)", "linear"),
    ((0, 1), "Loss by time", "time in training (s)", "loss (nats a token)", "linear"),
    ((1, 0), "Gradient norm", "step", "global norm before clipping", "log"),
    ((1, 1), "Effective learning rate", "step", "learning rate x scale", "linear"),
    ((2, 0), "Captured energy", "step", "share of the gradient in the subspaces", "from 0"),
    ((2, 1), "Throughput", "step", "tokens/s", "from 0"),
)


def _draw_run(panels: Sequence[Axes], run: Run, index: int) -> Line2D:
    """Draws a run into the six panels, and returns its mark for the legend."""
    style: dict[str, Any] = {
        "color": _COLOURS[index % len(_COLOURS)],
        "linestyle": _DASHES[index % len(_DASHES)],
        "marker": _MARKS[index % len(_MARKS)],
        "markersize": 4,
        "linewidth": 1.3,
    }

    def line(panel: Axes, found: Curve, **more: Any):
        x, y = found
        if len(x):
            panel.plot(x, y, **(style | {"markevery": max(1, len(x) // 8)} | more))

    per_step, (steps, seconds) = _tokens_per_step(run), timeline(run)

    def at_seconds(step: np.ndarray) -> np.ndarray:
        # Steps whose time no row tells are left out.
        return np.interp(np.where(step <= steps[-1], step, np.nan), steps, seconds)

    train = run.of("train")
    losses = _means(curve(train, "step", "loss"))
    part = curve(run.of("validation"), "step", "validation_loss")
    whole = curve(run.of("final"), "step", "validation_loss")
    alone = {"linestyle": "none", "markevery": 1, "markersize": 6}
    for panel, place in ((panels[0], lambda step: step * per_step), (panels[1], at_seconds)):
        line(panel, (place(losses[0]), losses[1]))
        line(panel, (place(part[0]), part[1]), **alone, markerfacecolor="none")
        line(panel, (place(whole[0]), whole[1]), **alone)
    line(panels[2], _extremes(curve(train, "step", "grad_norm")))
    line(panels[3], _extremes(curve(train, "step", "effective_learning_rate")))
    line(panels[4], curve(run.of("subspace"), "step", "captured_energy"))
    moved = np.diff(seconds) > 0
    speed = np.diff(steps)[moved] * per_step / np.diff(seconds)[moved]
    line(panels[5], (steps[1:][moved], speed))
    return Line2D([], [], **style)


def _tokens_per_step(run: Run) -> float:
    for row in run.of("train"):
        tokens, step = number(row, "tokens"), number(row, "step")
        if tokens and step:
            return tokens / step
    return 1.0


def _means(found: Curve) -> Curve:
    """Means over windows, so that no more than a hundred points are left."""
    x, y = found
    parts = max(1, min(len(x), 100))
    cut = lambda values: np.array([part.mean() for part in np.array_split(values, parts)])
    return (cut(x), cut(y)) if len(x) else found


def _extremes(found: Curve) -> Curve:
    """The least and the greatest of each window where there are too many points: peaks stay."""
    x, y = found
    if len(x) <= _POINTS:
        return found
    chosen: list[int] = []
    for window in np.array_split(np.arange(len(x)), _POINTS // 2):
        ends = {window[np.argmin(y[window])], window[np.argmax(y[window])]}
        chosen += sorted(ends)
    return x[chosen], y[chosen]
