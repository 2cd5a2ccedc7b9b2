"""Tables: what a row is, and what messages say of those that are none."""

import types

import pytest

from gemma_funnel.tasks import tables


def _write(tmp_path, name, content):
  path = tmp_path / name
  data = content if isinstance(content, bytes) else content.encode()
  path.write_bytes(data)
  return str(path)


@pytest.mark.parametrize(
  ("name", "content", "values", "lines"),
  [
    # No quoting, and lines end at "\n" alone.
    (
      "tsv",
      b'a\tb\n"x\t1\n\ny\xc2\x85z\t"2"\n\n',
      ['"x 1', 'y\x85z "2"'],
      [2, 4],
    ),
    ("tsv", b"\xef\xbb\xbfa\tb\r\n1\t2\r\n", ["1 2"], [2]),
    (
      "csv",
      b'a,b\r\n"x, ""y""\nz",1\r\n\r\nw,2\r\n',
      ['x, "y"\nz 1', "w 2"],
      [2, 5],
    ),
    ("jsonl", b'{"a": "x\\u0085", "b": [1]}\n\n', ["x\x85 [1]"], [1]),
  ],
)
def test_rows(tmp_path, name, content, values, lines):
  path = _write(tmp_path, f"t.{name}", content)
  rows = tables.read_rows(path, ["a", "b"], True)
  assert not any(row.fault for row in rows)
  assert [f"{row.values['a']} {row.values['b']}" for row in rows] == values
  assert [int(row.place.split()[-1]) for row in rows] == lines


def test_numbers_without_header(tmp_path):
  path = _write(tmp_path, "t.tsv", "x\ty\n1\t2\n")
  rows = tables.read_rows(path, ["1"], False)
  assert [row.values["1"] for row in rows] == ["y", "2"]


@pytest.mark.parametrize(("row", "count"), [("x", 1), ("x\ty\tz", 3)])
def test_number_of_columns(tmp_path, row, count):
  path = _write(tmp_path, "t.tsv", f"a\tb\n1\t2\n{row}\n")
  good, bad = tables.read_rows(path, ["a"], True)
  assert not good.fault
  assert bad.fault == f"found {count} columns; expected 2"
  assert bad.place == f"{path}, line 3"


def test_a_first_row_that_is_malformed(tmp_path):
  path = _write(tmp_path, "t.tsv", "x\n1\t2\n3\t4\n")
  first, *others = tables.read_rows(path, ["0"], False)
  assert first.place == f"{path}, line 1"
  assert first.fault == "found 1 columns; expected 2"
  assert not any(row.fault for row in others)
  with pytest.raises(ValueError, match="line 1: found 1 names; expected 2"):
    tables.read_rows(path, ["x"], True)


def test_a_long_cell(tmp_path):
  text = "x" * 200_000
  path = _write(tmp_path, "t.csv", f"a,b\n{text},1\n")
  assert tables.read_rows(path, ["a"], True)[0].values["a"] == text


@pytest.mark.parametrize(
  ("line", "fault"),
  [
    ('{"a": ', "malformed JSON"),
    ("[1]", "found a JSON list; expected an object"),
    ('{"b": 1}', "no key 'a'; found the keys ['b']"),
    ("[" * 100_000, "malformed JSON"),
  ],
)
def test_faults_of_json(tmp_path, line, fault):
  path = _write(tmp_path, "t.jsonl", '{"a": 1}\n' + line + "\n")
  row = tables.read_rows(path, ["a"], True)[1]
  assert fault in row.fault
  assert row.place == f"{path}, line 2"


@pytest.mark.parametrize(
  ("name", "content", "columns", "header", "message"),
  [
    ("t.tsv", "a\tb\n1\t2\n", ["c"], True, r"no column 'c'.*\['a', 'b'\]"),
    ("t.tsv", "a\ta\n1\t2\n", ["a"], True, "twice the column 'a'"),
    ("t.tsv", "1\t2\n", ["a"], False, "no column 'a'.*numbers from 0"),
    ("t.tsv", "1\t2\n", ["2"], False, "no column '2'"),
    ("t.tsv", b"a\tb\n\xff\t2\n", ["a"], True, "not UTF-8"),
    ("t.csv", 'a,b\n1,2\n"x,3\n', ["a"], True, "line 3: malformed CSV"),
    ("t.parquet", "x", ["a"], True, "extension='.parquet'"),
    ("t.tsv", None, ["a"], True, "cannot be read: No such"),
  ],
)
def test_files_that_cannot_be_read(
  tmp_path, name, content, columns, header, message
):
  if content is not None:
    _write(tmp_path, name, content)
  with pytest.raises(ValueError, match=f"{name}.*{message}"):
    tables.read_rows(str(tmp_path / name), columns, header)


def test_labels_file(tmp_path):
  path = _write(tmp_path, "labels.txt", "b\r\na\n\n")
  assert tables.read_labels(path) == ("b", "a")
  with pytest.raises(ValueError, match="no label"):
    tables.read_labels(_write(tmp_path, "empty.txt", "\n"))
  with pytest.raises(ValueError, match="'a' occurs twice"):
    tables.read_labels(_write(tmp_path, "twice.txt", "a\na\n"))


def test_labels_sort_as_numbers_if_all_are():
  assert tables.sorted_labels(["10", "9", "9"]) == ("9", "10")
  assert tables.sorted_labels(["10", "9", "x"]) == ("10", "9", "x")


def test_bad_rows_are_raised_or_counted(capsys):
  rows = [tables.Row(f"row {v}", {}, "faulty" * (v == "y")) for v in "1x2y"]

  def make(on_bad, **rows):
    config = types.SimpleNamespace(name="", on_bad=on_bad)
    parse = lambda row: int(row.place[4:])
    return tables.make_task(config, "perplexity", (), (), rows, parse)

  with pytest.raises(ValueError, match="row x: invalid literal.*'x'"):
    make("error", train=rows)
  with pytest.raises(ValueError, match="row y: faulty"):
    make("error", train=rows[3:])
  task = make("skip", train=rows, dev=rows[:1])
  assert task.splits == {"train": [1, 2], "dev": [1]}
  assert task.skipped == {"train": 2}
  said = capsys.readouterr().err
  assert said.count("\n") == 1
  assert "train: 2 malformed rows skipped" in said and "'x'" in said
