"""Files are whole or not there, whatever ends their writing."""

import pathlib

import pytest

from gemma_funnel import atomic


@pytest.mark.parametrize("old", [None, "before"])
@pytest.mark.parametrize("method", ["write_text", "replace"])
def test_a_write_that_fails_leaves_the_old_file(
  tmp_path, monkeypatch, old, method
):
  path = tmp_path / "file.txt"
  if old is not None:
    atomic.write_text(path, old)

  def fail(self, *args):
    pathlib.Path(self).write_bytes(b"half")
    raise OSError("killed")

  with monkeypatch.context() as patch:
    patch.setattr(type(atomic.epath.Path(path)), method, fail)
    with pytest.raises(OSError, match="killed"):
      atomic.write_text(path, "after")
  assert [p.name for p in tmp_path.iterdir()] == ["file.txt"][: old is not None]
  assert old is None or path.read_text() == old
  atomic.write_text(path, "äfter")
  assert path.read_text(encoding="utf-8") == "äfter"
  atomic.write_bytes(path, b"\0")
  assert path.read_bytes() == b"\0"
