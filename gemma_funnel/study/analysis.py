"""What an ablation study says: drops, pairings and verdicts, out of its rows.

`page` has the tables, `study_plots` the plots; `write` writes all of them.

Rows are what the runner writes, a JSON object each, of the kinds "cell" (a
value measured), "failure" and "similarity". A funnel's *drop* is what it costs
against the baseline of the same model, task and seed: standard pretraining, not
fine-tuned with a funnel, none at inference. It is in points (hundredths of the
metric) where higher is better, else a rise in percent of the baseline.

Two choices are compared over *pairings*: cells that differ in that choice alone
and have the same seed.
"""

from collections.abc import Iterable, Mapping, Sequence
import dataclasses
import json
import math
import os
import statistics
from typing import Any

from gemma_funnel import atomic
from gemma_funnel.config import OFF
from gemma_funnel.evaluation import report

Row = Mapping[str, Any]

# What tells results apart; of how states move, what a model is made by.
AXES = (
  "model",
  "pretraining",
  "finetuning",
  "inference",
  "funnel",
  "task",
  "seed",
)
MODEL_AXES = ("model", "pretraining", "funnel")
SHAPE = ("start", "stop", "stride", "pool")
POINTS, PERCENT = "points", "% of the baseline"
CAVEAT = (
  "Differences are paired by all other choices and the seed. Pairings share "
  "trained models and baselines; standard errors take them as independent."
)
# Fewer differences tell nothing of their own spread.
MIN_PAIRINGS = 3


@dataclasses.dataclass(frozen=True)
class Spread:
  """A mean; the standard deviation (n - 1), None of one value; and n."""

  mean: float
  deviation: float | None
  n: int

  @property
  def is_clear(self) -> bool:
    """Whether the mean is more than twice its standard error from 0."""
    if self.n < MIN_PAIRINGS or abs(self.mean) < 1e-9:
      return False
    return abs(self.mean) > 2 * self.deviation / math.sqrt(self.n)

  def text(self, form: str = ".2f") -> str:
    """Such as "1.20 ± 0.31"; of one value "1.20 (n=1)"."""
    if self.deviation is None:
      return f"{self.mean:{form}} (n=1)"
    return f"{self.mean:{form}} ± {self.deviation:{form}}"


def mean_and_spread(values: Iterable[float]) -> Spread | None:
  """Of values, one for each seed; None of no values."""
  values = list(values)
  if not values:
    return None
  deviation = statistics.stdev(values) if len(values) > 1 else None
  return Spread(statistics.fmean(values), deviation, len(values))


@dataclasses.dataclass(frozen=True)
class Results:
  """Rows, sorted out.

  Attributes:
    cells: the last value of each cell, with these keys besides: `role`
      ("baseline", "funnel" where there is one at inference, else "plain"),
      and of those that have a baseline `drop`, its `unit` and `baseline`.
    failures: the last row of cells that have no value.
    similarity: the last row of each.
  """

  cells: tuple[Row, ...]
  failures: tuple[Row, ...]
  similarity: tuple[Row, ...]

  def compared(self, role: str = "funnel") -> list[Row]:
    """The cells of a role that have a drop."""
    return [c for c in self.cells if c["role"] == role and "drop" in c]


def organise(rows: Iterable[Row]) -> Results:
  """Sorts rows out; a later row replaces an earlier one of the same cell.

  A value that is no finite number is a failure. Rows of other kinds are left
  out.

  Raises:
    ValueError: a row without a key that it needs; its number from 1.
  """
  latest, similarity = {}, {}
  for number, row in enumerate(rows, 1):
    kind = row.get("kind")
    needed = {
      "cell": ("metric", "value", "higher_is_better"),
      "failure": ("error",),
      "similarity": ("layers",),
    }.get(kind)
    if needed is None:
      continue
    axes = MODEL_AXES if kind == "similarity" else AXES
    missing = [key for key in (*axes, *needed) if key not in row]
    if missing:
      raise ValueError(
        f"result row {number} ({kind}) has no {missing}; it has {sorted(row)}"
      )
    key = tuple(row[name] for name in axes)
    if kind == "similarity":
      similarity[key] = row
      continue
    if kind == "cell" and not _is_number(row["value"]):
      error = f"{row['metric']} is {row['value']}"
      row = {**row, "kind": "failure", "error": error}
    # A failure does not undo what another run has measured.
    if row["kind"] == "cell" or latest.get(key, row)["kind"] == "failure":
      latest[key] = row
  cells = [row for row in latest.values() if row["kind"] == "cell"]
  baselines = {_subject(c): c for c in cells if _role(c) == "baseline"}
  return Results(
    tuple(_with_drop(c, baselines.get(_subject(c))) for c in cells),
    tuple(row for row in latest.values() if row["kind"] == "failure"),
    tuple(similarity.values()),
  )


def _is_number(value: Any) -> bool:
  return isinstance(value, (int, float)) and math.isfinite(value)


def _role(cell: Row) -> str:
  if cell["inference"] == "on":
    return "funnel"
  plain = cell["pretraining"] == "standard" and cell["funnel"] == OFF
  untouched = cell["finetuning"] in ("off", None)
  return "baseline" if plain and untouched else "plain"


def _subject(cell: Row) -> tuple:
  return cell["model"], cell["task"], cell["seed"], cell["metric"]


def _with_drop(cell: Row, baseline: Row | None) -> Row:
  role = _role(cell)
  if baseline is None or role == "baseline":
    return {**cell, "role": role}
  before, after = baseline["value"], cell["value"]
  if cell["higher_is_better"]:
    drop, unit = 100 * (before - after), POINTS
  elif before > 0:
    drop, unit = 100 * (after / before - 1), PERCENT
  else:
    return {**cell, "role": role}
  return {**cell, "role": role, "baseline": before, "drop": drop, "unit": unit}


# --- Comparing ------------------------------------------------------------


def over_seeds(cells: Iterable[Row], key: str = "drop") -> Spread | None:
  """Mean and spread of the seeds' means; cells without a value do not count."""
  by_seed = {}
  for cell in cells:
    if cell.get(key) is not None:
      by_seed.setdefault(cell["seed"], []).append(cell[key])
  return mean_and_spread(map(statistics.fmean, by_seed.values()))


def pairings(cells: Iterable[Row], axis: str) -> list[dict[Any, Row]]:
  """Cells that agree in all but `axis`, by their value of it."""
  groups = {}
  for cell in cells:
    if cell.get(axis) is None:
      continue
    # The funnel's string has options that are no keys of a row.
    funnel = sorted(
      part
      for part in cell["funnel"].split(",")
      if not part.startswith(f"{axis}=")
    )
    rest = [cell[a] for a in AXES if a not in (axis, "funnel")]
    groups.setdefault((*funnel, *rest), {})[cell[axis]] = cell
  return [group for group in groups.values() if len(group) > 1]


def differences(
  cells: Iterable[Row], axis: str, better: Any, worse: Any
) -> list[float]:
  """By how much the drop is larger with `worse`, for each pairing."""
  return [
    group[worse]["drop"] - group[better]["drop"]
    for group in pairings(cells, axis)
    if better in group and worse in group
  ]


def levels(cells: Iterable[Row], axis: str) -> list:
  """The values of an axis, numbers in order and others as they came."""
  found = [c[axis] for c in cells if c.get(axis) is not None]
  found = list(dict.fromkeys(found))
  numbers = all(isinstance(v, (int, float)) for v in found)
  return sorted(found) if numbers else found


def ranked(cells: Sequence[Row], axis: str) -> list[tuple[Any, Spread, int]]:
  """(level, drop, pairings in which it is best), the smallest drop first.

  Over the pairings that have every level that any of them has; a tie counts
  for each.
  """
  groups = pairings(cells, axis)
  names = {name for group in groups for name in group}
  whole = [group for group in groups if len(group) == len(names)]
  order = []
  for name in levels(cells, axis):
    mine = [group[name] for group in whole if name in group]
    if mine:
      best = sum(
        group[name]["drop"] <= min(c["drop"] for c in group.values()) + 1e-9
        for group in whole
      )
      order.append((name, over_seeds(mine), best))
  return sorted(order, key=lambda entry: entry[1].mean)


def grouped(cells: Iterable[Row], keys: Sequence[str]) -> dict[tuple, list]:
  """Cells by their values of `keys`, in the order of `levels`; None is last."""
  cells, groups = list(cells), {}
  for cell in cells:
    groups.setdefault(tuple(cell.get(k) for k in keys), []).append(cell)
  order = [{v: i for i, v in enumerate(levels(cells, k))} for k in keys]
  place = lambda key: [
    at.get(value, len(at)) for at, value in zip(order, key, strict=True)
  ]
  return {key: groups[key] for key in sorted(groups, key=place)}


def whole_pairings(cells: Iterable[Row], axis: str) -> int:
  """How many pairings have every value of the axis that any of them has."""
  groups = pairings(cells, axis)
  names = {name for group in groups for name in group}
  return sum(len(group) == len(names) for group in groups)


# --- Verdicts -------------------------------------------------------------


def claims(rows: Iterable[Row]) -> list[str]:
  """What the numbers say, a line each; drops in their unit.

  A line says "not distinguishable" where the mean of the paired differences
  is within twice its standard error, or there are fewer than three.
  """
  return _claims(organise(rows))


def _claims(results: Results) -> list[str]:
  lines = []
  groups = grouped(results.compared(), ("model", "unit"))
  plain = grouped(results.compared("plain"), ("model", "unit"))
  several = len({model for model, _ in groups}) > 1
  for (model, unit), cells in groups.items():
    said = [
      _claim_best(cells, axis, unit) for axis in ("recover", "pool", "stride")
    ]
    said += _claim_training(cells, unit)
    said += _claim_cost(plain.get((model, unit), []), unit)
    said += [_claim_start(cells, unit), _claim_tasks(cells, unit)]
    prefix = f"{model}: " if several else ""
    lines += [prefix + line for line in said if line]
  return lines


def _verdict(values: Sequence[float]) -> tuple[Spread, str]:
  """The spread of differences, and its text with their number."""
  spread = mean_and_spread(values)
  if spread.deviation is None:
    return spread, f"{spread.mean:+.2f}"
  return spread, f"{spread.mean:+.2f}, spread {spread.deviation:.2f}"


def _claim_best(cells: Sequence[Row], axis: str, unit: str) -> str | None:
  order = ranked(cells, axis)
  if len(order) < 2:
    return None
  (first, _, wins), (second, _, _) = order[:2]
  spread, text = _verdict(differences(cells, axis, first, second))
  count = whole_pairings(cells, axis)
  if not spread.is_clear or spread.mean < 0:
    return (
      f"{axis}: {first} and {second}, the best of {len(order)}, are not "
      f"distinguishable ({text} {unit}, n={spread.n})"
    )
  return (
    f"{axis}: {first} is best of {len(order)} in {wins} of {count} pairings; "
    f"mean {text} {unit} over the next, {second}"
  )


def _claim_training(cells: Sequence[Row], unit: str) -> list[str]:
  """Each pretraining against the standard one; fine-tuning on against off."""
  lines = []
  names = [v for v in levels(cells, "pretraining") if v != "standard"]
  asked = [("pretraining", name, "standard") for name in names]
  asked += [("finetuning", name, "off") for name in ("on", "sampled")]
  for axis, name, other in asked:
    values = differences(cells, axis, name, other)
    if not values:
      continue
    spread, text = _verdict(values)
    wins = sum(value > 1e-9 for value in values)
    what = (
      "funnel at fine-tuning: " if axis == "finetuning" else "pretraining: "
    )
    if not spread.is_clear:
      line = f"{name} and {other} are not distinguishable"
    elif spread.mean > 0:
      line = f"{name} beats {other} in {wins} of {spread.n} pairings"
    else:
      worse = sum(value < -1e-9 for value in values)
      line = f"{name} is worse than {other} in {worse} of {spread.n} pairings"
    lines.append(f"{what}{line} ({text} {unit}, n={spread.n})")
  return lines


def _claim_cost(cells: Sequence[Row], unit: str) -> list[str]:
  """What each other pretraining does to the model without a funnel."""
  lines = []
  for (name,), part in grouped(cells, ("pretraining",)).items():
    part = [c for c in part if c["finetuning"] in ("off", None)]
    if name == "standard" or not part:
      continue
    spread, text = _verdict([c["drop"] for c in part])
    if spread.is_clear:
      line = f"{'costs' if spread.mean > 0 else 'improves'} the model"
    else:
      line = "is not distinguishable from standard"
    lines.append(
      f"pretraining: {name} {line} where the funnel is off at inference "
      f"(drop {text} {unit}, {spread.n} cells)"
    )
  return lines


def _claim_start(cells: Sequence[Row], unit: str) -> str | None:
  starts = levels(cells, "start")
  if len(starts) < 2:
    return None
  early, late = starts[0], starts[-1]
  values = differences(cells, "start", late, early)
  if not values:
    return None
  spread, text = _verdict(values)
  saved = [
    statistics.fmean(
      c.get("ideal_reduction") or 0 for c in cells if c.get("start") == start
    )
    for start in (late, early)
  ]
  wins = sum(value > 1e-9 for value in values)
  if not spread.is_clear:
    line = f"{late} and {early} are not distinguishable"
  elif spread.mean > 0:
    line = f"later is better: {late} against {early} in {wins}"
  else:
    wins = sum(value < -1e-9 for value in values)
    line = f"earlier is better: {early} against {late} in {wins}"
  line += f" of {spread.n} pairings" if spread.is_clear else ""
  return (
    f"start: {line} ({text} {unit}, n={spread.n}), with "
    f"{100 * saved[0]:.0f} % against {100 * saved[1]:.0f} % of FLOPs saved"
  )


def _claim_tasks(cells: Sequence[Row], unit: str) -> str | None:
  """Tasks by drop; ">" where a neighbour's is distinguishable, else "~"."""
  groups = grouped(cells, ("task",))
  drops = {task: over_seeds(part) for (task,), part in groups.items()}
  order = sorted(drops, key=lambda task: -drops[task].mean)
  text = ""
  for n, task in enumerate(order):
    if n:
      values = differences(cells, "task", task, order[n - 1])
      spread = mean_and_spread(values)
      text += " > " if spread and spread.is_clear and spread.mean > 0 else " ~ "
    text += f"{task} {drops[task].text()}"
  tie = " (~: not distinguishable)" if "~" in text else ""
  return f"tasks by drop ({unit}): {text}{tie}"


# --- Writing --------------------------------------------------------------


def write(
  rows: Sequence[Row],
  out_dir: str | os.PathLike,
  title: str,
  settings: Mapping[str, Any] | None = None,
) -> dict[str, str]:
  """Writes a study: tables.md, study.json, plots, and report.html of it all.

  Args:
    rows: all of the results.
    out_dir: the folder; it is made if need be.
    title: of the tables and the page.
    settings: what the study was run with.

  Returns:
    The path of each file written, by its name.

  Raises:
    ValueError: a row that lacks a key; a value that JSON cannot hold.
  """
  # What shows results needs what is above.
  from gemma_funnel.study import html_report, plots

  results = organise(rows)
  said, made = _claims(results), html_report.tables(results)
  about = {"settings": dict(settings or {}), "measured": _measured(rows)}
  content = {
    "title": title,
    "environment": report.environment(),
    **about,
    "claims": said,
    "tables": {table.title: list(table.rows) for table in made},
  }
  files = {"study.json": _encoded(content)}
  bullets = "\n".join(f"- {line}" for line in said)
  parts = [f"# {title}", bullets, *(table.markdown() for table in made)]
  files["tables.md"] = ("\n\n".join(filter(None, parts)) + "\n").encode()
  pictures = []
  for name, figure, caption, alt in plots.draw(results):
    files[name] = plots.png(figure)
    pictures.append(html_report.Picture(files[name], caption, alt))
  about["report made on"] = content["environment"]
  html = html_report.render(
    title, [*said, CAVEAT] if said else [], made, pictures, about
  )
  files["report.html"] = html.encode()
  os.makedirs(out_dir, exist_ok=True)
  paths = {name: os.path.join(out_dir, name) for name in files}
  for name, data in files.items():
    atomic.write_bytes(paths[name], data)
  return paths


def _measured(rows: Sequence[Row]) -> dict[str, Any]:
  """Where cells were measured, and how many."""
  cells = [row for row in rows if row.get("kind") == "cell"]
  known = lambda key: sorted({str(c[key]) for c in cells if c.get(key)})
  return {"device": known("device"), "git": known("git"), "cells": len(cells)}


def _encoded(content: Mapping[str, Any]) -> bytes:
  try:
    return (json.dumps(content, indent=1, allow_nan=False) + "\n").encode()
  except (TypeError, ValueError) as error:
    raise ValueError(f"study.json: {error}") from error
