"""Several processes as one run, on any mesh: the losses of one device alone."""

from concurrent import futures
import os
import pathlib
import random
import signal
import socket
import time

import jax
import ml_collections
import numpy as np
import pytest
import tiny_run

from gemma_funnel.parallel import processes
from gemma_funnel.parallel.mesh import AXES

pytestmark = pytest.mark.slow
STEPS = 50
FLAGS = (
  f"--config.steps={STEPS}",
  "--config.checkpoint_every=10",
  "--config.data.lanes=4",
  "--config.model.num_heads=8",
  "--config.optimizer.learning_rate=1e-2",
  "--config.log_every=10",
  # Of a gradient near zero, Adam's step would be its sign, which is noise.
  "--config.optimizer.eps=1e-3",
)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
  return tiny_run.write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def alone(source, tmp_path_factory):
  """The folder of the run of one process with one device."""
  folder = str(tmp_path_factory.mktemp("alone") / "run")
  _finish(_start(folder, source))
  return folder


@pytest.fixture(scope="module", autouse=True)
def waiting(source, tmp_path_factory):
  """A process whose coordinator is not there, and how long it takes to end.

  It does so beside the tests: it only waits.
  """
  flags = ("--coordinator=localhost:9", "--num_processes=2", "--process_id=1")
  folder = str(tmp_path_factory.mktemp("waiting"))
  begun = time.monotonic()
  process = tiny_run.start(tiny_run.command(folder, source, *flags))

  def wait():
    process.wait()
    return time.monotonic() - begun

  with futures.ThreadPoolExecutor(1) as pool:
    yield process, pool.submit(wait)
    process.kill()
    for file in process.files:
      file.close()


def _mesh(**sizes):
  sizes = {**dict.fromkeys(AXES, 1), **sizes}
  return tuple(f"--config.mesh.{axis}={n}" for axis, n in sizes.items())


def _start(folder, source, *flags, count=1, devices=1):
  """Starts all processes of a run, each with so many devices."""
  command = tiny_run.command(str(folder), source, *FLAGS, *flags)
  return tiny_run.start_all(command, count, devices)


def _finish(started, status=0):
  return [tiny_run.finish(process, status) for process in started]


def _assert_same_losses(folder, other, rtol=1e-5):
  got, want = tiny_run.train_losses(folder), tiny_run.train_losses(other)
  assert list(got) == list(want) == list(range(1, STEPS + 1))
  np.testing.assert_allclose(list(got.values()), list(want.values()), rtol=rtol)
  assert want[STEPS] < want[1] - 0.5  # It learns.


@pytest.mark.parametrize(
  "sizes",
  [
    dict(data=8),
    dict(fsdp=8),
    dict(tensor=8),
    dict(sequence=8),
    dict(fsdp=2, sequence=2, tensor=2),
    dict(slice=2, data=2, fsdp=2),
  ],
  ids=str,
)
def test_losses_are_those_of_one_device(sizes, alone, source, tmp_path):
  folder = str(tmp_path / "run")
  _finish(_start(folder, source, *_mesh(**sizes), devices=8))
  _assert_same_losses(folder, alone)


@pytest.mark.parametrize(
  ("count", "devices", "sizes"),
  [
    (2, 1, dict(data=2)),
    (4, 1, dict(fsdp=4)),
    (2, 2, dict(data=2, tensor=2)),
    # Both processes have all rows, each a part of their tokens.
    (2, 1, dict(sequence=2)),
  ],
  ids=str,
)
def test_processes_are_one_run(count, devices, sizes, alone, source, tmp_path):
  folder = str(tmp_path / "run")
  shape = dict(count=count, devices=devices)
  said = _finish(_start(folder, source, *_mesh(**sizes), **shape))
  _assert_same_losses(folder, alone)
  assert "finished" in said[0][0]
  assert not any("step" in out for out, _ in said[1:])  # One of them tells.


@pytest.mark.parametrize(
  ("before", "after"),
  [(dict(count=4), dict(count=2)), (dict(devices=8), dict(devices=4))],
  ids=str,
)
def test_a_run_goes_on_with_fewer(before, after, alone, source, tmp_path):
  folder = str(tmp_path / "run")
  mesh = lambda sizes: _mesh(fsdp=max(sizes.values()))
  started = _start(folder, source, *mesh(before), **before)
  _wait_for_step(folder, 22, started)
  started[-1].send_signal(signal.SIGTERM)  # One is told; all of them save.
  said = _finish(started)
  assert f"SIGTERM: saved {folder} at step" in said[0][0]
  said = _finish(_start(folder, source, *mesh(after), **after))
  assert f"resuming {folder} at step" in said[0][0]
  _assert_same_losses(folder, alone)


def test_a_killed_process_ends_the_run_and_it_goes_on(alone, source, tmp_path):
  folder, draw = str(tmp_path / "run"), random.Random(1)
  flags = _mesh(data=4)
  started = _start(folder, source, *flags, count=4)
  _wait_for_step(folder, 15 + draw.randrange(10), started)
  # Not process 0: without jax's coordinator jax itself aborts the others.
  lost, killed = 1 + draw.randrange(3), time.monotonic()
  gone = started.pop(lost)
  gone.kill()
  for process in started:
    assert process.wait(timeout=120) == 1
  assert time.monotonic() - killed < 45
  tiny_run.finish(gone, -signal.SIGKILL)
  for process in started:
    _, err = tiny_run.finish(process, 1)
    assert f"error: process {lost} of 4, on {socket.gethostname()}, has" in err
    assert "Traceback" not in err
  said = _finish(_start(folder, source, *flags, count=4))
  assert f"resuming {folder} at step" in said[0][0]
  _assert_same_losses(folder, alone)


def _wait_for_step(folder, step, started):
  path = pathlib.Path(folder) / "metrics.jsonl"
  deadline = time.monotonic() + 200
  while not path.exists() or path.read_text().count('"train"') < step:
    assert time.monotonic() < deadline
    for process in started:
      assert process.poll() is None, tiny_run.finish(process)
    time.sleep(0.01)


def test_a_coordinator_that_is_not_there_is_named(waiting):
  process, seconds = waiting
  _, err = tiny_run.finish(process, 1)
  assert seconds.result() < 60
  assert "error: waited 50 s for 2 processes at localhost:9" in err
  assert "process 0 is not there" in err and "Traceback" not in err


def test_configurations_that_differ_are_named(source, tmp_path):
  folder = str(tmp_path / "run")
  command = tiny_run.command(folder, source, *FLAGS, *_mesh(data=2))
  started = tiny_run.start_all(command, 2, flags=["--config.seed=5"])
  for out, err in _finish(started, 2):
    assert "step" not in out
    assert "differ in config.seed: 5 and 0" in err
    assert "process 1" in err and "process 0" in err
  assert not os.path.exists(folder)


@pytest.mark.parametrize(
  ("change", "said"),
  [
    ({"time": 300.0}, r"clocks that are \+300 s apart"),
    ({"code": "other"}, "differ in code: 'other' and"),
    ({"jax": "0.1"}, "differ in jax: '0.1' and"),
    ({"local devices": 3}, "differ in local devices: 3 and"),
  ],
  ids=str,
)
def test_hosts_that_differ_are_named(change, said, monkeypatch):
  def gather(own):
    apart, same = change.get("time", 0), own["same"] | change
    same.pop("time", None)
    return [own, dict(time=own["time"] + apart, host="other", same=same)]

  monkeypatch.setattr(processes, "gather", gather)
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  with pytest.raises(ValueError, match=f"process 1 .other. .*{said}"):
    processes.assert_same_config(ml_collections.ConfigDict({"seed": 1}))


@pytest.mark.parametrize(
  ("options", "said"),
  [
    (("on",), "--distributed='on'"),
    (("off", "a:1"), "go together"),
    (("off", "a:1", 2, 2), "--process_id=2: expected 0 to 1"),
    (("off", "a", 2, 1), "--coordinator='a': expected HOST:PORT"),
  ],
)
def test_options_that_do_not_go_together(options, said):
  with pytest.raises(ValueError, match=said):
    processes.join(*options)


def test_alone_a_process_agrees_with_itself():
  processes.join("off")
  processes.assert_same_config(ml_collections.ConfigDict({"seed": 1}))
  assert processes.gather({"x": "é"}) == [{"x": "é"}]
  assert processes.broadcast_from_host0(3) == processes.on_host0(lambda: 3) == 3
