"""Sums of converted checkpoints: what is read is what was written."""

import os

from made_checkpoints import FORMATS, bounded_time
import pytest

import gemma_funnel
from gemma_funnel.convert import conversion
from gemma_funnel.convert.__main__ import main
from gemma_funnel.convert.sums import SUMS


@pytest.fixture(
  scope="module", params=["hf", "google", "gemma_pytorch", "orbax"]
)
def written(request, made, tmp_path_factory):
  folder = tmp_path_factory.mktemp("sums") / request.param
  conversion.convert(made / "hf", folder, request.param)
  return folder


def _files(folder):
  edited = ("config.json", "gemma_funnel.json", SUMS)
  return [
    file
    for file in sorted(folder.rglob("*"))
    if file.is_file() and file.name not in edited
  ]


def _flip(file):
  data = bytearray(file.read_bytes())
  data[len(data) // 2] ^= 1
  file.write_bytes(data)


def _cut(file):
  file.write_bytes(file.read_bytes()[:-1])


@pytest.mark.parametrize("damage", [_flip, _cut, os.unlink])
def test_damage_of_any_file_is_named(written, damage):
  for file in _files(written)[:: 1 if damage is _flip else 5]:
    before = file.read_bytes()
    if file.name == "_METADATA" and damage is os.unlink:
      continue  # Without it, it is no checkpoint that is known.
    damage(file)
    said = f"{file.relative_to(written)} (has|is missing).*remove {SUMS}"
    with pytest.raises(ValueError, match=said):
      gemma_funnel.load(written)
    file.write_bytes(before)
  gemma_funnel.load(written)


def test_sums_that_are_none(written, tmp_path):
  before = (written / SUMS).read_text()
  for text, said in (
    ("[]", "expected an object"),
    ('{"../x": [1, 2]}', "names a file out of its folder"),
    ('{"/etc/hosts": [1, 2]}', "names a file out of its folder"),
    ('{"x": [1, 2]}', "x is missing"),
  ):
    (written / SUMS).write_text(text)
    with pytest.raises(ValueError, match=said):
      gemma_funnel.load(written)
  (written / SUMS).unlink()
  gemma_funnel.load(written)
  (written / SUMS).write_text(before)


def test_verify_reads_what_was_written(made, tmp_path, monkeypatch, capsys):
  write = conversion.write

  def spoil(source, spec, destination, progress):
    write(source, spec, destination, progress)
    _flip(_files(tmp_path / "dst")[-1])

  monkeypatch.setattr(conversion, "write", spoil)
  destination = str(tmp_path / "dst")
  assert main([str(made / "hf"), destination, "--to=hf", "--verify"]) == 2
  assert "is damaged, or was written to after" in capsys.readouterr().err


@pytest.mark.parametrize("name", FORMATS)
def test_a_file_that_would_be_waited_for(copy, name):
  folder = copy(name)
  for file in _files(folder):
    before = file.read_bytes()
    file.unlink()
    os.mkfifo(file)
    with bounded_time(20):
      try:
        gemma_funnel.load(folder)
      except ValueError as error:
        assert "\n" not in str(error)
    file.unlink()
    file.write_bytes(before)
