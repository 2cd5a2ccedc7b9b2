"""results.jsonl: what is kept whatever is killed, and what is left out."""

import json
import os
import subprocess
import sys

import pytest
import tiny_run
import tiny_study

from gemma_funnel.study import results


def _row(hash_, kind="cell", **changes):
  more = dict(error="why") if kind == "failure" else dict(value=0.5)
  more |= dict(hash=hash_) | changes
  return tiny_study.make_row(kind, "topic", 0) | more


def _hashes(folder):
  return [line["hash"] for line in results.Results(folder).lines]


def test_lines_of_results(tmp_path, capsys):
  made = results.Results(tmp_path)
  assert made.lines == []
  made.add(_row("a"))
  made.add(_row("b", "failure"))
  assert made.hashes("cell") == {"a"}
  path = tmp_path / results.RESULTS
  whole = path.read_text()
  for cut, left in ((0, 2), (1, 2), (2, 1), (20, 1)):
    path.write_text(whole[: len(whole) - cut])
    found = results.Results(tmp_path)
    assert [x["hash"] for x in found.lines] == ["a", "b"][:left]
    # What is only read is not touched.
    assert path.read_text() == whole[: len(whole) - cut]
    told = capsys.readouterr().err
    assert (f"{path}, line 2: " in told) == (left == 1)
    found.add(_row("c"))
    assert _hashes(tmp_path) == [*["a", "b"][:left], "c"]
    assert capsys.readouterr().err == ""


BAD = {
  "a bad byte": b'{"kind": "cell", "hash": "x\xff"}',
  "a number": b"1",
  "null": b"null",
  "no key": b"{}",
  "a list": b"[]",
  "not a line of JSON": b'{"kind": "cell"',
  "deep": b'{"kind":' * 100_000,
  "misspelt": json.dumps({"knid": "cell", "hash": "x"}).encode(),
  **{
    f"{key}={value!r}": json.dumps(_row("x", **{key: value})).encode()
    for key, value in (
      *(
        ("value", 1e308),
        ("value", "0.5"),
        ("value", float("nan")),
        ("value", None),
      ),
      *(("funnel", 5), ("hash", []), ("hash", {}), ("metric", ["a"])),
      *(("model", None), ("seed", "0"), ("seed", [])),
      *(("start", "1"), ("higher_is_better", "yes"), ("kind", [])),
      *(("latency_s", float("inf")), ("reduction", "x"), ("task", 1)),
    )
  },
  "no value": json.dumps(
    {k if k != "value" else "valeu": v for k, v in _row("x").items()}
  ).encode(),
  "layers": json.dumps(
    tiny_study.make_row("similarity", None, 0, layers=[{"layer": 1}])
  ).encode(),
}


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("line", BAD.values(), ids=BAD)
def test_a_line_that_is_no_result_is_named_and_dropped(
  line, place, tmp_path, capsys
):
  path = tmp_path / results.RESULTS
  lines = [json.dumps(_row(hash_)).encode() for hash_ in "ab"]
  lines.insert(place, line)
  path.write_bytes(b"\n".join(lines) + b"\n")
  found = results.Results(tmp_path)
  assert [x["hash"] for x in found.lines] == ["a", "b"]
  (told,) = capsys.readouterr().err.splitlines()
  assert f"{path}, line {place + 1}: " in told and len(told) < 2100
  found.add(_row("c"))
  assert _hashes(tmp_path) == ["a", "b", "c"]
  assert capsys.readouterr().err == ""


def test_a_file_that_is_none_is_named(tmp_path):
  (tmp_path / results.RESULTS).mkdir()
  with pytest.raises(ValueError, match="results.jsonl is a folder"):
    results.Results(tmp_path)


_KILLS = """
import os, sys
import gemma_funnel.study.results as results
from etils import epath

folder, row = sys.argv[1], {row!r}
path = os.path.join(folder, results.RESULTS)
content = open(path, "rb").read()
kind = type(epath.Path("/"))
for kill in range(10):
  with open(path, "wb") as file:
    file.write(content)
  if not (pid := os.fork()):
    if kill % 2:
      # Between the write and the rename.
      kind.replace = lambda *args: os._exit(9)
    else:
      # In the middle of the write.
      def cut(self, data):
        with open(self, "wb") as file:
          file.write(data[: len(data) * kill // 10])
        os._exit(9)
      kind.write_bytes = cut
    results.Results(folder).add(row)
    os._exit(1)  # Nothing was rewritten.
  assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9
  kept = results.Results(folder).lines
  assert [x["hash"] for x in kept] == list("abcd"), kept
results.Results(folder).add(row)
assert [x["hash"] for x in results.Results(folder).lines] == list("abcde")
"""


def test_kills_amid_a_repair_lose_no_result(tmp_path):
  made = results.Results(tmp_path)
  for hash_ in "abcd":
    made.add(_row(hash_))
  path = tmp_path / results.RESULTS
  path.write_bytes(path.read_bytes() + b'{"kind": "cell", "ha')
  script = _KILLS.format(row=_row("e"))
  command = [sys.executable, "-c", script, str(tmp_path)]
  subprocess.run(command, check=True, cwd=tiny_run.ROOT, timeout=300)


def test_a_full_disk_leaves_whole_lines(tmp_path, monkeypatch):
  made = results.Results(tmp_path)
  made.add(_row("a"))
  before = (tmp_path / results.RESULTS).read_bytes()

  def full(descriptor):
    raise OSError(28, os.strerror(28))

  with monkeypatch.context() as patch:
    patch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
      made.add(_row("b"))
  assert (tmp_path / results.RESULTS).read_bytes() == before
  made.add(_row("b"))
  assert _hashes(tmp_path) == ["a", "b"]


def test_values_that_are_no_json_are_not_written(tmp_path):
  made = results.Results(tmp_path)
  with pytest.raises(ValueError, match="not JSON compliant"):
    made.add({"value": float("nan")})
  assert made.lines == [] and not (tmp_path / results.RESULTS).exists()


@pytest.mark.parametrize("name", ["study", "study_quick"])
def test_published_results_are_whole(name, capsys):
  folder = tiny_run.ROOT / "docs" / name
  text = (folder / results.RESULTS).read_text()
  assert len(results.Results(folder).lines) == text.count("\n")
  assert not capsys.readouterr().err
