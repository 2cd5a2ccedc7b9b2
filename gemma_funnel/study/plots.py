"""Plots of a study, out of its organised results."""

from collections.abc import Callable, Iterator, Sequence
import textwrap
from typing import Any, NamedTuple

from gemma_funnel import cli
from gemma_funnel.evaluation import report
from gemma_funnel.study.analysis import (
  SHAPE,
  Results,
  Row,
  grouped,
  levels,
  over_seeds,
)

# Distinct to the colour-blind (Okabe and Ito); yellow is too light for lines.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
MARKERS = "osD^vP"
DASHES = ("-", "--", ":", "-.")
OTHER = "0.45"
MAX_PANELS = 9
_ACROSS = 3
_NOT_TUNED = "not tuned with the funnel"

# A panel's title, and its rows.
Panel = tuple[str, list[Row]]


class Plot(NamedTuple):
  """A plot: its file's name, a Figure, and what it shows, in two lengths."""

  name: str
  figure: Any
  caption: str
  alt: str


def draw(results: Results) -> Iterator[Plot]:
  """The plots that there are results for; many panels are several figures."""
  cells, baselines = results.compared(), results.baselines
  started = [c for c in cells if c.get("start") is not None]
  kinds = (
    (
      "tradeoff",
      _panels(cells, baselines, ("task",)),
      _plot_tradeoff,
      "Metric against what the funnel saves; the line joins points that no "
      "other point beats in both. Hollow points are not fine-tuned with the "
      "funnel; means over seeds.",
      "the metric against the saving",
    ),
    (
      "start",
      _panels(started, baselines, ("task", "pretraining")),
      _plot_start,
      "Metric against the layer at which the funnel starts; means over all "
      "other choices, bars are the spread over seeds of the change from the "
      "baseline, which is the dashed line.",
      "the metric against the funnel's first layer",
    ),
    (
      "depth",
      _depth_panels(results.similarity),
      _plot_depth,
      "Cosine between the state of a token without and with the funnel, after "
      "each layer; the stage is shaded, crosses are its recovery.",
      "the cosine of states by layer",
    ),
  )
  for name, panels, plot, caption, what in kinds:
    for at in range(0, len(panels), MAX_PANELS):
      part = panels[at : at + MAX_PANELS]
      number = f"_{at // MAX_PANELS + 1}" if len(panels) > MAX_PANELS else ""
      titles = "; ".join(title.replace("\n", " ") for title, _ in part)
      alt = f"{len(part)} plots of {what}: {titles}"
      yield Plot(f"{name}{number}.png", _figure(part, plot), caption, alt)


def _figure(panels: Sequence[Panel], plot: Callable) -> Any:
  """A grid of panels over one legend."""
  across = min(_ACROSS, len(panels))
  down = -(-len(panels) // across)
  # A legend needs room even below a single panel.
  figure = report.new_figure(max(6.0, 4.2 * across), 1.0 + 3.2 * down)
  grid = figure.subplots(down, across, squeeze=False).flatten()
  looks = _Looks([row for _, rows in panels for row in rows])
  handles = {}
  for axes in grid[len(panels) :]:
    axes.set_axis_off()
  for axes, (title, rows) in zip(grid, panels, strict=False):
    axes.set_title(title, fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(color="0.9", linewidth=0.6)
    axes.set_axisbelow(True)
    x_label, y_label = plot(axes, rows, looks)
    axes.set_xlabel(x_label, fontsize=8)
    axes.set_ylabel(y_label, fontsize=8)
    for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
      handles.setdefault(label, handle)
  style = dict(loc="outside lower center", fontsize=8)
  style["ncols"] = min(len(handles), 1 + across)
  figure.legend(handles.values(), handles.keys(), **style)
  return figure


class _Looks:
  """The same in all panels of a figure: a recovery has a colour, a pretraining
  a marker and dashes."""

  def __init__(self, rows: Sequence[Row]):
    cycle = lambda axis, looks: {
      name: looks[n % len(looks)] for n, name in enumerate(levels(rows, axis))
    }
    self._colors = cycle("recover", COLORS)
    self.recover_markers = cycle("recover", MARKERS)
    self.markers = cycle("pretraining", MARKERS)
    self.dashes = cycle("pretraining", DASHES)

  def color(self, row: Row) -> str:
    # Funnels of several stages have no single recovery.
    return self._colors.get(row.get("recover"), OTHER)

  def explain(self, axes, rows: Sequence[Row], marks: bool = True) -> None:
    """Legend entries of each axis; all combinations would be too many."""
    for name in levels(rows, "recover"):
      look = dict(color=self._colors[name], linewidth=4)
      _entry(axes, f"recover {name}", **look)
    if any(row.get("recover") is None for row in rows):
      _entry(axes, "several stages", linewidth=4)
    for name in levels(rows, "pretraining"):
      look = {"linestyle": self.dashes[name]}
      if marks:
        look = {"marker": self.markers[name], "linestyle": "none"}
      _entry(axes, f"{name} pretraining", **look)


def _entry(axes, label: str, **look) -> None:
  """An entry of the legend that is nowhere on the axes."""
  axes.plot([], [], label=label, **{"color": OTHER, **look})


def _title(rows: Sequence[Row], model: str, *parts: Any) -> str:
  """The parts of a title, with the model where rows are of several."""
  several = len({row["model"] for row in rows}) > 1
  parts = (model if several else None, *parts)
  text = ", ".join(str(part) for part in parts if part is not None)
  return "\n".join(textwrap.wrap(cli.clean(text), 44))


def _panels(cells, baselines, keys) -> list[Panel]:
  """Panels of cells by `keys`, each with its baseline."""
  panels = []
  for key, part in grouped(cells, ("model", "metric", *keys)).items():
    model, metric, task, *pretraining = key
    subject = lambda c: (c["model"], c["metric"], c["task"])
    mine = [c for c in baselines if subject(c) == (model, metric, task)]
    kind = f"{pretraining[0]} pretraining" if pretraining else None
    panels.append((_title(cells, model, task, kind), mine + part))
  return panels


def _split(rows: Sequence[Row]) -> tuple[list[Row], float, str]:
  """(cells with a funnel, the baseline's value, the axis label) of a panel."""
  cells = [c for c in rows if c["role"] == "funnel"]
  baselines = [c for c in rows if c["role"] == "baseline"]
  better = "" if cells[0]["higher_is_better"] else " (lower is better)"
  value = over_seeds(baselines, "value").mean
  return cells, value, cells[0]["metric"] + better


def _plot_tradeoff(axes, rows, looks: _Looks) -> tuple[str, str]:
  cells, baseline, y_label = _split(rows)
  measured = all(c.get("reduction") is not None for c in cells)
  key = "reduction" if measured else "ideal_reduction"
  points = [(0.0, baseline)]
  look = dict(color="black", markersize=11, linestyle="none", zorder=4)
  axes.plot(*points[0], "*", label="baseline", **look)
  keys = ("pretraining", "finetuning", "funnel")
  for (pretraining, finetuning, _), part in grouped(cells, keys).items():
    x, y = over_seeds(part, key), over_seeds(part, "value").mean
    if x is None:
      continue
    points.append((100 * x.mean, y))
    color = looks.color(part[0])
    axes.plot(
      *points[-1],
      looks.markers[pretraining],
      markersize=5.5,
      markeredgecolor=color,
      markerfacecolor="white" if finetuning == "off" else color,
      alpha=0.85,
      zorder=3,
    )
  looks.explain(axes, cells)
  if any(c["finetuning"] == "off" for c in cells):
    look = dict(marker="o", linestyle="none", markerfacecolor="white")
    _entry(axes, _NOT_TUNED, **look)
  front = pareto(points, cells[0]["higher_is_better"])
  if len(front) > 1:
    look = dict(color="0.35", linewidth=1, drawstyle="steps-pre", zorder=2)
    axes.plot(*zip(*front, strict=True), label="Pareto front", **look)
  axes.margins(0.08)
  return "time saved (%)" if measured else "FLOPs saved, ideal (%)", y_label


def pareto(
  points: Sequence[tuple[float, float]], higher_is_better: bool
) -> list[tuple[float, float]]:
  """The points of (saving, metric) that no other is at least as good as in
  both, by saving."""
  sign = 1 if higher_is_better else -1
  front = []
  for point in sorted(set(points), key=lambda p: (-p[0], -sign * p[1])):
    if not front or sign * point[1] > sign * front[-1][1]:
      front.append(point)
  return front[::-1]


def _plot_start(axes, rows, looks: _Looks) -> tuple[str, str]:
  cells, baseline, y_label = _split(rows)
  axes.axhline(baseline, color="black", linestyle="--", label="baseline")
  starts = levels(cells, "start")
  lines = grouped(cells, ("recover", "finetuning"))
  # Beside each other, or error bars would lie on one another.
  gaps = (b - a for a, b in zip(starts, starts[1:], strict=False))
  gap = min(gaps, default=1)
  # Seeds differ without a funnel too; that is not the funnel's spread.
  change = lambda c: {"seed": c["seed"], "drop": c["value"] - c["baseline"]}
  for n, ((recover, finetuning), part) in enumerate(lines.items()):
    shift = 0.4 * gap * ((n + 0.5) / len(lines) - 0.5)
    by_start = grouped(part, ("start",))
    spreads = [over_seeds(map(change, p)) for p in by_start.values()]
    untuned = finetuning == "off"
    axes.errorbar(
      [start + shift for (start,) in by_start],
      [over_seeds(p, "value").mean for p in by_start.values()],
      yerr=[s.deviation or 0 for s in spreads],
      capsize=2,
      markersize=4.5,
      marker=looks.recover_markers[recover],
      linewidth=1.2,
      linestyle=":" if untuned else "-",
      color=looks.color(part[0]),
      markerfacecolor="white" if untuned else None,
      label="" if untuned else f"recover {recover}",
    )
  if any(c["finetuning"] == "off" for c in cells):
    look = dict(marker="o", linestyle=":", markerfacecolor="white")
    _entry(axes, _NOT_TUNED, **look)
  axes.set_xticks(starts)
  return "first layer of the funnel", y_label


def _depth_panels(rows: Sequence[Row]) -> list[Panel]:
  # Stages of several funnels are not to be shaded in one panel.
  rows = [
    {**row, "stages": row["funnel"] if row.get("start") is None else None}
    for row in rows
  ]
  panels = []
  for key, part in grouped(rows, ("model", *SHAPE, "stages")).items():
    model, start, _, stride, reduce, stages = key
    parts = [stages]
    if stages is None:
      parts = [f"layers {start} to {_last(part[0])}", reduce]
      if stride is not None:
        parts.insert(1, f"stride {stride}")
    panels.append((_title(rows, model, *parts), part))
  return panels


def _last(row: Row) -> int:
  """The last layer of the stage."""
  if row.get("stop") is not None:
    return row["stop"] - 1
  return max(point["layer"] for point in row["layers"])


def _plot_depth(axes, rows, looks: _Looks) -> tuple[str, str]:
  start = rows[0].get("start")
  if start is not None:
    span = start - 0.5, _last(rows[0]) + 0.5
    axes.axvspan(*span, color="0.92", zorder=0, label="stage")
  keys = ("recover", "pretraining", "finetuning")
  for (_, pretraining, finetuning), part in grouped(rows, keys).items():
    values = {}
    for row in part:
      for point in row["layers"]:
        recovery = point.get("at") == "recovery"
        x = point["layer"] + 0.5 * recovery
        values.setdefault((x, recovery), []).append(point["cosine"])
    mean = {x: sum(values[x]) / len(values[x]) for x in sorted(values)}
    color = looks.color(part[0])
    axes.plot(
      [x for x, _ in mean],
      mean.values(),
      color=color,
      linewidth=1.3,
      linestyle=looks.dashes[pretraining],
      marker="s" if finetuning == "on" else "o",
      markersize=3.5,
      markerfacecolor="white" if finetuning == "off" else color,
    )
    crosses = [(x, y) for (x, recovery), y in mean.items() if recovery]
    if crosses:
      look = dict(color=color, markersize=7, markeredgewidth=1.6)
      axes.plot(*zip(*crosses, strict=True), "x", **look)
  looks.explain(axes, rows, marks=False)
  tuned = {row["finetuning"] for row in rows}
  look = dict(linestyle="none", markersize=4)
  if "off" in tuned:
    _entry(axes, _NOT_TUNED, marker="o", markerfacecolor="white", **look)
  if "on" in tuned:
    _entry(axes, "tuned with the funnel", marker="s", **look)
  axes.locator_params("x", integer=True)
  return "layer", "cosine"
