"""What a study shows: its tables, and one HTML file of all that it has.

The file needs no network and nothing beside it.
"""

import base64
from collections.abc import Iterable, Mapping, Sequence
import dataclasses
import html
import re
from typing import Any

from gemma_funnel.evaluation import report
from gemma_funnel.evaluation.report import Column
from gemma_funnel.study.analysis import (
  AXES,
  PERCENT,
  POINTS,
  SHAPE,
  Results,
  grouped,
  levels,
  over_seeds,
  pairings,
  ranked,
  whole_pairings,
)

Row = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Table:
  """A table, for Markdown and for the page.

  Attributes:
    title: its heading.
    columns: what it shows; one that no row has a value for is left out.
    rows: none is no table.
    note: a paragraph above it.
  """

  title: str
  columns: Sequence[report.Column]
  rows: Sequence[Row]
  note: str = ""

  def markdown(self) -> str:
    """A heading, the note, the table."""
    parts = [f"## {self.title}", self.note]
    if self.rows:
      parts.append(report.table(self.rows, self.columns))
    return "\n\n".join(filter(None, parts))


@dataclasses.dataclass(frozen=True)
class Picture:
  """A plot: the bytes of a PNG, what it shows, and that for who cannot see."""

  png: bytes
  caption: str
  alt: str


# --- Tables ---------------------------------------------------------------


def _drop(cells: Iterable[Row]) -> str | None:
  spread = over_seeds(cells)
  return spread and spread.text()


def _columns(cells: Iterable[Row], *keys: str) -> list[Column]:
  """Of axes by their own names; without what is the same in all cells."""
  cells = list(cells)
  vary = lambda key: len({cell.get(key) for cell in cells}) > 1
  return [Column(key, key) for key in keys if vary(key) or key != "model"]


def _task_columns(cells: Iterable[Row]) -> list[Column]:
  units = {(c["task"], c["metric"]): c["unit"] for c in cells}
  sign = {POINTS: "points", PERCENT: "%"}
  return [
    Column(f"drop {task}", f"{task} {metric} ({sign[unit]})", ">")
    for (task, metric), unit in units.items()
  ]


def _by_task(cells: Iterable[Row]) -> dict[str, str | None]:
  groups = grouped(cells, ("task",))
  return {f"drop {task}": _drop(part) for (task,), part in groups.items()}


def baseline_table(results: Results) -> Table:
  """What drops are measured from."""
  cells = [c for c in results.cells if c["role"] == "baseline"]
  rows = []
  for (model, task, metric), part in grouped(
    cells, ("model", "task", "metric")
  ).items():
    rows.append(
      {
        "model": model,
        "task": task,
        "metric": metric,
        "better": "higher" if part[0]["higher_is_better"] else "lower",
        "value": over_seeds(part, "value").text(".4f"),
        "num_test": part[0].get("num_test"),
        "seeds": len(part),
      }
    )
  columns = [
    *_columns(cells, "model", "task"),
    Column("metric", "metric"),
    Column("better", "better"),
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


def start_table(results: Results) -> Table:
  """Question 1."""
  cells = results.compared()
  # Of several stages the parts are None, and the funnel's string tells.
  several = [c for c in cells if c.get("start") is None]
  keys = ("model", *SHAPE, "pretraining", "finetuning", "several")
  cells = [
    {**c, "several": c["funnel"] if c in several else None} for c in cells
  ]
  rows = []
  for key, part in grouped(cells, keys).items():
    mean = {
      name: spread.mean
      for name in ("ideal_reduction", "reduction")
      if (spread := over_seeds(part, name))
    }
    rows.append({**dict(zip(keys, key, strict=True)), **mean, **_by_task(part)})
  columns = [
    *_columns(cells, *keys),
    Column("ideal_reduction", "FLOPs saved (%)", ".1f", 100),
    Column("reduction", "time saved (%)", ".1f", 100),
    *_task_columns(cells),
  ]
  return Table(
    "1. Where should the funnel start, and what does it save?",
    columns,
    rows,
    "Drop from the baseline by task, mean ± spread over seeds of the mean over "
    "recoveries. Negative is better than the baseline.",
  )


def training_table(results: Results) -> Table:
  """Question 2."""
  cells = [*results.compared(), *results.compared("plain")]
  keys = ("model", "task", "inference", "pretraining", "finetuning")
  rows = []
  for key, part in grouped(cells, keys).items():
    values = dict(zip(keys, key, strict=True))
    untrained = [
      c
      for c in cells
      if c["inference"] == "on"
      and (c["model"], c["task"], c["pretraining"])
      == (values["model"], values["task"], "standard")
      and c["finetuning"] in ("off", None)
    ]
    share = None
    if values["inference"] == "on" and key != _keyed(untrained, keys):
      share = _share_recovered(part, untrained)
    unit = "points" if part[0]["unit"] == POINTS else "%"
    rows.append(
      {
        **values,
        "drop": _drop(part),
        "unit": unit,
        "share": share,
        "cells": len(part),
      }
    )
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
    rows,
    "Mean over funnels, ± spread over seeds. Recovered is 1 - drop / (drop of "
    "the funnel switched on untrained), over the funnels and seeds that both "
    "have; a dash where the untrained drop is within its spread. Inference "
    "off is what the training costs the model without a funnel.",
  )


def _keyed(cells, keys):
  return tuple(cells[0].get(k) for k in keys) if cells else None


def _share_recovered(cells, untrained) -> float | None:
  at = {(c["funnel"], c["seed"]): c for c in untrained}
  both = [c for c in cells if (c["funnel"], c["seed"]) in at]
  before = over_seeds(at[c["funnel"], c["seed"]] for c in both)
  if not both or before.mean <= max(before.deviation or 0, 1e-9):
    return None
  return 1 - over_seeds(both).mean / before.mean


def recovery_table(results: Results) -> Table:
  """Question 3."""
  cells, rows = results.compared(), []
  starts = levels(cells, "start")
  for (model, unit), part in grouped(cells, ("model", "unit")).items():
    total = [c for group in pairings(part, "recover") for c in group.values()]
    order = ranked(part, "recover")
    for rank, (name, spread, best) in enumerate(order, 1):
      mine = [c for c in total if c["recover"] == name]
      by_start = {
        f"start {start}": _drop(c for c in mine if c["start"] == start)
        for start in starts
      }
      rows.append(
        {
          "model": model,
          "recover": name,
          "unit": unit,
          "rank": rank,
          "drop": spread.text(),
          "best": best,
          "of": whole_pairings(part, "recover"),
          **by_start,
          **_by_task(mine),
        }
      )
  columns = [
    *_columns(cells, "model"),
    Column("recover", "recover"),
    Column("unit", "unit"),
    Column("rank", "rank", "d"),
    Column("drop", "drop", ">"),
    Column("best", "best in", "d"),
    Column("of", "of pairings", "d"),
    *(Column(f"start {s}", f"start {s}", ">") for s in starts),
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


def task_table(results: Results) -> Table:
  """Question 4."""
  cells, rows = results.compared(), []
  trainings = grouped(cells, ("pretraining", "finetuning"))
  heads = {key: f"{key[0]}, tuned {key[1] or '-'}" for key in trainings}
  for (model, task, unit), part in grouped(
    cells, ("model", "task", "unit")
  ).items():
    by_training = {
      heads[key]: _drop(mine)
      for key, mine in grouped(part, ("pretraining", "finetuning")).items()
    }
    rows.append(
      {
        "model": model,
        "task": task,
        "kind": part[0].get("task_kind"),
        "unit": unit,
        "mean": over_seeds(part).mean,
        "drop": _drop(part),
        **by_training,
      }
    )
  rows.sort(key=lambda r: (r["model"], r["unit"] != POINTS, -r["mean"]))
  columns = [
    *_columns(cells, "model", "task"),
    Column("kind", "kind"),
    Column("unit", "unit"),
    Column("drop", "drop, all cells", ">"),
    *(Column(head, head, ">") for head in heads.values()),
  ]
  return Table(
    "4. Which tasks suffer?",
    columns,
    rows,
    "Drop by pretraining and fine-tuning with the funnel, mean ± spread over "
    "seeds of the mean over funnels; the largest first.",
  )


def failure_table(results: Results) -> Table:
  """Cells that have no value."""
  columns = [*(Column(axis, axis) for axis in AXES), Column("error", "error")]
  return Table(
    "Failures", columns, results.failures, "" if results.failures else "None."
  )


def tables(results: Results) -> list[Table]:
  """All of them; those without rows only where that says something."""
  made = [
    start_table(results),
    training_table(results),
    recovery_table(results),
    task_table(results),
    baseline_table(results),
  ]
  return [t for t in made if t.rows] + [failure_table(results)]


# --- HTML -----------------------------------------------------------------


def render(
  title: str,
  claims: Sequence[str],
  tables: Sequence[Table],
  pictures: Sequence[Picture],
  settings: Mapping[str, Any],
) -> str:
  """The page. All text is escaped.

  Args:
    title: its title and first heading.
    claims: lines at the top.
    tables: each can be sorted by a click on a column's head.
    pictures: below the claims, in this order.
    settings: what the study was run with and on; nested mappings are indented.
  """
  parts = [f"<h1>{_escape(title)}</h1>"]
  if claims:
    items = "".join(f"<li>{_escape(claim)}</li>" for claim in claims)
    parts.append(f"<section><h2>Findings</h2><ul>{items}</ul></section>")
  parts += [_figure(picture) for picture in pictures]
  parts += [_section(table) for table in tables]
  if settings:
    parts.append(
      "<section><h2>Settings and environment</h2>"
      f"{_definitions(settings)}</section>"
    )
  body = "\n".join(parts)
  return (
    '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
    '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
    f'<link rel="icon" href="data:,">\n<title>{_escape(title)}</title>\n'
    f"<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n{body}\n</main>\n"
    f"<script>{_SCRIPT}</script>\n</body>\n</html>\n"
  )


def _escape(value: Any) -> str:
  # What UTF-8 cannot hold would not be written at all.
  text = str(value).encode("utf-8", "replace").decode()
  return html.escape(text)


def _figure(picture: Picture) -> str:
  data = base64.b64encode(picture.png).decode()
  return (
    f'<figure><div class="scroll"><img src="data:image/png;base64,{data}" '
    f'alt="{_escape(picture.alt)}"></div>'
    f"<figcaption>{_escape(picture.caption)}</figcaption></figure>"
  )


def _section(table: Table) -> str:
  note = f"<p>{_escape(table.note)}</p>" if table.note else ""
  shown = [
    c
    for c in table.columns
    if any(r.get(c.key) is not None for r in table.rows)
  ]
  if not shown:
    return f"<section><h2>{_escape(table.title)}</h2>{note}</section>"
  kinds = [' class="n"' if column.format else "" for column in shown]
  head = "".join(
    f'<th scope="col" aria-sort="none"{kind}><button type="button">'
    f"{_escape(column.header)}</button></th>"
    for column, kind in zip(shown, kinds, strict=True)
  )
  lines = []
  for row in table.rows:
    cells = "".join(
      f"<td{_sort_key(text)}{kind}>{_escape(text)}</td>"
      for text, kind in (
        # Bars are escaped for Markdown only.
        (column.text(row).replace("\\|", "|"), kind)
        for column, kind in zip(shown, kinds, strict=True)
      )
    )
    lines.append(f"<tr>{cells}</tr>")
  return (
    f"<section><h2>{_escape(table.title)}</h2>{note}"
    f'<div class="scroll"><table><thead><tr>{head}</tr></thead>'
    f"<tbody>\n{chr(10).join(lines)}\n</tbody></table></div></section>"
  )


def _sort_key(text: str) -> str:
  """The number that a cell starts with, as an attribute; text has none."""
  number = re.match(r"[-+]?\d+(\.\d+)?(e[-+]?\d+)?(?![\w.])", text)
  return f' data-n="{float(number[0])!r}"' if number else ""


def _definitions(values: Mapping[str, Any]) -> str:
  """A definition list; sequences are joined by commas."""
  parts = []
  for key, value in values.items():
    if isinstance(value, Mapping):
      shown = _definitions(value) if value else report.MISSING
    elif isinstance(value, (list, tuple)):
      shown = _escape(", ".join(map(str, value))) or report.MISSING
    else:
      shown = _escape(report.MISSING if value is None else value)
    parts.append(f"<dt>{_escape(key)}</dt><dd>{shown}</dd>")
  return f"<dl>{''.join(parts)}</dl>"


_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --paper: #fff;
  --line: #d5d9de; --soft: #f3f5f7; --quiet: #59636e; --accent: #0059b3; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e3e6ea; --paper: #14171b; --line: #3a4048; --soft: #20252b;
    --quiet: #9aa4af; --accent: #79b8ff; } }
* { box-sizing: border-box; }
body { margin: 0; color: var(--ink); background: var(--paper);
  font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 72rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.6rem; line-height: 1.25; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2rem 0 .5rem; overflow-wrap: anywhere; }
p, li, figcaption, dd { max-width: 75ch; overflow-wrap: anywhere; }
p, figcaption { color: var(--quiet); }
ul { padding-left: 1.2rem; }
figure { margin: 1.5rem 0; }
figure .scroll { width: fit-content; max-width: 100%; }
figcaption { margin-top: .4rem; }
/* Plots are drawn on white; they stay so. */
img { max-width: 100%; height: auto; display: block; background: #fff; }
/* On a phone they are scrolled, or would not be legible. */
@media (max-width: 48rem) { img { max-width: 60rem; } }
.scroll { overflow-x: auto; border: 1px solid var(--line);
  border-radius: 4px; }
table { border-collapse: collapse; width: 100%; font-size: .875rem;
  font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .6rem; text-align: left; vertical-align: top;
  border-bottom: 1px solid var(--line); }
tbody tr:last-child td { border-bottom: 0; }
td.n { white-space: nowrap; }
.n { text-align: right; }
th { background: var(--soft); padding: 0; vertical-align: bottom; }
th button { font: inherit; font-weight: 600; color: inherit; width: 100%;
  text-align: inherit; background: none; border: 0; padding: .4rem .6rem;
  cursor: pointer; }
th button:hover, th button:focus-visible { color: var(--accent); }
th[aria-sort=ascending] button::after { content: " \\25B2"; }
th[aria-sort=descending] button::after { content: " \\25BC"; }
tbody tr:hover { background: var(--soft); }
dl { display: grid; grid-template-columns: minmax(6rem, max-content) 1fr;
  gap: .2rem 1rem; margin: 0; font-size: .875rem; }
dt { color: var(--quiet); overflow-wrap: anywhere; }
dd { margin: 0; }
"""

# Numbers sort by value and before text; what is missing stays last.
_SCRIPT = """
for (const button of document.querySelectorAll("th button")) {
  button.addEventListener("click", () => {
    const head = button.parentElement, row = head.parentElement;
    const body = head.closest("table").tBodies[0];
    const index = head.cellIndex;
    const down = head.getAttribute("aria-sort") === "ascending";
    for (const cell of row.cells) cell.setAttribute("aria-sort", "none");
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const compare = (a, b) => {
      const x = a.cells[index], y = b.cells[index];
      const missing = (x.textContent === "-") - (y.textContent === "-");
      if (missing) return missing;
      const p = parseFloat(x.dataset.n), q = parseFloat(y.dataset.n);
      let order = isNaN(p) - isNaN(q);
      if (!order) {
        order = isNaN(p) ? x.textContent.localeCompare(y.textContent) : p - q;
      }
      return down ? -order : order;
    };
    body.append(...[...body.rows].sort(compare));
  });
}
"""
