"""A study's files: whole, by themselves, and all text of the HTML escaped."""

import base64
import html
from html import parser
import json
import random
import re

import pytest
from tiny_study import COLUMNS, ROWS, make_rows

from gemma_funnel.evaluation.report import Column
from gemma_funnel.study import analysis, html_report
from gemma_funnel.study.tables import Table

TABLE = Table("A & B", COLUMNS, ROWS, "a note <b>")
HOSTILE = "</script><script>alert(1)</script>\"'&<!--\ud800"
_VOID = {"meta", "link", "img"}


class _Reader(parser.HTMLParser):
  """Tags must close in the order they were opened."""

  def __init__(self):
    super().__init__()
    self.open, self.seen, self.cells, self.text = [], [], [], []

  def handle_starttag(self, tag, attrs):
    self.seen.append((tag, dict(attrs)))
    if tag not in _VOID:
      self.open.append(tag)
    if tag in ("td", "th"):
      self.cells.append("")

  def handle_endtag(self, tag):
    assert self.open.pop() == tag

  def handle_data(self, data):
    if self.open and self.open[-1] not in ("script", "style"):
      self.text.append(data)
      if {"td", "th"} & set(self.open):
        self.cells[-1] += data


def _read(text):
  reader = _Reader()
  reader.feed(text)
  reader.close()
  assert not reader.open
  return reader


def _page(title="t", claims=(), tables=(TABLE,), pictures=(), settings=None):
  return html_report.render(title, claims, tables, pictures, settings or {})


def test_the_page_has_what_it_was_given():
  picture = html_report.Picture(b"\x89PNG", "a caption", 'an "alt" <text>')
  settings = {"seeds": [0, 1], "model": {"preset": "tiny", "none": None}}
  reader = _read(
    _page("A title", ["one", "two"], (TABLE,), [picture], settings)
  )
  assert reader.cells[:3] == ["na<me", "value (%)", "drop"]
  assert reader.cells[3:6] == ["a|b <i>", "50.0", "-1.20 ± 0.30"]
  assert reader.cells[6:] == ["2nd", "-", "10.00 (n=1)"]
  heads = [attrs for tag, attrs in reader.seen if tag == "th"]
  assert [head["aria-sort"] for head in heads] == ["none"] * 3
  assert [tag for tag, _ in reader.seen].count("button") == 3
  text = " ".join(reader.text)
  for part in ("A title", "one", "two", "a caption", "0, 1", "preset", "tiny"):
    assert part in text
  [image] = [attrs for tag, attrs in reader.seen if tag == "img"]
  assert image["alt"] == 'an "alt" <text>'
  data = image["src"].removeprefix("data:image/png;base64,")
  assert base64.b64decode(data) == b"\x89PNG"


def test_nothing_is_loaded():
  picture = html_report.Picture(b"\x89PNG", "c", "a")
  for tag, attrs in _read(_page(pictures=[picture])).seen:
    for name in ("src", "href"):
      assert attrs.get(name, "data:").startswith("data:"), (tag, attrs)
  assert not re.search(r"https?:|@import|url\(", _page())


@pytest.mark.parametrize(
  "where", ["title", "claims", "table", "picture", "set"]
)
def test_hostile_text(where):
  give = lambda name: HOSTILE if where == name else "x"
  columns = [Column("a", give("table"))]
  rows = [{"a": give("table")}]
  text = html_report.render(
    give("title"),
    [give("claims")],
    [Table(give("table"), columns, rows, give("table"))],
    [html_report.Picture(b"", give("picture"), give("picture"))],
    {give("set"): [give("set")], "nested": {give("set"): give("set")}},
  )
  reader = _read(text)
  assert [tag for tag, _ in reader.seen].count("script") == 1
  assert "<!--" not in text
  shown = HOSTILE.replace("\ud800", "?")
  values = [v for _, attrs in reader.seen for v in attrs.values()]
  assert shown in "".join(reader.text) or shown in values
  text.encode()


def test_random_text_comes_back():
  chance = random.Random(0)
  alphabet = "ab<>&\"'|\\ é-1.5±%"
  for _ in range(50):
    value = "".join(chance.choices(alphabet, k=8)).strip() or "x"
    table = Table("t", [Column("a", "h")], [{"a": value}])
    got = _read(_page(tables=(table,))).cells[1]
    assert got == value
    assert html.escape(got) in _page(tables=(table,))


def test_numbers_are_sorted_by_value():
  keys = {"-1.20 ± 0.30": -1.2, "10.00 (n=1)": 10.0, "37": 37.0, "1e-05": 1e-5}
  keys |= {
    "+2.5": 2.5,
    **dict.fromkeys(("-", "text", "2nd", "59d0d6d", "1.2.3")),
  }
  for text, value in keys.items():
    table = Table("t", [Column("a", "h")], [{"a": text}])
    [cell] = [a for tag, a in _read(_page(tables=(table,))).seen if tag == "td"]
    assert cell.get("data-n") == (None if value is None else str(value)), text


def _write(rows, *args):
  return html_report.write(analysis.organise(rows), *args)


PARTS = {
  "nothing": lambda r: False,
  "failures": lambda r: r["kind"] == "failure",
  "similarity": lambda r: r["kind"] == "similarity",
  "baselines": lambda r: r["funnel"] == "off",
  "no baselines": lambda r: r["inference"] == "on",
  "lower is better": lambda r: r["task"] == "prose",
  "one funnel": lambda r: (
    r["recover"] in ("add", None) and r["start"] in (4, None)
  ),
}


@pytest.mark.parametrize("keep", PARTS.values(), ids=PARTS)
def test_parts_of_a_study(keep, tmp_path):
  rows = [row for row in make_rows() if keep(row)]
  paths = _write(rows, tmp_path / "new", "t")
  for name in ("tables.md", "study.json", "report.html"):
    with open(paths[name]) as f:
      assert f.read()


def test_files_agree(tmp_path):
  rows = make_rows()
  paths = _write(rows, tmp_path, "A <title>", {"seeds": 2})
  assert sorted(p.name for p in tmp_path.iterdir()) == sorted(paths)
  with open(paths["study.json"]) as f:
    content = json.load(f)
  assert content["claims"] == analysis.claims(analysis.organise(rows))
  assert content["settings"] == {"seeds": 2}
  assert content["measured"]["git"] == ["59d0d6d"]
  assert content["measured"]["cells"] == sum(r["kind"] == "cell" for r in rows)
  with open(paths["tables.md"]) as f:
    markdown = f.read()
  assert all(f"- {claim}" in markdown for claim in content["claims"])
  assert "out of \\<memory>" in markdown
  for title in content["tables"]:
    assert f"## {title}" in markdown


def test_what_json_cannot_hold_writes_nothing(tmp_path):
  with pytest.raises(ValueError, match="study.json"):
    _write(make_rows(), tmp_path, "t", {"x": float("nan")})
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
  "name", [HOSTILE, "a|`b`", "$x^$", "\x1b[2J\nerror: x"]
)
def test_any_name_of_a_task_or_model(name, tmp_path):
  rows = [
    {**row, "task": row["task"] and name, "model": name}
    for row in make_rows()
    if row["task"] in (None, "topic")
  ]
  paths = _write(rows, tmp_path, name)
  with open(paths["report.html"], encoding="utf-8") as file:
    _read(file.read())
  with open(paths["tables.md"], encoding="utf-8") as file:
    markdown = file.read()
  assert "\x1b" not in markdown and "\nerror" not in markdown
  # Of a table, each line has as many cells.
  for table in re.findall(r"(?:^\|.*\n)+", markdown, re.M):
    bars = {
      len(re.findall(r"(?<!\\)(?:\\\\)*\|", line))
      for line in table.splitlines()
    }
    assert len(bars) == 1
