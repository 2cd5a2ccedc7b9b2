"""Small checkpoints in every format, and what refusing one means; for tests."""

import contextlib
import functools
import json
import shutil
import signal

import numpy as np
import pytest
from safetensors.numpy import save_file
from tiny_checkpoints import GEMMA2, random_tensors, write

from gemma_funnel.convert import (
  conversion,
  detect,
  param_mapping,
  reader,
  sums,
  writer,
)
from gemma_funnel.convert.__main__ import main

FUNNEL = "start=1,stride=2,pool=attention,recover=attend"
# How it is written, of each checkpoint that `transfer` makes, by its name.
FORMATS = {
  "hf": dict(to="hf"),
  "hf shards": dict(to="hf", shards=True),
  "flat": dict(to="google"),
  "nested": dict(to="google", google_layout="nested"),
  "stacked": dict(to="google", google_layout="stacked"),
  "ckpt": dict(to="gemma_pytorch"),
  "bin": dict(to="gemma_pytorch", shards=True),
  "ours": dict(to="orbax"),
}


def make(origin, folder, to, shards=False, **options):
  with pytest.MonkeyPatch.context() as patch:
    if shards:
      patch.setattr(writer, "SHARD_BYTES", 4000)
    conversion.convert(origin, folder, to, **options)
  # Others are to find what is spoiled in it.
  (folder / sums.SUMS).unlink()


def make_learned(origin, folder):
  """A Hugging Face folder with what a funnel learned beside it."""
  shutil.copytree(origin, folder)
  raw = json.loads((folder / "config.json").read_text())
  (folder / "config.json").write_text(json.dumps({**raw, "funnel": FUNNEL}))
  config, stages = detect.read_config(detect.find(folder))
  learned = {
    tensor.name: np.ones(tensor.shape, np.float32)
    for tensor in param_mapping.learned_tensors(
      param_mapping.own_tensors(config, stages)
    )
  }
  save_file(learned, folder / detect.LEARNED)


def parameters(opened):
  """All values of a checkpoint, by our paths."""
  for path, shape in param_mapping.own_parameters(
    opened.config, opened.stages
  ).items():
    index = [slice(None)] * len(shape)
    yield path, opened.read_slice(path, index, np.dtype(np.float32))


def make_orbax(origin, folder, use_ocdbt):
  """Our tree as Orbax itself writes it: compressed, and perhaps in files."""
  import orbax.checkpoint as ocp

  tree = {}
  for (*lead, last), values in parameters(reader.open_checkpoint(origin)):
    functools.reduce(lambda t, key: t.setdefault(key, {}), lead, tree)[last] = (
      values
    )
  folder.mkdir()
  shutil.copyfile(origin / "config.json", folder / "config.json")
  with ocp.PyTreeCheckpointer(use_ocdbt=use_ocdbt) as checkpointer:
    checkpointer.save(folder / "params", tree)


def make_all(folder):
  """Checkpoints of one model, in all formats and by their names."""
  (folder / "first").mkdir()
  first = write(folder / "first", GEMMA2, random_tensors(GEMMA2))
  for name, how in FORMATS.items():
    make(first, folder / name, **how)
  make_learned(folder / "hf", folder / "learned")
  make_orbax(folder / "ours", folder / "ocdbt", True)
  make_orbax(folder / "ours", folder / "plain", False)
  for one in folder.iterdir():
    reader.open_checkpoint(one)
  return folder


def contents(folder):
  files = sorted(file for file in folder.rglob("*") if file.is_file())
  return {file: file.read_bytes() for file in files}


@contextlib.contextmanager
def bounded_time(seconds):
  """Of this process's own computing; a loop without an end is interrupted."""

  def stop(*_):
    # No TimeoutError, which is an OSError and may be expected.
    raise AssertionError("it takes too long")

  before = signal.signal(signal.SIGVTALRM, stop)
  # Again and again: where it is raised within a callback it is ignored.
  signal.setitimer(signal.ITIMER_VIRTUAL, seconds, 0.2)
  try:
    yield
  finally:
    signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    signal.signal(signal.SIGVTALRM, before)


@contextlib.contextmanager
def fails(destination, *words):
  """A ValueError with these words, and nothing new beside `destination`."""
  parent = destination.parent
  before = contents(parent)
  folders = sorted(parent.iterdir())
  with pytest.raises(ValueError) as error, bounded_time(5):
    yield
  for word in words:
    assert word in str(error.value)
  assert sorted(parent.iterdir()) == folders
  assert contents(parent) == before


def refused_by_command(capsys, *argv, words=(), status=2):
  capsys.readouterr()
  assert main([str(arg) for arg in argv]) == status
  said = capsys.readouterr()
  assert said.out == ""
  assert said.err.count("error: ") == 1 and "Traceback" not in said.err
  last = said.err[said.err.index("error: ") :]
  for word in words:
    assert word in last
