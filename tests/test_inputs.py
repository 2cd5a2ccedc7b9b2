"""Bounds of files that others wrote, and their fingerprints."""

import os

import pytest

from gemma_funnel import cli, inputs


def test_what_is_no_file_is_refused_at_once(tmp_path):
  os.mkfifo(tmp_path / "fifo")
  (tmp_path / "zero").symlink_to("/dev/zero")
  for name, kind in (("fifo", "FIFO"), ("zero", "device"), (".", "folder")):
    with pytest.raises(ValueError, match=f"{name}.* is a {kind}"):
      inputs.read_bytes(tmp_path / name if name != "." else "/", 10)
  with pytest.raises(ValueError, match="No such file"):
    inputs.read_bytes(tmp_path / "none", 10)


def test_size_is_bounded(tmp_path):
  path = tmp_path / "a"
  path.write_bytes(b"12345")
  (tmp_path / "link").symlink_to(path)
  assert inputs.read_bytes(tmp_path / "link", 5) == b"12345"
  with pytest.raises(ValueError, match="5 bytes: expected at most 4"):
    inputs.read_bytes(path, 4)
  # A file whose size is not what it gives.
  with pytest.raises(ValueError, match="more than 3 bytes"):
    inputs.read_bytes("/proc/self/status", 3)


@pytest.mark.parametrize(
  "bad", [b"1", b"[]", b"{", b'{"a": "\xff"}', b"null", b"[" * 100_000]
)
def test_bad_lines_are_told_and_left_out(bad):
  told = []
  content = b'{"a": 1}\n' + bad + b'\n\n{"a": 2}\n'
  records = inputs.parse_json_lines(content, lambda *x: told.append(x))
  assert records == [{"a": 1}, {"a": 2}]
  assert [number for number, _ in told] == [2]


def test_fingerprint_tells_content(tmp_path, monkeypatch):
  path = tmp_path / "a"
  path.write_bytes(b"x" * 5000)
  before = inputs.fingerprint(path)
  os.utime(path, (0, 0))
  assert inputs.fingerprint(path) == before
  path.write_bytes(b"x" * 4999 + b"y")
  assert inputs.fingerprint(path) != before
  # Of a larger file, the ends at least.
  monkeypatch.setattr(inputs, "_PART_BYTES", 10)
  parts = inputs.fingerprint(path)
  assert "parts" in parts
  for at in (0, 4999):
    changed = bytearray(path.read_bytes())
    changed[at] ^= 1
    (tmp_path / "b").write_bytes(changed)
    assert inputs.fingerprint(tmp_path / "b") != parts


def test_changes_are_named_and_can_be_accepted(capsys):
  kept = {"same": "1", "other": "1", "lost": "1"}
  found = {"same": "1", "other": "2", "more": "1"}
  with pytest.raises(ValueError) as error:
    inputs.require_unchanged("the run", kept, found)
  for part in ("lost (gone)", "more (new)", "other (changed)"):
    assert part in str(error.value)
  assert "same" not in str(error.value)
  inputs.require_unchanged("the run", kept, found, accept=True)
  assert "lost (gone)" in capsys.readouterr().err


def test_text_of_files_moves_no_cursor():
  text = cli.clean("a\nerror: all is well\x1b[2J\x9b\u202e\u2028b\ud800")
  assert text == "a error: all is well\\x1b[2J\\x9b\\u202e b\\ud800"
  assert len(cli.clean("x" * 5_000_000)) < 2100
