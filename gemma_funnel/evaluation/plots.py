"""Plots of what the evaluators measure; each takes their rows."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gemma_funnel.evaluation import report

Row = Mapping[str, Any]


def _unique(rows, key):
  return list(dict.fromkeys(row[key] for row in rows))


def latency(rows: Sequence[Row]) -> Any:
  """A figure: above, measured and ideal reductions; below, latencies.

  Columns are without and with the head; each batch size has two rows.
  """
  batches, heads = _unique(rows, "batch"), _unique(rows, "head")
  figure = report.new_figure(0.8 + 4.6 * len(heads), 0.8 + 5.2 * len(batches))
  grid = figure.subplots(2 * len(batches), len(heads), squeeze=False)
  for i, batch in enumerate(batches):
    for j, h in enumerate(heads):
      part = [r for r in rows if r["batch"] == batch and r["head"] == h]
      where = f"batch {batch}, {'with' if h else 'without'} the head"
      _plot_reductions(grid[2 * i][j], part, lambda r: r["length"], where)
      grid[2 * i][j].set_xlabel("length (tokens)")
      _plot_times(grid[2 * i + 1][j], part, "funnel", where)
  _legend(figure)
  return figure


def _legend(figure) -> None:
  """One legend below all axes, each label once."""
  handles = {}
  for axes in figure.axes:
    entries = axes.get_legend_handles_labels()
    for handle, label in zip(*entries, strict=True):
      handles.setdefault(label, handle)
  style = dict(loc="outside lower center", ncols=2, fontsize=8)
  figure.legend(handles.values(), handles.keys(), **style)


def _plot_reductions(
  axes, rows, place, title, measured="reduction", ideal="ideal_reduction"
) -> None:
  """A bar for each funnel but the first, which is off, at each `place`."""
  names = _unique(rows, "funnel")[1:]
  places = list(dict.fromkeys(map(place, rows)))
  width = 0.8 / max(1, len(names))
  for n, name in enumerate(names):
    own = [r for r in rows if r["funnel"] == name]
    x = np.array([places.index(place(r)) for r in own])
    x = x + (n + 0.5) * width - 0.4
    share = lambda key: np.array([r.get(key) for r in own], float)
    values = 100 * share(measured)
    quartiles = [r.get(f"{measured}_quartiles") or [np.nan] * 2 for r in own]
    errors = np.nan_to_num(abs(100 * np.transpose(quartiles) - values))
    style = dict(color=f"C{n}", ecolor="0.4", capsize=2)
    label, half = f"{name}, measured", 0.45 * width
    axes.bar(x, values, 2 * half, yerr=errors, label=label, **style)
    style = dict(colors="black", label="ideal")
    axes.hlines(100 * share(ideal), x - half, x + half, **style)
  axes.axhline(0, color="0.6", linewidth=0.8)
  axes.set_xticks(range(len(places)), [str(p) for p in places])
  axes.set_ylabel("latency reduction (%)")
  axes.set_title(title, fontsize=10)


def _plot_times(axes, rows, key, title) -> None:
  lengths = _unique(rows, "length")
  for n, name in enumerate(_unique(rows, key)):
    drawn = [r for r in rows if r[key] == name and r.get("latency_s")]
    x = [r["length"] for r in drawn]
    y = [1e3 * r["latency_s"] for r in drawn]
    # As bars, in which the first name has none.
    color = "0.3" if n == 0 else f"C{n - 1}"
    axes.plot(x, y, "o-", color=color, markersize=4, label=name)
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

  Ideal is of FLOPs for the first token, and of bytes for each.
  """
  cells = len({(r["batch"], r["prompt"]) for r in rows})
  figure = report.new_figure(2 + 3 * max(2, cells), 4.2)
  place = lambda r: f"batch {r['batch']}, prompt {r['prompt']}"
  first, each = figure.subplots(1, 2)
  keys = "first_reduction", "first_ideal"
  _plot_reductions(first, rows, place, "first token", *keys)
  _plot_reductions(each, rows, place, "each token", ideal="ideal_bytes")
  _legend(figure)
  return figure


def layer_kinds(rows: Sequence[Row]) -> Any:
  """A figure of the time of a layer of each kind, by length."""
  batches = _unique(rows, "batch")
  figure = report.new_figure(0.8 + 4.2 * len(batches), 3.4)
  grid = figure.subplots(1, len(batches), squeeze=False)
  for axes, batch in zip(grid[0], batches, strict=True):
    part = [r for r in rows if r["batch"] == batch]
    _plot_times(axes, part, "kind", f"batch {batch}")
    axes.set_ylabel("latency of a layer (ms)")
    axes.legend(fontsize=8)
  return figure


def _rank(axes, rows, values, limit, label, fmt) -> None:
  """A bar for each row, named by its funnel, from above."""
  colors = [f"C{i}" for i in range(len(rows))]
  bars = axes.barh(range(len(rows)), values, 0.7, color=colors)
  axes.bar_label(bars, fmt=fmt, fontsize=9)
  axes.set_yticks(range(len(rows)), [row["funnel"] for row in rows], fontsize=9)
  axes.invert_yaxis()
  axes.set_xlim(0, 1.15 * limit or 1)
  axes.set_xlabel(label)


def accuracy(rows: Sequence[Row]) -> Any:
  """A figure: bits per byte with each funnel, and the unigram line."""
  figure = report.new_figure(7.5, 1.6 + 0.45 * len(rows))
  axes = figure.subplots()
  values = [row["bits_per_byte"] for row in rows]
  unigram = rows[0]["unigram_bits_per_byte"]
  style = dict(color="black", linestyle="--", linewidth=1)
  axes.axvline(unigram, label=f"unigram, {unigram:.3f}", **style)
  label = "bits per byte of held-out text (less is better)"
  _rank(axes, rows, values, max(*values, unigram), label, " {:.3f}")
  figure.legend(loc="outside upper right", fontsize=8)
  return figure


def task(rows: Sequence[Row]) -> Any:
  """A figure: the main metric of a task with each funnel."""
  figure = report.new_figure(7.5, 1.4 + 0.45 * len(rows))
  values = [row["value"] or 0 for row in rows]
  label = f"{rows[0]['metric']} ({rows[0]['num_examples']} examples)"
  _rank(figure.subplots(), rows, values, max(values), label, " {:.4g}")
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
