"""A study's files, and the one HTML file that shows all that it has.

The HTML file needs no network and nothing beside it.
"""

import base64
from collections.abc import Mapping, Sequence
import dataclasses
import html
import json
import os
import pathlib
import re
import string
from typing import Any

from gemma_funnel import atomic
from gemma_funnel.evaluation import report
from gemma_funnel.study import analysis, plots
from gemma_funnel.study.analysis import Results
from gemma_funnel.study.tables import Table, make_tables

_PAGE = pathlib.Path(__file__).with_name("report.html")


@dataclasses.dataclass(frozen=True)
class Picture:
  """A plot: the bytes of a PNG, what it shows, and that for who cannot see."""

  png: bytes
  caption: str
  alt: str


def write(
  results: Results,
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
  about = {"settings": dict(settings or {}), "measured": _measured(results)}
  content = {
    "title": title,
    "environment": report.environment(),
    **about,
    "claims": claims,
    "tables": {table.title: list(table.rows) for table in tables},
  }
  bullets = "\n".join(f"- {line}" for line in claims)
  parts = [f"# {title}", bullets, *(table.markdown() for table in tables)]
  files = {
    "study.json": _encoded(content),
    "tables.md": ("\n\n".join(filter(None, parts)) + "\n").encode(),
  }
  pictures = []
  for plot in plots.draw(results):
    files[plot.name] = plot.png()
    pictures.append(Picture(files[plot.name], plot.caption, plot.alt))
  about["report made on"] = content["environment"]
  notes = [*claims, analysis.CAVEAT] if claims else []
  page = render(title, notes, tables, pictures, about)
  files["report.html"] = page.encode()
  os.makedirs(out_dir, exist_ok=True)
  paths = {name: os.path.join(out_dir, name) for name in files}
  for name, data in files.items():
    atomic.write_bytes(paths[name], data)
  return paths


def _measured(results: Results) -> dict[str, Any]:
  """Where cells were measured, and how many."""
  known = lambda key: sorted({str(c[key]) for c in results.cells if c.get(key)})
  num_cells = len(results.cells)
  return {"device": known("device"), "git": known("git"), "cells": num_cells}


def _encoded(content: Mapping[str, Any]) -> bytes:
  try:
    return (json.dumps(content, indent=1, allow_nan=False) + "\n").encode()
  except (TypeError, ValueError) as error:
    raise ValueError(f"study.json: {error}") from error


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
    items = (_element("li", _escape(claim)) for claim in claims)
    parts.append(_section("Findings", _element("ul", *items)))
  parts += [_figure(picture) for picture in pictures]
  parts += [_table(table) for table in tables]
  if settings:
    shown = _definitions(settings)
    parts.append(_section("Settings and environment", shown))
  page = string.Template(_PAGE.read_text(encoding="utf-8"))
  return page.substitute(title=_escape(title), body="\n".join(parts))


def _escape(value: Any) -> str:
  # What UTF-8 cannot hold would not be written at all.
  text = str(value).encode("utf-8", "replace").decode()
  return html.escape(text)


def _element(tag: str, *markup: str, **attributes: str | None) -> str:
  """An element; "_" in an attribute's name is "-", None leaves it out."""
  given = "".join(
    f' {name.strip("_").replace("_", "-")}="{_escape(value)}"'
    for name, value in attributes.items()
    if value is not None
  )
  end = "" if tag == "img" else f"</{tag}>"
  return f"<{tag}{given}>{''.join(markup)}{end}"


def _section(title: str, *markup: str) -> str:
  return _element("section", _element("h2", _escape(title)), *markup)


def _figure(picture: Picture) -> str:
  data = "data:image/png;base64," + base64.b64encode(picture.png).decode()
  return _element(
    "figure",
    _element(
      "div", _element("img", src=data, alt=picture.alt), class_="scroll"
    ),
    _element("figcaption", _escape(picture.caption)),
  )


def _table(table: Table) -> str:
  has = lambda column: any(r.get(column.key) is not None for r in table.rows)
  columns = [(c, "n" if c.format else None) for c in table.columns if has(c)]
  note = _element("p", _escape(table.note)) if table.note else ""
  if not columns:
    return _section(table.title, note)
  heads = (
    _element(
      "th",
      _element("button", _escape(column.header), type="button"),
      scope="col",
      aria_sort="none",
      class_=kind,
    )
    for column, kind in columns
  )
  lines = []
  for row in table.rows:
    # Bars are escaped for Markdown only.
    texts = (column.text(row).replace("\\|", "|") for column, _ in columns)
    cells = (
      _element("td", _escape(text), data_n=_sort_key(text), class_=kind)
      for text, (_, kind) in zip(texts, columns, strict=True)
    )
    lines.append(_element("tr", *cells) + "\n")
  head = _element("thead", _element("tr", *heads))
  shown = _element("table", head, _element("tbody", *lines))
  return _section(table.title, note, _element("div", shown, class_="scroll"))


def _sort_key(text: str) -> str | None:
  """The number that a cell starts with; None of text."""
  number = re.match(r"[-+]?\d+(\.\d+)?(e[-+]?\d+)?(?![\w.])", text)
  return repr(float(number[0])) if number else None


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
    parts += [_element("dt", _escape(key)), _element("dd", shown)]
  return _element("dl", *parts)
