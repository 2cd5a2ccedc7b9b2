"""Reports: tables, JSON, plots, and files that are whole or not there."""

import json

import jax
import matplotlib.image
import pytest

from gemma_funnel.evaluation import report

COLUMNS = (
  report.Column("name", "name"),
  report.Column("seconds", "ms", ".1f", 1e3),
  report.Column("count", "count", "d"),
  report.Column("on", "on"),
  report.Column("error", "error"),
)
ROWS = [
  {"name": "a|b", "seconds": 0.5, "count": 12, "on": True, "hidden": [1, 2]},
  {"name": "second", "seconds": None, "count": 3, "on": False},
]


def plot(rows):
  figure = report.new_figure(3, 2)
  axes = figure.subplots()
  axes.bar([row["name"] for row in rows], [row["count"] for row in rows])
  return figure


def test_table():
  assert report.table(ROWS, COLUMNS).splitlines() == [
    "| name   |    ms | count | on  |",
    "|--------|------:|------:|-----|",
    "| a\\|b   | 500.0 |    12 | yes |",
    "| second |     - |     3 | no  |",
  ]
  # A column without values is left out until it has one.
  rows = [*ROWS, {"name": "x", "error": "out of memory"}]
  assert "| out of memory |" in report.table(rows, COLUMNS)


@pytest.mark.parametrize(
  "text, shown",
  [
    ("a|b", r"a\|b"),
    (r"a\|b", r"a\\\|b"),
    ("`x` *y*", r"\`x\` \*y\*"),
    ("</script>![a](http://b)", r"\</script>!\[a](http://b)"),
    ("a\nb\x1b[2J", r"a b\\x1b\[2J"),
    ("\ud800", r"\\ud800"),
  ],
)
def test_text_of_files_is_markdown_of_itself(text, shown):
  assert report.markdown(text) == shown
  (head, _, cell) = report.table(
    [{"x": text}], [report.Column("x", text)]
  ).splitlines()
  assert shown in head and shown in cell
  head.encode()


def test_files_and_output_agree(tmp_path, capsys):
  paths = report.write(
    tmp_path / "new" / "folder",
    "result",
    ROWS,
    COLUMNS,
    "A title",
    plot,
    settings={"seed": 3},
    notes=["a note"],
  )
  assert sorted(paths) == ["json", "md", "png"]
  with open(paths["json"]) as f:
    content = json.load(f)
  assert content["rows"] == ROWS
  assert content["settings"] == {"seed": 3}
  assert content["environment"]["jax"] == jax.__version__
  assert content["environment"]["platform"] == jax.default_backend()
  with open(paths["md"]) as f:
    markdown = f.read()
  assert markdown.startswith("# A title\n")
  assert report.table(ROWS, COLUMNS) in markdown
  assert "a note" in markdown
  assert markdown in capsys.readouterr().out
  left = {path.name for path in (tmp_path / "new" / "folder").iterdir()}
  assert left == {"result.json", "result.md", "result.png"}
  image = matplotlib.image.imread(paths["png"])
  assert image.shape[:2] == (240, 360)
  assert image[..., :3].std() > 0.05  # It shows something.
  assert "png" not in report.write(tmp_path, "x", ROWS, COLUMNS, "t")


def test_what_json_cannot_hold_writes_nothing(tmp_path):
  with pytest.raises(ValueError):
    report.write(tmp_path, "x", [{"name": float("nan")}], COLUMNS, "t", plot)
  assert not list(tmp_path.iterdir())


def test_a_plot_that_fails_leaves_the_old_one(tmp_path):
  old = report.write(tmp_path, "x", ROWS, COLUMNS, "t", plot)["png"]
  with open(old, "rb") as f:
    content = f.read()

  class Broken:
    def savefig(self, file, **kwargs):
      file.write(b"half")
      raise OSError("disk full")

  with pytest.raises(OSError, match="disk full"):
    report.write(tmp_path, "x", ROWS[:1], COLUMNS, "t", lambda rows: Broken())
  # A plot that fails costs no result.
  assert json.loads((tmp_path / "x.json").read_text())["rows"] == ROWS[:1]
  with open(old, "rb") as f:
    assert f.read() == content
  assert len(list(tmp_path.iterdir())) == 3


def test_a_place_is_tried_and_no_result_lost(tmp_path, monkeypatch, capsys):
  write = lambda task: report.write(
    tmp_path, "x", [], (), "x", settings={"task": {"test": task, "other": 1}}
  )
  claim = lambda task: report.claim(tmp_path, "x", {"task": {"test": task}})
  claim("a.tsv")
  write("a.tsv")
  claim("a.tsv")
  with pytest.raises(ValueError, match=r"x\.json is a result of another task"):
    claim("b.tsv")
  (tmp_path / "file").write_text("")
  with pytest.raises(ValueError, match="cannot be written to .*--config.out="):
    report.claim(tmp_path / "file" / "below", "x")
  full = OSError(30, "Read-only file system")
  monkeypatch.setattr(
    report.tempfile, "TemporaryFile", lambda **kw: _raise(full)
  )
  with pytest.raises(ValueError, match="Read-only file system; expected anoth"):
    claim("a.tsv")


def _raise(error):
  raise error
