"""Conversions that cannot be written, or do not end: nothing half-written."""

import contextlib
import errno
import json
import os
import pathlib
import resource
import shutil
import subprocess
import sys
import tempfile

from made_checkpoints import contents, fails, parameters, refused_by_command
import numpy as np
import pytest
import tiny_run

import gemma_funnel
from gemma_funnel import locks
from gemma_funnel.convert import (
  conversion,
  detect,
  orbax_tree,
  reader,
  safetensors_file,
  torch_file,
  writer,
)
from gemma_funnel.convert.__main__ import main

WRITERS = {
  "orbax": orbax_tree.OrbaxWriter,
  "hf": safetensors_file.SafetensorsWriter,
  "gemma_pytorch": torch_file.TorchWriter,
}


# Destinations that cannot be written.


@pytest.mark.parametrize("to", writer.FORMATS)
def test_too_little_space_is_known_before(
  made, tmp_path, monkeypatch, capsys, to
):
  usage = shutil.disk_usage(tmp_path)
  little = lambda path: usage._replace(free=1000)
  monkeypatch.setattr(shutil, "disk_usage", little)
  # That nothing is written, not even for a moment.
  monkeypatch.setattr(conversion, "write", None)
  destination = tmp_path / "new" / "dst"
  words = (str(destination), "needs", "has 1,000 free")
  with fails(tmp_path / "dst", *words):
    conversion.convert(made / "hf", destination, to)
  argv = (made / "hf", destination, f"--to={to}")
  refused_by_command(capsys, *argv, words=words)
  assert not destination.parent.exists()


@pytest.mark.parametrize("to", WRITERS)
@pytest.mark.parametrize("after", [0, 1, 20])
def test_no_space_left_midway(made, tmp_path, monkeypatch, capsys, to, after):
  write_block, left = WRITERS[to].write, [after]

  def full(*args):
    if not left[0]:
      raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    left[0] -= 1
    write_block(*args)

  monkeypatch.setattr(WRITERS[to], "write", full)
  words = (str(tmp_path / "dst"), "cannot be written", "No space left")
  with fails(tmp_path / "dst", *words):
    conversion.convert(made / "hf", tmp_path / "dst", to)
  left[0] = after
  argv = (made / "hf", tmp_path / "dst", f"--to={to}")
  refused_by_command(capsys, *argv, words=words, status=1)
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("to", writer.FORMATS)
@pytest.mark.parametrize("size", [0, 300, 900])
def test_a_real_limit_of_what_can_be_written(made, tmp_path, to, size):
  """Of the size of files, which the system holds TensorStore to as well."""
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  opened = reader.open_checkpoint(made / "hf")
  plan = conversion.spec_for(opened, to)
  resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
  try:
    with pytest.raises(ValueError, match="dst cannot be written: .*too large"):
      conversion.write(opened, plan, tmp_path / "dst")
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
  assert not list(tmp_path.iterdir())


def test_a_limit_that_only_torch_save_meets(made, tmp_path):
  """Its file is larger than the tensors that it is made of."""
  opened = reader.open_checkpoint(made / "hf")
  spec = conversion.spec_for(opened, "gemma_pytorch")
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (spec.nbytes, hard))
  try:
    with pytest.raises(ValueError, match="dst cannot be written: "):
      conversion.write(opened, spec, tmp_path / "dst")
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("to", writer.FORMATS)
def test_a_destination_that_is_in_the_way(made, tmp_path, capsys, to):
  (tmp_path / "file").write_text("mine")
  (tmp_path / "full").mkdir()
  (tmp_path / "full" / "file").write_text("mine")
  (tmp_path / "thesis").mkdir()
  (tmp_path / "thesis" / detect.UNFINISHED).write_text("mine")
  (tmp_path / "empty").mkdir()
  (tmp_path / "link").symlink_to("empty")
  (tmp_path / "nowhere").symlink_to("none")
  long = "a" * 300
  for name, words in [
    ("file", "exists"),
    ("full", "exists"),
    ("file/dst", "is no folder"),
    ("file/new/dst", "is no folder"),
    ("thesis", "exists"),
    ("link", "exists"),
    ("nowhere", "exists"),
    (long, "too long"),
  ]:
    with fails(tmp_path / "dst", str(tmp_path / name), words):
      conversion.convert(made / "hf", tmp_path / name, to)
    argv = (made / "hf", tmp_path / name, f"--to={to}")
    refused_by_command(capsys, *argv, words=(words,))
  source_folder = made / "hf"
  with fails(source_folder / "dst", "within the source"):
    conversion.convert(source_folder, source_folder / "dst", to)


def _killed_note(path, **facts):
  path.with_name(f".{path.name}.lock").write_text(json.dumps(facts))


@pytest.mark.parametrize(
  "name", ["mine", "../mine", "dst.partial", "dst.0.partial", 3, None]
)
def test_nothing_goes_that_is_not_known_for_ours(made, tmp_path, name):
  """Whatever a lock file says, and whatever a folder is called."""
  for folder in ("mine", "work/mine", "work/dst.partial", "work/dst.0.partial"):
    (tmp_path / folder).mkdir(parents=True)
    (tmp_path / folder / detect.UNFINISHED).write_text("mine")
  destination = tmp_path / "work" / "dst"
  before = contents(tmp_path)
  _killed_note(destination, partial=name)
  conversion.convert(made / "hf", destination, "orbax")
  shutil.rmtree(destination)
  assert contents(tmp_path) == before


@contextlib.contextmanager
def permissions_count():
  """For root they do not: it is nobody for a while."""
  root = os.geteuid() == 0
  if root:
    os.seteuid(65534)
  try:
    yield
  finally:
    if root:
      os.seteuid(0)


@pytest.mark.parametrize("mode", [0o555, 0o444, 0o000])
def test_permissions(made, capsys, mode):
  # Not below tmp_path, which nobody else can enter.
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    folder.chmod(0o777)
    shutil.copytree(made / "hf", folder / "src")
    guarded = folder / "guarded"
    conversion.convert(folder / "src", guarded / "sound", "orbax")
    guarded.chmod(mode)
    try:
      with permissions_count():
        argv = (folder / "src", guarded / "dst", "--to=hf")
        refused_by_command(capsys, *argv, words=("dst", "Permission denied"))
        if mode != 0o555:
          argv = (guarded / "sound", folder / "dst", "--to=hf")
          refused_by_command(capsys, *argv, words=("sound", "Permission"))
    finally:
      guarded.chmod(0o755)
    assert sorted(os.listdir(folder)) == ["guarded", "src"]
    assert os.listdir(guarded) == ["sound"]


# Conversions that do not end.


def partial_in(folder):
  """What a killed conversion left beside its lock."""
  (partial,) = (path for path in folder.iterdir() if path.suffix != ".lock")
  return partial


def partial_is_no_checkpoint(folder):
  """Neither what a killed conversion leaves nor anything within it loads."""
  partial = partial_in(folder)
  for path in [partial, *partial.rglob("*")]:
    with pytest.raises(ValueError):
      gemma_funnel.load(path)


def rerun(origin, folder, to):
  conversion.convert(origin, folder / "dst", to)
  assert os.listdir(folder) == ["dst"]
  found = dict(parameters(reader.open_checkpoint(folder / "dst")))
  for path, values in parameters(reader.open_checkpoint(origin)):
    np.testing.assert_array_equal(found[path], values)


# Stops for ever in the midst of a tensor, or when all is written.
STALL = """
import os, sys, time
from gemma_funnel.convert import writer, conversion
from gemma_funnel.convert.__main__ import main

origin, destination, to = sys.argv[1:]
writer.SHARD_BYTES = 4000
left = 15

def read(*args, read=conversion._read):
  global left
  left -= 1
  if left < 0:
    os.write(1, b"midway\\n")
    time.sleep(1000)
  return read(*args)

conversion._read = read
main([origin, destination, "--to=" + to])
"""


def test_a_conversion_that_is_killed(made, tmp_path):
  running = {}
  before = contents(made / "hf")
  try:
    for to in writer.FORMATS:
      (tmp_path / to).mkdir()
      argv = [str(made / "hf"), str(tmp_path / to / "dst"), to]
      running[to] = subprocess.Popen(
        [sys.executable, "-c", STALL, *argv],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
      )
    for process in running.values():
      assert process.stdout.readline() == "midway\n"
  finally:
    for process in running.values():
      process.kill()
      process.communicate()
  assert contents(made / "hf") == before
  for to in writer.FORMATS:
    assert (partial_in(tmp_path / to) / detect.UNFINISHED).exists()
    partial_is_no_checkpoint(tmp_path / to)
    rerun(made / "hf", tmp_path / to, to)


@pytest.mark.parametrize("to", writer.FORMATS)
@pytest.mark.parametrize("shards", [False, True])
def test_what_is_left_at_any_moment(made, tmp_path, monkeypatch, to, shards):
  """As if it were killed: nothing is tidied up."""
  if shards:
    monkeypatch.setattr(writer, "SHARD_BYTES", 4000)
  opened = reader.open_checkpoint(made / "hf")
  plan = conversion.spec_for(opened, to)
  unlink = pathlib.Path.unlink
  for moment in (1, 12, 25, None):
    left, before = [moment], list(tmp_path.iterdir())

    def leave(lock, *_):  # As the kernel does.
      os.close(lock._descriptor)

    def rmtree_of_others(path, rmtree=shutil.rmtree, before=before, **keywords):
      if path in before:
        rmtree(path, **keywords)

    def stop(*_, left=left):
      left[0] = (left[0] or 0) - 1
      if left[0] <= 0:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
      patch.setattr(shutil, "rmtree", rmtree_of_others)
      patch.setattr(locks.Lock, "__exit__", leave)
      if moment is None:
        patch.setattr(pathlib.Path, "unlink", stop)
      with pytest.raises(KeyboardInterrupt):
        progress = (lambda *_: None) if moment is None else stop
        conversion.write(opened, plan, tmp_path / "dst", progress)
    assert pathlib.Path.unlink is unlink
    # That of the one before is gone. The last moment is after the renaming.
    partial_is_no_checkpoint(tmp_path)
    assert (tmp_path / "dst").exists() == (moment is None)
  rerun(made / "hf", tmp_path, to)


@pytest.mark.parametrize("to", writer.FORMATS)
def test_a_conversion_that_is_interrupted(made, tmp_path, monkeypatch, to):
  before = contents(made / "hf")
  opened = reader.open_checkpoint(made / "hf")
  plan = conversion.spec_for(opened, to)
  for moment in (0, 1, 12, 25):
    left = [moment]

    def stop(*_, left=left):
      left[0] -= 1
      if left[0] < 0:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
      conversion.write(opened, plan, tmp_path / "dst", stop)
    assert not os.listdir(tmp_path)
  assert contents(made / "hf") == before

  def interrupt(*_):
    raise KeyboardInterrupt

  with monkeypatch.context() as patch:
    patch.setattr(conversion, "_read", interrupt)
    argv = [str(made / "hf"), str(tmp_path / "dst"), f"--to={to}"]
    assert main(argv) == 130
  assert not os.listdir(tmp_path)
  rerun(made / "hf", tmp_path, to)


def test_a_full_disk_is_one_line_and_training_goes_on(tmp_path):
  """A real one, small; at several stages of a run."""
  disk = tmp_path / "disk"
  disk.mkdir()
  size = lambda size, *more: (
    subprocess.run(
      [
        "mount",
        "-t",
        "tmpfs",
        "-o",
        ",".join([f"size={size}", *more]),
        "x",
        disk,
      ],
      capture_output=True,
    ).returncode
  )
  if size("1m"):
    pytest.skip("mounting is not allowed")
  try:
    source = tiny_run.write_corpus(tmp_path)
    args = tiny_run.command(str(disk / "run"), source)
    for room in ("40k", "300k", "900k"):
      size(room, "remount")
      _, err = tiny_run.finish(tiny_run.start(args), 1)
      # A line of a log may be cut, which the next start tells.
      lines = [x for x in err.splitlines() if "is dropped" not in x]
      assert len(lines) == 1, err
      assert lines[0].startswith(f"error: {disk}"), err
      assert "No space left on device" in lines[0]
    size("100m", "remount")
    tiny_run.finish(tiny_run.start(args))
  finally:
    subprocess.run(["umount", disk])
