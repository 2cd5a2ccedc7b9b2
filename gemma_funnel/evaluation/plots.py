"""Plots of what the evaluators measure; each takes their rows."""

from collections.abc import Mapping, Sequence
from typing import Any

from gemma_funnel.evaluation import report

Row = Mapping[str, Any]


def _unique(rows, key):
  return list(dict.fromkeys(row[key] for row in rows))


def latency(rows: Sequence[Row]) -> Any:
  """A figure: above, measured and ideal reductions; below, latencies.

  Columns are without and with the head; each batch size has two rows.
  """
  batches, heads = _unique(rows, "batch"), _unique(rows, "head")
  names = _unique(rows, "funnel")
  figure = report.new_figure(0.8 + 4.6 * len(heads), 0.8 + 5.2 * len(batches))
  grid = figure.subplots(2 * len(batches), len(heads), squeeze=False)
  for i, batch in enumerate(batches):
    for j, h in enumerate(heads):
      part = [r for r in rows if r["batch"] == batch and r["head"] == h]
      where = f"batch {batch}, {'with' if h else 'without'} the head"
      _plot_reductions(grid[2 * i][j], part, names[1:], where)
      _plot_times(grid[2 * i + 1][j], part, "funnel", names, where)
  handles = {}
  for axes in figure.axes:
    entries = axes.get_legend_handles_labels()
    for handle, label in zip(*entries, strict=True):
      handles.setdefault(label, handle)
  figure.legend(
    handles.values(),
    handles.keys(),
    loc="outside lower center",
    ncols=2,
    fontsize=8,
  )
  return figure


def _plot_reductions(axes, rows, names, title) -> None:
  lengths = _unique(rows, "length")
  width = 0.8 / max(1, len(names))
  for n, name in enumerate(names):
    at = {
      lengths.index(r["length"]) + (n + 0.5) * width - 0.4: r
      for r in rows
      if r["funnel"] == name
    }
    drawn = {x: r for x, r in at.items() if r.get("reduction") is not None}
    values = [100 * r["reduction"] for r in drawn.values()]
    quartiles = [
      [
        100 * abs(r["reduction_quartiles"][side] - r["reduction"])
        for r in drawn.values()
      ]
      for side in (0, 1)
    ]
    axes.bar(
      list(drawn),
      values,
      0.9 * width,
      yerr=quartiles,
      color=f"C{n}",
      ecolor="0.4",
      capsize=2,
      label=f"{name}, measured",
    )
    axes.hlines(
      [100 * r["ideal_reduction"] for r in at.values()],
      [x - 0.45 * width for x in at],
      [x + 0.45 * width for x in at],
      colors="black",
      label="ideal (FLOPs)",
    )
  axes.axhline(0, color="0.6", linewidth=0.8)
  axes.set_xticks(range(len(lengths)), [str(length) for length in lengths])
  axes.set(xlabel="length (tokens)", ylabel="reduction of latency (%)")
  axes.set_title(title, fontsize=10)


def _plot_times(axes, rows, key, names, title) -> None:
  lengths = _unique(rows, "length")
  for n, name in enumerate(names):
    drawn = [r for r in rows if r[key] == name and r.get("latency_s")]
    # As bars, in which the first name has none.
    color = "0.3" if n == 0 else f"C{n - 1}"
    axes.plot(
      [r["length"] for r in drawn],
      [1e3 * r["latency_s"] for r in drawn],
      "o-",
      color=color,
      markersize=4,
      label=name,
    )
  if len(lengths) > 1:
    axes.set_xscale("log", base=2)
    # Close enough that the shortest range of two lengths has ticks.
    axes.set_yscale("log", subs=())
    axes.yaxis.get_major_locator().set_params(subs=(1, 1.5, 2, 3, 5, 7))
  else:
    axes.set_ylim(bottom=0)
  axes.set_xticks(lengths, [str(length) for length in lengths])
  axes.minorticks_off()
  axes.yaxis.set_major_formatter("{x:g}")
  axes.set(xlabel="length (tokens)", ylabel="latency (ms)")
  axes.set_title(title, fontsize=10)


def decoding(rows: Sequence[Row]) -> Any:
  """A figure: measured and ideal reductions, of the first token and of each.

  A pair of plots for each batch size and prompt; a bar for each funnel.
  """
  cells = list(dict.fromkeys((r["batch"], r["prompt"]) for r in rows))
  names = _unique(rows, "funnel")[1:]
  height = 1.6 + (1.2 + 0.4 * len(names)) * len(cells)
  figure = report.new_figure(10, height)
  grid = figure.subplots(len(cells), 2, squeeze=False, sharex=True)
  for pair, cell in zip(grid, cells, strict=True):
    part = [
      r
      for r in rows
      if (r["batch"], r["prompt"]) == cell and r["funnel"] in names
    ]
    where = f"batch {cell[0]}, prompt {cell[1]}"
    for axes, what, measured, ideal in (
      (pair[0], "first token", "first_reduction", "first_ideal"),
      (pair[1], "each token", "reduction", "ideal_bytes"),
    ):
      _plot_bars(axes, part, names, measured, ideal)
      axes.set_title(f"{what}: {where}", fontsize=10)
    pair[1].set_yticklabels([])
  for axes in grid[-1]:
    axes.set_xlabel("reduction of time (%)")
  figure.legend(
    *grid[0][0].get_legend_handles_labels(),
    loc="outside lower center",
    ncols=2,
    fontsize=8,
  )
  return figure


def _plot_bars(axes, rows, names, measured, ideal) -> None:
  at = [names.index(r["funnel"]) for r in rows]
  bars = axes.barh(
    at,
    [100 * (r[measured] or 0) for r in rows],
    0.7,
    color="C0",
    label="measured",
  )
  axes.bar_label(
    bars, fmt="{:.0f}", fontsize=8, label_type="center", color="white"
  )
  axes.vlines(
    [100 * r[ideal] for r in rows],
    [y - 0.4 for y in at],
    [y + 0.4 for y in at],
    colors="black",
    label="ideal (FLOPs of a prompt, bytes of a token)",
  )
  axes.axvline(0, color="0.6", linewidth=0.8)
  axes.margins(x=0.15)
  axes.set_yticks(range(len(names)), names, fontsize=8)
  axes.set_ylim(len(names) - 0.4, -0.6)


def layer_kinds(rows: Sequence[Row]) -> Any:
  """A figure of the time of a layer of each kind, by length."""
  batches = _unique(rows, "batch")
  figure = report.new_figure(0.8 + 4.2 * len(batches), 3.4)
  grid = figure.subplots(1, len(batches), squeeze=False)
  for axes, batch in zip(grid[0], batches, strict=True):
    part = [r for r in rows if r["batch"] == batch]
    _plot_times(axes, part, "kind", _unique(rows, "kind"), f"batch {batch}")
    axes.set_ylabel("latency of a layer (ms)")
    axes.legend(fontsize=8)
  return figure


def accuracy(rows: Sequence[Row]) -> Any:
  """A figure: bits per byte with each funnel, and the unigram line."""
  figure = report.new_figure(7.5, 1.6 + 0.45 * len(rows))
  axes = figure.subplots()
  values = [row["bits_per_byte"] for row in rows]
  unigram = rows[0]["unigram_bits_per_byte"]
  bars = axes.barh(
    range(len(rows)), values, 0.7, color=[f"C{i}" for i in range(len(rows))]
  )
  axes.bar_label(bars, fmt=" {:.3f}", fontsize=9)
  axes.axvline(
    unigram,
    color="black",
    linestyle="--",
    linewidth=1,
    label=f"unigram, {unigram:.3f}",
  )
  names = [row["funnel"] for row in rows]
  axes.set_yticks(range(len(rows)), names, fontsize=9)
  axes.invert_yaxis()
  axes.set_xlim(0, 1.15 * max(*values, unigram))
  axes.set_xlabel("bits per byte of held-out text (less is better)")
  figure.legend(loc="outside upper right", fontsize=8)
  return figure


def task(rows: Sequence[Row]) -> Any:
  """A figure: the main metric of a task with each funnel."""
  figure = report.new_figure(7.5, 1.4 + 0.45 * len(rows))
  axes = figure.subplots()
  drawn = [row["value"] or 0 for row in rows]
  bars = axes.barh(
    range(len(rows)), drawn, 0.7, color=[f"C{i}" for i in range(len(rows))]
  )
  axes.bar_label(bars, fmt=" {:.4g}", fontsize=9)
  axes.set_yticks(range(len(rows)), [row["funnel"] for row in rows], fontsize=9)
  axes.invert_yaxis()
  axes.set_xlim(0, 1.15 * max(drawn) or 1)
  axes.set_xlabel(f"{rows[0]['metric']} ({rows[0]['num_examples']} examples)")
  return figure


def training(rows: Sequence[Row]) -> Any:
  """A figure: the time of each variant's step, and its memory."""
  names = [
    f"{r['funnel']}\nchunk {r['loss_chunk'] or 'off'}, remat {r['remat']}"
    for r in rows
  ]
  figure = report.new_figure(9.0, 1.6 + 0.6 * len(rows))
  left, right = figure.subplots(1, 2, sharey=True)
  for axes, key, scale, title in (
    (left, "latency_s", 1e3, "step, ms"),
    (right, "peak_bytes", 2**-20, "memory, MiB"),
  ):
    values = [scale * (r.get(key) or 0) for r in rows]
    bars = axes.barh(names, values, color=f"C{int(axes is right)}")
    axes.bar_label(bars, fmt="{:,.0f}", padding=2, fontsize=8)
    axes.set_xlabel(title)
    axes.margins(x=0.15)
  left.invert_yaxis()
  return figure
