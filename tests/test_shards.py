"""Shards and workers: one order, whoever reads it; nobody is left behind."""

import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import grain
import numpy as np
import pytest

from gemma_funnel.data import shards as shards_lib
from gemma_funnel.data import workers
from gemma_funnel.data.shards import VirtualShards, merge_states

SHARDS = 12


def _numbered(shard):
  """Rows that say which shard they are of, and which row of it."""
  count = grain.MapDataset.range(10**6).to_iter_dataset(
    grain.ReadOptions(num_threads=0)
  )
  return count.map(lambda i: {"row": np.asarray([shard, i])})


def _broken(shard):
  def check(row):
    if row["row"][1] == 3:
      raise ValueError("corpus.jsonl, line 4: malformed JSON")
    return row

  return _numbered(shard).map(check)


def _slow(shard):
  def sleep(row):
    pathlib.Path(os.environ["SLEEPING"]).touch()
    time.sleep(600)
    return row

  return _numbered(shard).map(sleep)


def _killed(shard):
  return _numbered(shard).map(lambda _: os.kill(os.getpid(), signal.SIGKILL))


@pytest.fixture
def make():
  made = []

  def make_iterator(make_shard=_numbered, **changes):
    made.append(
      VirtualShards(
        make_shard, **{"num_shards": SHARDS, "batch_size": 12, **changes}
      )
    )
    return made[-1]

  yield make_iterator
  for iterator in made:
    iterator.close()


def _rows_of_run(processes, batch_size, rows):
  """A batch of the whole run from its processes' parts, in order."""
  parts = [iter(next(process)["row"].tolist()) for process in processes]
  order = range(rows, rows + batch_size)
  found = [tuple(next(parts[g % len(parts)])) for g in order]
  assert not any(list(part) for part in parts)
  return found


def test_row_g_is_of_shard_g_modulo_shards(make):
  found = [tuple(r) for _ in range(3) for r in next(make())["row"].tolist()]
  assert found[:12] == [(g, 0) for g in range(12)]
  iterator = make(batch_size=5)
  found = [tuple(r) for _ in range(7) for r in next(iterator)["row"].tolist()]
  assert found == [(g % 12, g // 12) for g in range(35)]


@pytest.mark.parametrize("seed", range(8))
def test_any_change_gives_the_rows_that_would_have_come(make, seed):
  draw = random.Random(seed)
  rows, state = [], None
  for _ in range(8):
    count = draw.choice([1, 2, 3, 4, 6, 12])
    size = count * draw.randint(1, 7)
    processes = [
      make(batch_size=size, process_index=p, process_count=count)
      for p in range(count)
    ]
    for process in processes:
      if state is not None:
        process.set_state(json.loads(json.dumps(state)))
    for _ in range(draw.randint(0, 5)):
      rows += _rows_of_run(processes, size, len(rows))
    states = [process.get_state() for process in processes]
    draw.shuffle(states)
    state = merge_states(states)
  assert rows == [(g % SHARDS, g // SHARDS) for g in range(len(rows))]
  assert state["rows"] == len(rows) > 50
  assert list(state["lanes"]) == [str(shard) for shard in range(SHARDS)]


def test_a_process_reads_its_shards_alone():
  asked = []

  def spy(shard):
    asked.append(shard)
    return _numbered(shard)

  iterator = VirtualShards(
    spy, num_shards=12, batch_size=24, process_index=1, process_count=4
  )
  next(iterator)
  assert sorted(asked) == [1, 5, 9]
  assert set(iterator.get_state()["lanes"]) == {"1", "5", "9"}


def test_workers_come_and_go(make):
  iterator = make(batch_size=5)
  rows = _rows_of_run([iterator], 5, 0)
  state = json.loads(json.dumps(iterator.get_state()))
  iterator = make(num_workers=2, batch_size=7)
  iterator.set_state(state)
  for _ in range(5):
    rows += _rows_of_run([iterator], 7, len(rows))
  state = json.loads(json.dumps(iterator.get_state()))
  processes = [
    make(batch_size=4, process_index=p, process_count=2) for p in range(2)
  ]
  for process in processes:
    process.set_state(state)
  rows += _rows_of_run(processes, 4, len(rows))
  assert rows == [(g % SHARDS, g // SHARDS) for g in range(44)]


def test_the_state_of_nothing_read_yet(make):
  states = [make(num_workers=2).get_state(), make().get_state()]
  assert states[0] == states[1]
  assert states[0]["rows"] == 0 and len(states[0]["lanes"]) == SHARDS


class TestErrors:
  @pytest.mark.parametrize("num_workers", [0, 1])
  def test_of_reading_come_as_they_are(self, make, num_workers):
    iterator = make(
      _broken, num_shards=2, batch_size=1, num_workers=num_workers
    )
    for _ in range(6):
      next(iterator)
    with pytest.raises(ValueError, match="corpus.jsonl, line 4: malf") as error:
      next(iterator)
    if num_workers:
      assert "test_shards.py" in "".join(error.value.__notes__)

  def test_a_killed_worker(self, make):
    iterator = make(_killed, num_shards=1, num_workers=1)
    with pytest.raises(RuntimeError, match="worker process 0 of .* code -9"):
      next(iterator)

  @pytest.mark.parametrize(
    ("changes", "message"),
    [
      (
        dict(num_shards=10, process_count=4),
        "data.lanes=10 with 4 processes: exp",
      ),
      (
        dict(batch_size=10, process_count=4),
        "batch_size=10 with 4 processes: expected a multiple",
      ),
      (
        dict(num_workers=5, process_count=3),
        "data.num_workers=5 with data.lanes=12 and 3 .* at most 4 workers",
      ),
    ],
  )
  def test_numbers_that_do_not_fit(self, make, changes, message):
    with pytest.raises(ValueError, match=message):
      make(**changes)

  def test_closed(self, make):
    iterator = make()
    iterator.close()
    with pytest.raises(ValueError, match="closed"):
      next(iterator)

  @pytest.mark.parametrize("count", [6, 24])
  def test_a_state_of_other_shards(self, make, count):
    state = make(num_shards=count, batch_size=24).get_state()
    message = f"the lanes 0, 1, .*{count - 1}; data.lanes=12 and process 0"
    with pytest.raises(ValueError, match=message):
      make().set_state(state)

  def test_a_state_of_another_process(self, make):
    state = make(process_index=1, process_count=2).get_state()
    with pytest.raises(
      ValueError, match="1, 3, .* 11; data.* need 0, 1, .., 11"
    ):
      make().set_state(state)
    make(process_index=1, process_count=2).set_state(state)

  @pytest.mark.parametrize(
    "state",
    [
      {},
      [],
      {"rows": 3},
      {"parent": {"next_index": 3}, "next_row": 1},  # Grain's own.
      {"rows": "3", "lanes": {"0": {}}},
      {"rows": -1, "lanes": {"0": {}}},
      {"rows": 1, "lanes": {}},
      {"rows": 1, "lanes": {"a": {}}},
      {"rows": 1, "lanes": [1]},
    ],
  )
  def test_no_state(self, state):
    with pytest.raises(ValueError, match="the state of the data has"):
      shards_lib.check_state(state)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (lambda a, b, c: [], "no states of the data"),
    (lambda a, b, c: [a, b | {"rows": 12}, c], "after 0 and 12 rows"),
    (lambda a, b, c: [a, b, c, b], "two states .* 1, 4, 7, 10; exp"),
    (lambda a, b, c: [a, c], "no state .* 1, 4, 7, 10; exp"),
  ],
)
def test_states_that_do_not_merge(make, change, message):
  states = [
    make(process_index=p, process_count=3).get_state() for p in range(3)
  ]
  with pytest.raises(ValueError, match=message):
    merge_states(change(*states))


# What a trainer does, but that its worker never has a row ready.
_TRAINER = """
import multiprocessing, sys, threading
sys.path.insert(0, {tests!r})
from gemma_funnel.data.shards import VirtualShards
import test_shards

if __name__ == "__main__":
  iterator = VirtualShards(
    test_shards._slow, num_shards=1, batch_size=1, num_workers=1
  )
  iterator.start_prefetch()
  print(multiprocessing.active_children()[0].pid, flush=True)
  next(iterator)
"""


def _is_alive(pid):
  try:
    status = pathlib.Path(f"/proc/{pid}/stat").read_text()
  except OSError:
    return False
  return status.rpartition(")")[2].split()[0] != "Z"


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_workers_end_with_a_killed_trainer(tmp_path):
  script = tmp_path / "trainer.py"
  folder = os.path.dirname(__file__)
  script.write_text(_TRAINER.format(tests=folder))
  sleeping = tmp_path / "sleeping"
  environment = os.environ | {
    "PYTHONPATH": os.path.dirname(folder),
    "SLEEPING": str(sleeping),
  }
  with subprocess.Popen(
    [sys.executable, script], stdout=subprocess.PIPE, env=environment
  ) as trainer:
    worker = int(trainer.stdout.readline())
    # Once it sleeps, nothing but the watch can end it.
    deadline = time.monotonic() + 300
    while not sleeping.exists() and time.monotonic() < deadline:
      time.sleep(0.05)
    assert sleeping.exists() and _is_alive(worker)
    trainer.kill()
  deadline = time.monotonic() + 20
  while _is_alive(worker) and time.monotonic() < deadline:
    time.sleep(0.05)
  alive = _is_alive(worker)
  if alive:
    os.kill(worker, signal.SIGKILL)
  assert not alive


def _count():
  return iter(range(1000))


def test_workers_outlive_signals_that_their_trainer_heeds():
  made = workers.Workers([_count])
  try:
    assert made.take(0) == 0
    for number in (signal.SIGTERM, signal.SIGINT):
      os.kill(made._processes[0].pid, number)
    # More than it has ready.
    assert [made.take(0) for _ in range(300)] == list(range(1, 301))
  finally:
    made.close()
