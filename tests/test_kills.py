"""Runs that are killed at any moment, over and over, lose and repeat nothing.

GEMMA_FUNNEL_KILLS says how often; 30, and 5 of one of four processes, take some
ten minutes.
"""

import collections
import functools
import os
import pathlib
import random
import signal
import time

from flax import nnx
import jax
import numpy as np
import pytest
import tiny_run

from gemma_funnel import convert

pytestmark = pytest.mark.slow
KILLS = int(os.environ.get("GEMMA_FUNNEL_KILLS", "3"))
KILLED = {1: KILLS, 4: KILLS // 6}  # By the number of processes.
# As many for each life as it takes, about, so that no run is over too soon.
STEPS = {count: 20 * (kills + 2) for count, kills in KILLED.items()}
FLAGS = (
  "--config.checkpoint_every=4",
  "--config.data.lanes=4",
  "--config.log_every=1000",
  "--config.keep=2",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return tmp_path_factory.mktemp("kills")


@pytest.fixture(scope="module")
def source(folder):
  # Of a second epoch, a batch could be one of the first.
  return tiny_run.write_corpus(folder, documents=4 * max(STEPS.values()))


@pytest.fixture(scope="module", autouse=True)
def cache(folder):
  """A life begins with compiling, which the one before has done."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("JAX_COMPILATION_CACHE_DIR", str(folder / "cache"))
    patch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    yield


def _start(workdir, source, count):
  """Starts the processes of a run; each records its batches in a file."""
  command = tiny_run.command(
    str(workdir), source, *FLAGS, f"--config.steps={STEPS[count]}"
  )
  command[1] = str(tiny_run.ROOT / "tests" / "recorded_train.py")
  if count > 1:
    command.append(f"--config.mesh.data={count}")
    command.append("--config.watchdog_minutes=1")
  os.environ["RECORD"] = str(workdir)
  return tiny_run.start_all(command, count)


def _records(workdir, count):
  """How often each process had each batch."""
  return [
    collections.Counter(pathlib.Path(f"{workdir}.{i}").read_text().split())
    for i in range(count)
  ]


@pytest.fixture(scope="module")
def whole(folder, source):
  """By the number of processes, the folder of a run that nothing befell."""

  @functools.cache
  def run(count):
    done = folder / f"whole{count}"
    for process in _start(done, source, count):
      tiny_run.finish(process)
    return done

  return run


def _moment(draw, workdir):
  """Waits for a moment to kill in: starting, stepping, or saving."""
  kind = draw.choice(["start", "step", "step", "save", "save"])
  if kind == "start":
    time.sleep(draw.uniform(0, 6))
    return kind
  path = workdir / "metrics.jsonl"
  steps = lambda: path.read_text().count('"train"') if path.exists() else 0
  enough, deadline = steps() + draw.randint(5, 25), time.monotonic() + 60
  while steps() < enough and time.monotonic() < deadline:
    time.sleep(0.005)
  if kind == "save":
    saving = lambda: any((workdir / "checkpoints").glob("*.orbax*"))
    while not saving() and time.monotonic() < deadline:
      time.sleep(0.0005)
    time.sleep(draw.uniform(0, 0.05))
  else:
    time.sleep(draw.uniform(0, 0.3))
  return kind


@pytest.mark.parametrize("count", KILLED)
def test_killed_at_any_moment(count, whole, source, folder):
  kills = KILLED[count]
  if not kills:
    pytest.skip("test_processes kills one of four, once")
  workdir, draw = folder / f"cut{count}", random.Random(count)
  kinds = []
  while len(kinds) < kills:
    started = _start(workdir, source, count)
    kind = _moment(draw, workdir)
    killed = draw.choice(started)
    if killed.poll() is not None:
      break  # It was over.
    os.killpg(killed.pid, signal.SIGKILL)
    kinds.append(kind)
    # The others notice by themselves, and end.
    for process in started:
      process.wait(timeout=150)
      assert process.returncode != 0
      tiny_run.finish(process, process.returncode)
  said = [tiny_run.finish(p) for p in _start(workdir, source, count)]
  print(f"killed {len(kinds)} times: {collections.Counter(kinds)}")
  assert len(kinds) == kills, kinds
  assert "finished" in said[0][0]
  got, want = (convert.load_run(str(x)) for x in (workdir, whole(count)))
  assert got.step == want.step == STEPS[count]
  got, want = (jax.device_get(nnx.state(run.model)) for run in (got, want))
  jax.tree.map(np.testing.assert_array_equal, got, want)
  losses = tiny_run.train_losses(workdir)
  assert losses == tiny_run.train_losses(whole(count))
  assert list(losses) == list(range(1, STEPS[count] + 1))
  for cut, once in zip(
    _records(workdir, count), _records(whole(count), count), strict=True
  ):
    assert set(once.values()) == {1} and len(once) == STEPS[count]
    assert set(cut) == set(once)
