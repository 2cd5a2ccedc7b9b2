"""The tables of a study, a function for each question."""

from collections.abc import Callable, Iterable, Sequence
import dataclasses

from gemma_funnel.evaluation import report
from gemma_funnel.evaluation.report import Column
from gemma_funnel.study.analysis import (
  AXES,
  POINTS,
  SHAPE,
  Results,
  Row,
  grouped,
  levels,
  over_seeds,
  pairings,
  ranked,
)

_TRAINING = ("pretraining", "finetuning")


@dataclasses.dataclass(frozen=True)
class Table:
  """A table, for Markdown and for the HTML report."""

  title: str
  columns: Sequence[Column]  # One that no row has a value for is left out.
  rows: Sequence[Row]
  note: str = ""  # A paragraph above it.

  def markdown(self) -> str:
    """A heading, the note, the table."""
    parts = [f"## {self.title}", self.note]
    if self.rows:
      parts.append(report.table(self.rows, self.columns))
    return "\n\n".join(filter(None, parts))


def make_tables(results: Results) -> list[Table]:
  """All tables that have rows, and that of failures."""
  makers = (_starts, _trainings, _recoveries, _tasks, _baselines)
  made = [make(results) for make in makers]
  columns = [Column(key, key) for key in (*AXES, "error")]
  note = "" if results.failures else "None."
  failures = Table("Failures", columns, results.failures, note)
  return [table for table in made if table.rows] + [failures]


def _columns(cells: Sequence[Row], *keys: str) -> list[Column]:
  """Of text by their keys; one model of all cells is left out."""
  several = len({cell["model"] for cell in cells}) > 1
  return [Column(key, key) for key in keys if several or key != "model"]


def _rows(
  cells: Iterable[Row], keys: Sequence[str], summary: Callable[[list], Row]
) -> list[Row]:
  """A row for each group of cells: its keys, and `summary` of its cells."""
  groups = grouped(cells, keys)
  named = lambda key: dict(zip(keys, key, strict=True))
  return [{**named(key), **summary(part)} for key, part in groups.items()]


def _drop(cells: Iterable[Row]) -> str | None:
  spread = over_seeds(cells)
  return spread and spread.text()


def _sign(unit: str) -> str:
  return "points" if unit == POINTS else "%"


def _task_columns(cells: Sequence[Row]) -> list[Column]:
  units = {(c["task"], c["metric"]): _sign(c["unit"]) for c in cells}
  return [
    Column(f"drop {task}", f"{task} {metric} ({unit})", ">")
    for (task, metric), unit in units.items()
  ]


def _by(cells: Iterable[Row], key: str, prefix: str) -> dict[str, str | None]:
  """Drops by the values of a key; columns are `prefix` and the value."""
  groups = grouped(cells, (key,))
  return {f"{prefix} {name}": _drop(part) for (name,), part in groups.items()}


def _baselines(results: Results) -> Table:
  cells = results.baselines
  rows = _rows(
    cells,
    ("model", "task", "metric"),
    lambda part: {
      "better": "higher" if part[0]["higher_is_better"] else "lower",
      "value": over_seeds(part, "value").text(".4f"),
      "num_test": part[0].get("num_test"),
      "seeds": len(part),
    },
  )
  columns = [
    *_columns(cells, "model", "task", "metric", "better"),
    Column("value", "value", ">"),
    Column("num_test", "test examples", "d"),
    Column("seeds", "seeds", "d"),
  ]
  lost = sum("drop" not in c and c["role"] == "funnel" for c in results.cells)
  note = "Standard pretraining, no funnel anywhere; mean ± spread over seeds."
  if lost:
    note += (
      f" {lost} cells with a funnel are left out of what follows: there is no "
      "baseline of their model, task, metric and seed."
    )
  return Table("Baselines", columns, rows, note)


def _starts(results: Results) -> Table:
  # Of several stages the axes are None, and the funnel's string tells.
  several = lambda c: c["funnel"] if c.get("start") is None else None
  cells = [{**c, "several": several(c)} for c in results.compared()]
  keys = ("model", *SHAPE, *_TRAINING, "several")

  def summary(part):
    names = ("ideal_reduction", "reduction")
    saved = {name: over_seeds(part, name) for name in names}
    means = {name: spread.mean for name, spread in saved.items() if spread}
    return {**means, **_by(part, "task", "drop")}

  columns = [
    *_columns(cells, *keys),
    Column("ideal_reduction", "FLOPs saved (%)", ".1f", 100),
    Column("reduction", "time saved (%)", ".1f", 100),
    *_task_columns(cells),
  ]
  return Table(
    "1. Where should the funnel start, and what does it save?",
    columns,
    _rows(cells, keys, summary),
    "Drop from the baseline by task, mean ± spread over seeds of the mean over "
    "recoveries. Negative is better than the baseline.",
  )


def _trainings(results: Results) -> Table:
  cells = [*results.compared(), *results.compared("plain")]
  untrained = grouped(filter(_is_untrained, cells), ("model", "task"))

  def summary(part):
    first, share = part[0], None
    others = untrained.get((first["model"], first["task"]), [])
    at = {(c["funnel"], c["seed"]): c for c in others}
    both = [c for c in part if (c["funnel"], c["seed"]) in at]
    before = over_seeds(at[c["funnel"], c["seed"]] for c in both)
    trained = first["inference"] == "on" and not _is_untrained(first)
    if trained and both and before.mean > max(before.deviation or 0, 1e-9):
      share = 1 - over_seeds(both).mean / before.mean
    unit = _sign(first["unit"])
    return dict(drop=_drop(part), unit=unit, share=share, cells=len(part))

  keys = ("model", "task", "inference", *_TRAINING)
  columns = [
    *_columns(cells, *keys),
    Column("drop", "drop", ">"),
    Column("unit", "unit"),
    Column("share", "drop recovered (%)", ".0f", 100),
    Column("cells", "cells", "d"),
  ]
  return Table(
    "2. Does funnel-aware pretraining or fine-tuning help?",
    columns,
    _rows(cells, keys, summary),
    "Mean over funnels, ± spread over seeds. Recovered is 1 - drop / (drop of "
    "the funnel switched on untrained), over the funnels and seeds that both "
    "have; a dash where the untrained drop is within its spread. Inference "
    "off is what the training costs the model without a funnel.",
  )


def _is_untrained(cell: Row) -> bool:
  """Whether the funnel was switched on without any training with it."""
  trained = cell["finetuning"] not in ("off", None)
  standard = cell["pretraining"] == "standard"
  return cell["inference"] == "on" and standard and not trained


def _recoveries(results: Results) -> Table:
  cells, rows = results.compared(), []
  for (model, unit), part in grouped(cells, ("model", "unit")).items():
    paired = [c for group in pairings(part, "recover") for c in group.values()]
    for place, rank in enumerate(ranked(part, "recover"), 1):
      mine = [c for c in paired if c["recover"] == rank.level]
      row = dict(model=model, recover=rank.level, unit=unit, rank=place)
      row |= dict(drop=rank.drop.text(), best=rank.wins, of=rank.pairings)
      row |= _by(mine, "start", "start") | _by(mine, "task", "drop")
      rows.append(row)
  columns = [
    *_columns(cells, "model", "recover", "unit"),
    Column("rank", "rank", "d"),
    Column("drop", "drop", ">"),
    Column("best", "best in", "d"),
    Column("of", "of pairings", "d"),
    *(Column(f"start {s}", f"start {s}", ">") for s in levels(cells, "start")),
    *_task_columns(cells),
  ]
  return Table(
    "3. Which recovery is best?",
    columns,
    rows,
    "Drop, mean ± spread over seeds of the mean over all else. A pairing is "
    "the cells that differ in nothing but the recovery; ranks and wins are of "
    "those that have all of them.",
  )


def _tasks(results: Results) -> Table:
  header = lambda c: f"{c['pretraining']}, tuned {c['finetuning'] or '-'}"
  cells = [{**c, "training": header(c)} for c in results.compared()]
  summary = lambda part: {
    "kind": part[0].get("task_kind"),
    "mean": over_seeds(part).mean,
    "drop": _drop(part),
    **_by(part, "training", "in"),
  }
  rows = _rows(cells, ("model", "task", "unit"), summary)
  rows.sort(key=lambda r: (r["model"], r["unit"] != POINTS, -r["mean"]))
  columns = [
    *_columns(cells, "model", "task", "kind", "unit"),
    Column("drop", "drop, all cells", ">"),
    *(
      Column(f"in {header(part[0])}", header(part[0]), ">")
      for part in grouped(cells, _TRAINING).values()
    ),
  ]
  return Table(
    "4. Which tasks suffer?",
    columns,
    rows,
    "Drop by pretraining and fine-tuning with the funnel, mean ± spread over "
    "seeds of the mean over funnels; the largest first.",
  )
