"""Plots of an ablation study, out of its organised results."""

from collections.abc import Callable, Iterator, Sequence
import io
import textwrap
from typing import Any

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

# A panel's title, its cells, and what draws them.
Panel = tuple[str, list[Row]]


def draw(results: Results) -> Iterator[tuple[str, Any, str, str]]:
  """(file name, Figure, caption, alternative text) of each plot.

  What there are no results for is not drawn; what has many panels is several
  figures.
  """
  cells = results.compared()
  baselines = [c for c in results.cells if c["role"] == "baseline"]
  kinds = (
    (
      "tradeoff",
      _tradeoff_panels(cells, baselines),
      _plot_tradeoff,
      "Metric against what the funnel saves; the line joins points that no "
      "other point beats in both. Hollow points are not fine-tuned with the "
      "funnel; means over seeds.",
      "the metric against the saving",
    ),
    (
      "start",
      _start_panels(cells, baselines),
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
    parts = [
      panels[i : i + MAX_PANELS] for i in range(0, len(panels), MAX_PANELS)
    ]
    for number, part in enumerate(parts, 1):
      suffix = f"_{number}" if len(parts) > 1 else ""
      titles = "; ".join(title.replace("\n", " ") for title, _ in part)
      alt = f"{len(part)} plots of {what}: {titles}"
      yield f"{name}{suffix}.png", _figure(part, plot), caption, alt


def png(figure: Any) -> bytes:
  """The figure's PNG."""
  buffer = io.BytesIO()
  figure.savefig(buffer, format="png")
  return buffer.getvalue()


def _figure(panels: Sequence[Panel], plot: Callable) -> Any:
  """A grid of panels over one legend."""
  across = min(_ACROSS, len(panels))
  down = -(-len(panels) // across)
  # A legend needs room even below a single panel.
  figure = report.new_figure(max(6.0, 4.2 * across), 1.0 + 3.2 * down)
  grid = figure.subplots(down, across, squeeze=False).flatten()
  style = _styles([row for _, rows in panels for row in rows])
  for axes in grid[len(panels) :]:
    axes.set_axis_off()
  for axes, (title, rows) in zip(grid, panels, strict=False):
    axes.set_title(title, fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(color="0.9", linewidth=0.6)
    axes.set_axisbelow(True)
    plot(axes, rows, style)
  handles = {}
  for axes in grid:
    for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
      handles.setdefault(label, handle)
  figure.legend(
    handles.values(),
    handles.keys(),
    loc="outside lower center",
    ncols=min(len(handles), 1 + across),
    fontsize=8,
  )
  return figure


def _styles(rows: Sequence[Row]) -> dict[tuple, dict[str, Any]]:
  """What each value of an axis looks like, the same in all panels.

  A recovery has a colour; a pretraining a marker and dashes.
  """
  style = {}
  for n, name in enumerate(levels(rows, "recover")):
    style["recover", name] = {"color": COLORS[n % len(COLORS)]}
  for n, name in enumerate(levels(rows, "pretraining")):
    style["pretraining", name] = {
      "marker": MARKERS[n % len(MARKERS)],
      "linestyle": DASHES[n % len(DASHES)],
    }
  return style


def _of(style, row, axis) -> dict[str, Any]:
  # Funnels of several stages have no single recovery.
  return style.get((axis, row.get(axis)), {"color": OTHER})


def _title(*parts: Any) -> str:
  text = ", ".join(str(part) for part in parts if part is not None)
  return "\n".join(textwrap.wrap(text, 44))


def _panels(cells, baselines, keys) -> list[Panel]:
  """Panels of cells by `keys`, each with its baseline."""
  several = len({cell["model"] for cell in cells}) > 1
  panels = []
  for key, part in grouped(cells, ("model", "metric", *keys)).items():
    values = dict(zip(keys, key[2:], strict=True))
    mine = [
      c
      for c in baselines
      if (c["model"], c["metric"], c["task"]) == (*key[:2], values["task"])
    ]
    pretraining = values.get("pretraining")
    title = _title(
      key[0] if several else None,
      values["task"],
      pretraining and f"{pretraining} pretraining",
    )
    panels.append((title, mine + part))
  return panels


def _ylabel(cell: Row) -> str:
  return cell["metric"] + (
    "" if cell["higher_is_better"] else " (less: better)"
  )


# --- Metric against saving ------------------------------------------------


def _tradeoff_panels(cells, baselines):
  return _panels(cells, baselines, ("task",))


def _plot_tradeoff(axes, rows, style) -> None:
  cells = [c for c in rows if c["role"] == "funnel"]
  measured = all(c.get("reduction") is not None for c in cells)
  key = "reduction" if measured else "ideal_reduction"
  points = [(0.0, over_seeds(_baselines(rows), "value").mean)]
  axes.plot(
    *points[0],
    "*",
    color="black",
    markersize=11,
    label="baseline",
    zorder=4,
    linestyle="none",
  )
  keys = ("pretraining", "finetuning", "funnel")
  for (pretraining, finetuning, _), part in grouped(cells, keys).items():
    x, y = over_seeds(part, key), over_seeds(part, "value").mean
    if x is None:
      continue
    points.append((100 * x.mean, y))
    color = _of(style, part[0], "recover")["color"]
    axes.plot(
      *points[-1],
      linestyle="none",
      markersize=5.5,
      markeredgecolor=color,
      marker=style["pretraining", pretraining]["marker"],
      alpha=0.85,
      markerfacecolor="white" if finetuning == "off" else color,
      zorder=3,
    )
  _explain(axes, cells, style)
  if any(c["finetuning"] == "off" for c in cells):
    axes.plot(
      [],
      [],
      "o",
      color=OTHER,
      markerfacecolor="white",
      label="not tuned with the funnel",
    )
  front = pareto(points, cells[0]["higher_is_better"])
  if len(front) > 1:
    axes.plot(
      *zip(*front, strict=True),
      color="0.35",
      linewidth=1,
      drawstyle="steps-pre",
      zorder=2,
      label="Pareto front",
    )
  axes.margins(0.08)
  what = "time saved (%)" if measured else "FLOPs saved, ideal (%)"
  axes.set_xlabel(what, fontsize=8)
  axes.set_ylabel(_ylabel(cells[0]), fontsize=8)


def _baselines(rows):
  return [c for c in rows if c["role"] == "baseline"]


def _explain(axes, rows, style, marks=True) -> None:
  """Legend entries: a colour for each recovery, a look for each pretraining.

  All combinations of them would be too many entries.
  """
  for recover in levels(rows, "recover"):
    color = _of(style, {"recover": recover}, "recover")["color"]
    axes.plot([], [], "-", color=color, linewidth=4, label=f"recover {recover}")
  if any(row.get("recover") is None for row in rows):
    axes.plot([], [], "-", color=OTHER, linewidth=4, label="several stages")
  for name in levels(rows, "pretraining"):
    look = dict(style["pretraining", name], color=OTHER)
    look |= {"linestyle": "none"} if marks else {"marker": ""}
    axes.plot([], [], **look, label=f"{name} pretraining")


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


# --- Metric against start -------------------------------------------------


def _start_panels(cells, baselines):
  cells = [c for c in cells if c.get("start") is not None]
  return _panels(cells, baselines, ("task", "pretraining"))


def _plot_start(axes, rows, style) -> None:
  cells = [c for c in rows if c["role"] == "funnel"]
  value = over_seeds(_baselines(rows), "value").mean
  axes.axhline(value, color="black", linestyle="--", label="baseline")
  starts = levels(cells, "start")
  recoveries = levels(cells, "recover")
  lines = grouped(cells, ("recover", "finetuning"))
  # Beside each other, or error bars would lie on one another.
  gap = min(
    (b - a for a, b in zip(starts, starts[1:], strict=False)), default=1
  )
  for n, ((recover, finetuning), part) in enumerate(lines.items()):
    shift = 0.4 * gap * ((n + 0.5) / len(lines) - 0.5)
    by_start = grouped(part, ("start",))
    means = [over_seeds(p, "value").mean for p in by_start.values()]
    # Seeds differ without a funnel too; that is not the funnel's spread.
    spreads = [over_seeds(map(_change, p)) for p in by_start.values()]
    untuned = finetuning == "off"
    axes.errorbar(
      [start + shift for (start,) in by_start],
      means,
      yerr=[s.deviation or 0 for s in spreads],
      capsize=2,
      markersize=4.5,
      marker=MARKERS[recoveries.index(recover) % len(MARKERS)],
      linewidth=1.2,
      linestyle=":" if untuned else "-",
      color=_of(style, part[0], "recover")["color"],
      markerfacecolor="white" if untuned else None,
      label="" if untuned else f"recover {recover}",
    )
  if any(c["finetuning"] == "off" for c in cells):
    axes.plot(
      [],
      [],
      "o:",
      color=OTHER,
      markerfacecolor="white",
      label="not tuned with the funnel",
    )
  axes.set_xticks(starts)
  axes.set_xlabel("first layer of the funnel", fontsize=8)
  axes.set_ylabel(_ylabel(cells[0]), fontsize=8)


def _change(cell: Row) -> Row:
  return {"seed": cell["seed"], "drop": cell["value"] - cell["baseline"]}


# --- Bottleneck by depth --------------------------------------------------


def _depth_panels(rows) -> list[Panel]:
  several = len({row["model"] for row in rows}) > 1
  panels = []
  for key, part in grouped(rows, ("model", *SHAPE)).items():
    model, start, stop, stride, pool = key
    if start is None:
      # Stages of several funnels are not to be shaded in one panel.
      of = grouped(part, ("funnel",))
      panels += [
        (_title(several and model or None, f), p) for (f,), p in of.items()
      ]
      continue
    title = _title(
      model if several else None,
      f"layers {start} to {_last(part)}",
      f"stride {stride}",
      pool,
    )
    panels.append((title, part))
  return panels


def _last(rows) -> int:
  """The last layer of the stage."""
  stop = rows[0].get("stop")
  return (
    max(p["layer"] for p in rows[0]["layers"]) if stop is None else stop - 1
  )


def _plot_depth(axes, rows, style) -> None:
  start = rows[0].get("start")
  if start is not None:
    axes.axvspan(
      start - 0.5, _last(rows) + 0.5, color="0.92", zorder=0, label="stage"
    )
  keys = ("recover", "pretraining", "finetuning")
  for (_, pretraining, finetuning), part in grouped(rows, keys).items():
    values = {}
    for row in part:
      for point in row["layers"]:
        recovery = point.get("at") == "recovery"
        place = (point["layer"] + 0.5 * recovery, recovery)
        values.setdefault(place, []).append(point["cosine"])
    mean = {x: sum(values[x]) / len(values[x]) for x in sorted(values)}
    look = style["pretraining", pretraining]
    color = _of(style, part[0], "recover")["color"]
    axes.plot(
      [x for x, _ in mean],
      mean.values(),
      color=color,
      linewidth=1.3,
      linestyle=look["linestyle"],
      marker="s" if finetuning == "on" else "o",
      markersize=3.5,
      markerfacecolor="white" if finetuning == "off" else color,
    )
    crosses = [(x, y) for (x, recovery), y in mean.items() if recovery]
    if crosses:
      axes.plot(
        *zip(*crosses, strict=True),
        "x",
        color=color,
        markersize=7,
        markeredgewidth=1.6,
      )
  _explain(axes, rows, style, marks=False)
  for tuned, marker, face in (("off", "o", "white"), ("on", "s", OTHER)):
    if any(row["finetuning"] == tuned for row in rows):
      axes.plot(
        [],
        [],
        marker,
        color=OTHER,
        markerfacecolor=face,
        markersize=4,
        label="tuned with the funnel"
        if tuned == "on"
        else "not tuned with the funnel",
      )
  from matplotlib import ticker

  axes.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
  axes.set_xlabel("layer", fontsize=8)
  axes.set_ylabel("cosine", fontsize=8)
