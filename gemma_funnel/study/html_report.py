"""A study's files, and the one HTML file that shows all that it has.

The HTML file needs no network and nothing beside it.
"""

import base64
from collections.abc import Mapping, Sequence
import html
import json
import os
import pathlib
import re
import string
from typing import Any, NamedTuple

from gemma_funnel import atomic, cli
from gemma_funnel.evaluation import report
from gemma_funnel.study import analysis, plots
from gemma_funnel.study.tables import Table, make_tables

_PAGE = pathlib.Path(__file__).with_name("report.html")


class Picture(NamedTuple):
  """A plot: the bytes of a PNG, what it shows, and that for who cannot see."""

  png: bytes
  caption: str
  alt: str


def write(
  results: analysis.Results,
  out_dir: str | os.PathLike,
  title: str,
  settings: Mapping[str, Any] | None = None,
) -> dict[str, str]:
  """Writes a study: tables.md, study.json, plots, and report.html of it all.

  Args:
    results: all of them.
    out_dir: the folder; it is made if need be.
    title: of the tables and the page.
    settings: what the study was run with.

  Returns:
    The path of each file written, by its name.

  Raises:
    ValueError: a value that JSON cannot hold.
  """
  claims, tables = analysis.claims(results), make_tables(results)
  cells, environment = results.cells, report.environment()
  known = lambda key: sorted({str(c[key]) for c in cells if c.get(key)})
  measured = dict(device=known("device"), git=known("git"), cells=len(cells))
  about = {"settings": dict(settings or {}), "measured": measured}
  content = {"title": title, "environment": environment, **about}
  content["claims"] = claims
  content["tables"] = {table.title: list(table.rows) for table in tables}
  try:
    encoded = json.dumps(content, indent=1, allow_nan=False)
  except (TypeError, ValueError) as error:
    raise ValueError(f"study.json: {error}") from error
  bullets = "\n".join(f"- {report.markdown(line)}" for line in claims)
  parts = [
    f"# {report.markdown(title)}",
    bullets,
    *(table.markdown() for table in tables),
  ]
  markdown = "\n\n".join(filter(None, parts))
  files = {"study.json": f"{encoded}\n", "tables.md": f"{markdown}\n"}
  files = {name: text.encode() for name, text in files.items()}
  pictures = []
  for plot in plots.draw(results):
    files[plot.name] = report.png(plot.figure)
    pictures.append(Picture(files[plot.name], plot.caption, plot.alt))
  notes = [*claims, analysis.CAVEAT] if claims else []
  about["report made on"] = environment
  page = render(title, notes, tables, pictures, about)
  files["report.html"] = page.encode()
  os.makedirs(out_dir, exist_ok=True)
  paths = {name: os.path.join(out_dir, name) for name in files}
  for name, data in files.items():
    atomic.write_bytes(paths[name], data)
  return paths


def render(
  title: str,
  claims: Sequence[str],
  tables: Sequence[Table],
  pictures: Sequence[Picture],
  settings: Mapping[str, Any],
) -> str:
  """The HTML file. All text is escaped.

  Args:
    title: its title and first heading.
    claims: lines at the top.
    tables: each can be sorted by a click on a column's head.
    pictures: below the claims, in this order.
    settings: what the study was run with and on; nested mappings are indented.
  """
  parts = []
  if claims:
    items = "".join(f"<li>{_escape(claim)}</li>" for claim in claims)
    parts.append(_section("Findings", f"<ul>{items}</ul>"))
  for png, caption, alt in pictures:
    source = "data:image/png;base64," + base64.b64encode(png).decode()
    parts.append(
      f'<figure><div class="scroll"><img src="{source}" alt="{_escape(alt)}">'
      f"</div><figcaption>{_escape(caption)}</figcaption></figure>"
    )
  parts += map(_table, tables)
  if settings:
    parts.append(_section("Settings and environment", _definitions(settings)))
  page = string.Template(_PAGE.read_text(encoding="utf-8"))
  return page.substitute(title=_escape(title), body="\n".join(parts))


def _escape(value: Any) -> str:
  # What UTF-8 cannot hold would not be written at all.
  text = str(value).encode("utf-8", "replace").decode()
  return html.escape(cli.clean(text, len(text)))


def _section(title: str, markup: str) -> str:
  return f"<section><h2>{_escape(title)}</h2>{markup}</section>"


def _table(table: Table) -> str:
  has = lambda column: any(r.get(column.key) is not None for r in table.rows)
  columns = [column for column in table.columns if has(column)]
  note = f"<p>{_escape(table.note)}</p>" if table.note else ""
  if not columns:
    return _section(table.title, note)
  kinds = [' class="n"' if column.format else "" for column in columns]
  lines = [
    "".join(
      f'<th scope="col" aria-sort="none"{kind}><button type="button">'
      f"{_escape(column.header)}</button></th>"
      for column, kind in zip(columns, kinds, strict=True)
    )
  ]
  for row in table.rows:
    line = ""
    for column, kind in zip(columns, kinds, strict=True):
      text = column.text(row)
      # A cell is sorted by the number that it starts with.
      number = re.match(r"[-+]?\d+(\.\d+)?(e[-+]?\d+)?(?![\w.])", text)
      key = f' data-n="{float(number[0])!r}"' if number else ""
      line += f"<td{key}{kind}>{_escape(text)}</td>"
    lines.append(line)
  head, *body = (f"<tr>{line}</tr>" for line in lines)
  return _section(
    table.title,
    f'{note}<div class="scroll"><table><thead>{head}</thead><tbody>'
    + "".join(f"{line}\n" for line in body)
    + "</tbody></table></div>",
  )


def _definitions(values: Mapping[str, Any]) -> str:
  """A definition list; sequences are joined by commas."""
  parts = []
  for key, value in values.items():
    if isinstance(value, Mapping) and value:
      shown = _definitions(value)
    elif isinstance(value, (list, tuple)):
      shown = _escape(", ".join(map(str, value))) or report.MISSING
    else:
      shown = _escape(report.MISSING if value in (None, {}) else value)
    parts.append(f"<dt>{_escape(key)}</dt><dd>{shown}</dd>")
  return f"<dl>{''.join(parts)}</dl>"
