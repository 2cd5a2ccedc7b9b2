"""What a study's results say: drops, pairings and findings.

Results are rows as the runner writes them, of the kinds "cell" (a measured
value), "failure" and "similarity". A funnel's *drop* is what it costs against
the baseline of the same model, task and seed: standard pretraining, no funnel
at fine-tuning or inference. It is in points (hundredths of the metric) where
higher is better, else a rise in percent of the baseline.

Two choices are compared over *pairings*: cells that differ in that choice alone
and have the same seed.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
import dataclasses
import math
import operator
import statistics
from typing import Any, NamedTuple

from gemma_funnel import checks
from gemma_funnel.config import OFF

Row = Mapping[str, Any]

# What tells models apart, and results.
MODEL_AXES = ("model", "pretraining", "funnel")
AXES = (*MODEL_AXES[:2], "finetuning", "inference", "funnel", "task", "seed")
SHAPE = ("start", "stop", "stride", "reduce")
POINTS, PERCENT = "points", "% of the baseline"
CAVEAT = (
  "Differences are paired by all other choices and the seed. Pairings share "
  "trained models and baselines; standard errors take them as independent."
)
# Keys of a row, by its kind.
NEEDED = {
  "cell": (*AXES, "metric", "value", "higher_is_better"),
  "failure": (*AXES, "error"),
  "similarity": (*MODEL_AXES, "layers"),
}
# Fewer differences tell nothing of their own spread.
_MIN_PAIRINGS = 3
_TIE = 1e-9


@dataclasses.dataclass(frozen=True)
class Spread:
  """A mean; the standard deviation (n - 1), None of one value; and n."""

  mean: float
  deviation: float | None
  n: int

  @property
  def is_clear(self) -> bool:
    """Whether the mean is more than twice its standard error from 0."""
    if self.n < _MIN_PAIRINGS or abs(self.mean) < _TIE:
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

  Cells have a `role` besides: "baseline", "funnel" where there is one at
  inference, else "plain"; and those with a baseline `drop`, `unit`, `baseline`.
  """

  cells: tuple[Row, ...]  # The last value of each.
  failures: tuple[Row, ...]  # The last row of cells that have no value.
  similarity: tuple[Row, ...]  # The last row of each.

  def compared(self, role: str = "funnel") -> list[Row]:
    """The cells of a role that have a drop."""
    return [c for c in self.cells if c["role"] == role and "drop" in c]

  @property
  def baselines(self) -> list[Row]:
    return [c for c in self.cells if c["role"] == "baseline"]


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
    missing = [key for key in NEEDED.get(kind, ()) if key not in row]
    checks.require(
      not missing,
      f"result row {number} ({kind}) has no {missing}; it has {sorted(row)}",
    )
    row = _renamed(row)
    if kind == "similarity":
      similarity[tuple(row[name] for name in MODEL_AXES)] = row
    elif kind in NEEDED:
      if kind == "cell" and not checks.is_number(row["value"]):
        error = f"{row['metric']} is {row['value']}"
        row = {**row, "kind": "failure", "error": error}
      key = tuple(row[name] for name in AXES)
      # A failure does not undo what another run has measured.
      if row["kind"] == "cell" or latest.get(key, row)["kind"] == "failure":
        latest[key] = row
  found = latest.values()
  cells = [{**r, "role": _role(r)} for r in found if r["kind"] == "cell"]
  subject = operator.itemgetter("model", "task", "seed", "metric")
  baselines = {subject(c): c["value"] for c in cells if c["role"] == "baseline"}
  for cell in cells:
    baseline = baselines.get(subject(cell))
    if baseline is None or cell["role"] == "baseline":
      continue
    if cell["higher_is_better"]:
      drop, unit = 100 * (baseline - cell["value"]), POINTS
    elif baseline > 0:
      drop, unit = 100 * (cell["value"] / baseline - 1), PERCENT
    else:
      continue
    if abs(drop) > 1e100:  # Of a baseline that is next to nothing.
      continue
    cell.update(baseline=baseline, drop=drop, unit=unit)
  return Results(
    tuple(cells),
    tuple(row for row in found if row["kind"] == "failure"),
    tuple(similarity.values()),
  )


def _renamed(row: Row) -> Row:
  """The row; one of version 0.1, which has `pool` for `reduce`, renamed."""
  if "pool" not in row:
    return row
  funnel = row["funnel"].replace("pool=every", "reduce=strided")
  funnel = funnel.replace("pool=", "reduce=")
  pool = {"every": "strided"}.get(row["pool"], row["pool"])
  rest = {key: value for key, value in row.items() if key != "pool"}
  return {**rest, "reduce": pool, "funnel": funnel}


def _role(cell: Row) -> str:
  if cell["inference"] == "on":
    return "funnel"
  plain = cell["pretraining"] == "standard" and cell["funnel"] == OFF
  untouched = cell["finetuning"] in ("off", None)
  return "baseline" if plain and untouched else "plain"


def over_seeds(cells: Iterable[Row], key: str = "drop") -> Spread | None:
  """Mean and spread of the seeds' means; cells without a value do not count."""
  by_seed = {}
  for cell in cells:
    if cell.get(key) is not None:
      by_seed.setdefault(cell["seed"], []).append(cell[key])
  return mean_and_spread(map(statistics.fmean, by_seed.values()))


def levels(cells: Iterable[Row], axis: str) -> list:
  """The values of an axis, numbers in order and others as they came."""
  found = dict.fromkeys(c[axis] for c in cells if c.get(axis) is not None)
  numbers = all(isinstance(v, (int, float)) for v in found)
  return sorted(found) if numbers else list(found)


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


def pairings(cells: Iterable[Row], axis: str) -> list[dict[Any, Row]]:
  """Cells that agree in all but `axis`, by their value of it."""
  groups = {}
  for cell in cells:
    if cell.get(axis) is None:
      continue
    # The funnel's string has options that are no keys of a row.
    options = cell["funnel"].split(",")
    options = sorted(x for x in options if not x.startswith(f"{axis}="))
    rest = [cell[a] for a in AXES if a not in (axis, "funnel")]
    groups.setdefault((*options, *rest), {})[cell[axis]] = cell
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


class Rank(NamedTuple):
  """A level of an axis, among the pairings that have every level."""

  level: Any
  drop: Spread
  wins: int  # Pairings in which it is best; a tie is a win of each.
  pairings: int


def ranked(cells: Sequence[Row], axis: str) -> list[Rank]:
  """The levels of an axis by their drop, the smallest first."""
  groups = pairings(cells, axis)
  names = {name for group in groups for name in group}
  whole = [group for group in groups if len(group) == len(names)]
  best = [min(c["drop"] for c in group.values()) + _TIE for group in whole]
  order = []
  for name in levels(cells, axis):
    mine = [group[name] for group in whole if name in group]
    if mine:
      wins = sum(c["drop"] <= b for c, b in zip(mine, best, strict=True))
      order.append(Rank(name, over_seeds(mine), wins, len(whole)))
  return sorted(order, key=lambda rank: rank.drop.mean)


def claims(results: Results) -> list[str]:
  """What the numbers say, a line each; drops in their unit.

  A line says "not distinguishable" where the mean of the paired differences
  is within twice its standard error, or there are fewer than three.
  """
  lines = []
  groups = grouped(results.compared(), ("model", "unit"))
  plain = grouped(results.compared("plain"), ("model", "unit"))
  several = len({model for model, _ in groups}) > 1
  for (model, unit), cells in groups.items():
    said = [
      *(_best(cells, axis, unit) for axis in ("recover", "reduce", "stride")),
      *_training(cells, unit),
      *_cost(plain.get((model, unit), []), unit),
      _start(cells, unit),
      _tasks(cells, unit),
    ]
    prefix = f"{model}: " if several else ""
    lines += [prefix + line for line in said if line]
  return lines


def _mean(spread: Spread, unit: str) -> str:
  """The mean of differences, and their spread."""
  text = f"{spread.mean:+.2f}"
  if spread.deviation is not None:
    text += f", spread {spread.deviation:.2f}"
  return f"{text} {unit}"


def _verdict(values, unit: str, both: str, better: str, worse: str) -> str:
  """One of three sentences about paired differences, and their numbers."""
  spread = mean_and_spread(values)
  numbers = f"({_mean(spread, unit)}, n={spread.n})"
  if not spread.is_clear:
    return f"{both} are not distinguishable {numbers}"
  sign, line = (1, better) if spread.mean > 0 else (-1, worse)
  wins = sum(sign * value > _TIE for value in values)
  return f"{line} in {wins} of {spread.n} pairings {numbers}"


def _best(cells: Sequence[Row], axis: str, unit: str) -> str | None:
  """Which level of an axis is best."""
  order = ranked(cells, axis)
  if len(order) < 2:
    return None
  first, second = order[0].level, order[1].level
  spread = mean_and_spread(differences(cells, axis, first, second))
  text = _mean(spread, unit)
  if not spread.is_clear or spread.mean < 0:
    return (
      f"{axis}: {first} and {second}, the best of {len(order)}, are not "
      f"distinguishable ({text}, n={spread.n})"
    )
  return (
    f"{axis}: {first} is best of {len(order)} in {order[0].wins} of "
    f"{order[0].pairings} pairings; mean {text} over the next, {second}"
  )


def _training(cells: Sequence[Row], unit: str) -> Iterator[str]:
  """Each pretraining against the standard one; fine-tuning on against off."""
  names = [v for v in levels(cells, "pretraining") if v != "standard"]
  asked = [("pretraining", "pretraining", name, "standard") for name in names]
  for name in ("on", "sampled"):
    asked.append(("funnel at fine-tuning", "finetuning", name, "off"))
  for what, axis, name, other in asked:
    if values := differences(cells, axis, name, other):
      verbs = ("and", "beats", "is worse than")
      said = [f"{name} {verb} {other}" for verb in verbs]
      yield f"{what}: {_verdict(values, unit, *said)}"


def _cost(cells: Sequence[Row], unit: str) -> Iterator[str]:
  """What each other pretraining does to the model without a funnel."""
  cells = [c for c in cells if c["finetuning"] in ("off", None)]
  for (name,), part in grouped(cells, ("pretraining",)).items():
    if name == "standard":
      continue
    spread = mean_and_spread(c["drop"] for c in part)
    line = "is not distinguishable from standard"
    if spread.is_clear:
      line = f"{'costs' if spread.mean > 0 else 'improves'} the model"
    yield (
      f"pretraining: {name} {line} where the funnel is off at inference "
      f"(drop {_mean(spread, unit)}, {spread.n} cells)"
    )


def _start(cells: Sequence[Row], unit: str) -> str | None:
  """Whether a late start is better than an early one, and what it saves."""
  starts = levels(cells, "start")
  early, late = (*starts, None)[0], [None, *starts][-1]
  values = differences(cells, "start", late, early)
  if early == late or not values:
    return None
  line = _verdict(
    values,
    unit,
    f"{late} and {early}",
    f"later is better: {late} against {early}",
    f"earlier is better: {early} against {late}",
  )
  shares = {
    start: 100 * statistics.fmean(c.get("ideal_reduction") or 0 for c in part)
    for (start,), part in grouped(cells, ("start",)).items()
  }
  saved = f"{shares[late]:.0f} % against {shares[early]:.0f} %"
  return f"start: {line}, with {saved} of FLOPs saved"


def _tasks(cells: Sequence[Row], unit: str) -> str:
  """Tasks by drop; ">" where a neighbour's is distinguishable, else "~"."""
  groups = grouped(cells, ("task",))
  drops = {task: over_seeds(part) for (task,), part in groups.items()}
  order = sorted(drops, key=lambda task: -drops[task].mean)
  text = ""
  for before, task in zip([None, *order], order, strict=False):
    if before is not None:
      spread = mean_and_spread(differences(cells, "task", task, before))
      text += " > " if spread and spread.is_clear and spread.mean > 0 else " ~ "
    text += f"{task} {drops[task].text()}"
  tie = " (~: not distinguishable)" if "~" in text else ""
  return f"tasks by drop ({unit}): {text}{tie}"
