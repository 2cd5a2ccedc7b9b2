"""Tables: what a row is, and what messages say of those that are none."""

import pytest

from gemma_funnel.tasks import tables


def _write(tmp_path, name, content):
  path = tmp_path / name
  data = content if isinstance(content, bytes) else content.encode()
  path.write_bytes(data)
  return str(path)


def _values(rows):
  assert not [row.fault for row in rows if row.fault]
  return [dict(row.values) for row in rows]


class TestTsv:
  def test_no_quoting_and_lines_end_at_newline_only(self, tmp_path):
    content = 'a\tb\n"x\t1\n\ny\u0085\u2028z\t"2"\n\n'
    rows = tables.read_rows(_write(tmp_path, "t.tsv", content), ["a"], True)
    assert _values(rows) == [
      {"a": '"x', "b": "1"},
      {"a": "y\u0085\u2028z", "b": '"2"'},
    ]
    assert [row.place[-6:] for row in rows] == ["line 2", "line 4"]

  def test_windows_line_ends_and_byte_order_mark(self, tmp_path):
    path = _write(tmp_path, "t.tsv", b"\xef\xbb\xbfa\tb\r\n1\t2\r\n")
    assert _values(tables.read_rows(path, ["a", "b"], True)) == [
      {"a": "1", "b": "2"}
    ]

  def test_numbers_without_header(self, tmp_path):
    path = _write(tmp_path, "t.tsv", "x\ty\n1\t2\n")
    rows = tables.read_rows(path, ["1"], False)
    assert [row.values["1"] for row in rows] == ["y", "2"]

  @pytest.mark.parametrize(("row", "count"), [("x", 1), ("x\ty\tz", 3)])
  def test_number_of_columns(self, tmp_path, row, count):
    path = _write(tmp_path, "t.tsv", f"a\tb\n1\t2\n{row}\n")
    good, bad = tables.read_rows(path, ["a"], True)
    assert not good.fault
    assert bad.fault == f"found {count} columns; expected 2"
    assert bad.place == f"{path}, line 3"


class TestCsv:
  def test_quotes_and_line_numbers(self, tmp_path):
    content = 'a,b\r\n"x, ""y""\nz",1\r\n\r\nw,2\r\n'
    rows = tables.read_rows(_write(tmp_path, "t.csv", content), ["a"], True)
    assert _values(rows) == [{"a": 'x, "y"\nz', "b": "1"}, {"a": "w", "b": "2"}]
    assert [row.place[-6:] for row in rows] == ["line 2", "line 5"]

  def test_broken_quotes(self, tmp_path):
    path = _write(tmp_path, "t.csv", 'a,b\n1,2\n"x,3\n')
    with pytest.raises(ValueError, match="t.csv, line 3: malformed CSV"):
      tables.read_rows(path, ["a"], True)


class TestJsonl:
  def test_objects(self, tmp_path):
    path = _write(tmp_path, "t.jsonl", '{"a": "x\\u0085", "b": [1]}\n\n')
    assert _values(tables.read_rows(path, ["a", "b"], True)) == [
      {"a": "x\u0085", "b": [1]}
    ]

  @pytest.mark.parametrize(
    ("line", "fault"),
    [
      ('{"a": ', "malformed JSON"),
      ("[1]", "found a JSON list; expected an object"),
      ('{"b": 1}', "no key 'a'; found the keys ['b']"),
      ("[" * 100_000, "malformed JSON"),
    ],
  )
  def test_faults(self, tmp_path, line, fault):
    path = _write(tmp_path, "t.jsonl", '{"a": 1}\n' + line + "\n")
    row = tables.read_rows(path, ["a"], True)[1]
    assert fault in row.fault
    assert row.place == f"{path}, line 2"


@pytest.mark.parametrize(
  ("content", "columns", "header", "message"),
  [
    ("a\tb\n1\t2\n", ["c"], True, r"t.tsv: no column 'c'; found \['a', 'b'\]"),
    ("a\ta\n1\t2\n", ["a"], True, "t.tsv: twice the column 'a'"),
    ("1\t2\n", ["a"], False, "t.tsv: no column 'a'.*numbers from 0"),
    ("1\t2\n", ["2"], False, "t.tsv: no column '2'"),
    (b"a\tb\n\xff\t2\n", ["a"], True, "t.tsv: not UTF-8"),
  ],
)
def test_files_that_cannot_be_read(tmp_path, content, columns, header, message):
  path = _write(tmp_path, "t.tsv", content)
  with pytest.raises(ValueError, match=message):
    tables.read_rows(path, columns, header)


def test_no_such_file_folder_or_extension(tmp_path):
  with pytest.raises(ValueError, match="none.tsv: cannot be read: No such"):
    tables.read_rows(str(tmp_path / "none.tsv"), ["a"], True)
  (tmp_path / "dir.tsv").mkdir()
  with pytest.raises(ValueError, match="dir.tsv: cannot be read"):
    tables.read_rows(str(tmp_path / "dir.tsv"), ["a"], True)
  path = _write(tmp_path, "t.parquet", "x")
  with pytest.raises(ValueError, match=r"t.parquet: .*'.parquet'; expected"):
    tables.read_rows(path, ["a"], True)


def test_labels_file(tmp_path):
  path = _write(tmp_path, "labels.txt", "b\r\na\n\n")
  assert tables.read_labels(path) == ("b", "a")
  with pytest.raises(ValueError, match="no label"):
    tables.read_labels(_write(tmp_path, "empty.txt", "\n"))
  with pytest.raises(ValueError, match="'a' occurs more than once"):
    tables.read_labels(_write(tmp_path, "twice.txt", "a\na\n"))


def test_labels_sort_as_numbers_if_all_are():
  assert tables.sorted_labels(["10", "9", "9"]) == ("9", "10")
  assert tables.sorted_labels(["10", "9", "x"]) == ("10", "9", "x")


def test_bad_rows_are_raised_or_counted(capsys):
  rows = ["1", "x", "2", "y"]
  with pytest.raises(ValueError, match="'x'"):
    tables.Bad("error").keep(rows, int, "train")
  bad = tables.Bad("skip")
  assert bad.keep(rows, int, "train") == [1, 2]
  assert bad.keep(["3"], int, "dev") == [3]
  assert bad.skipped == {"train": 2}
  said = capsys.readouterr().err
  assert said.count("\n") == 1
  assert "train: 2 malformed rows skipped" in said and "'x'" in said
  with pytest.raises(ValueError, match="on_bad='ignore'"):
    tables.Bad("ignore")
