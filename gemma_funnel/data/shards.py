"""Virtual shards: an order of rows that no number of processes changes.

The data is S endless streams of rows, the virtual shards (`data.lanes` of them
in a run's configuration). Row g of a run is row g // S of shard g % S. The order
does not depend on processes, batches or workers, so that all of them may change
within a run: a position in the data is a number of rows and a state a shard.
"""

from collections.abc import Callable, Iterator, Sequence
import copy
import dataclasses
import itertools
from typing import Any

import grain
import numpy as np

from gemma_funnel.checks import require
from gemma_funnel.data import workers

Row = dict[str, np.ndarray]
MakeShard = Callable[[int], grain.IterDataset]


@dataclasses.dataclass(frozen=True)
class _WorkerRows:
  """The rows of a worker's shards, each with the state after it."""

  make_shard: MakeShard
  states: dict[int, Any]  # Of the worker's shards; None is the beginning.
  order: tuple[int, ...]  # The shards of the process's next rows; they repeat.

  def __call__(self) -> Iterator[tuple[Row, Any]]:
    iterators = {shard: iter(self.make_shard(shard)) for shard in self.states}
    for shard, state in self.states.items():
      if state is not None:
        iterators[shard].set_state(state)
    for shard in itertools.cycle(i for i in self.order if i in iterators):
      yield next(iterators[shard]), iterators[shard].get_state()


class VirtualShards(grain.DatasetIterator):
  """An endless iterator of the batches of one process.

  After N rows of the run, its next batch has the rows [N, N + B). Process p of
  P has those with g % P == p, in order. They are of the shards s with
  s % P == p, which no other process reads.

  The state is {"rows": N, "lanes": {str(s): state of shard s}} with the shards
  of the process; `merge_states` joins those of all processes to that of the
  run. JSON can hold it. From the run's state, any iterator of as many shards
  goes on, whatever its batches, processes and workers.
  """

  def __init__(
    self,
    make_shard: MakeShard,
    *,
    num_shards: int,
    batch_size: int,
    process_index: int = 0,
    process_count: int = 1,
    num_workers: int = 0,
  ):
    """Starts nothing yet: workers start with the first batch.

    Args:
      make_shard: returns the endless dataset of rows of a shard; picklable if
        there are workers.
      num_shards: S, a multiple of `process_count`.
      batch_size: B, rows of a batch of all processes; a multiple of it too.
      process_index: p, in [0, process_count).
      process_count: P.
      num_workers: processes that prepare rows ahead, at most the shards of a
        process; 0 prepares them in this one.

    Raises:
      ValueError: the numbers do not fit each other; it names the keys.
    """
    super().__init__()
    self._iterators, self._workers = {}, None  # `close` needs them.
    for name, value in (("data.lanes", num_shards), ("batch_size", batch_size)):
      require(
        value % process_count == 0,
        f"{name}={value} with {process_count} processes: expected a multiple "
        "of their number",
      )
    most = num_shards // process_count
    require(
      num_workers <= most,
      f"data.num_workers={num_workers} with data.lanes={num_shards} and "
      f"{process_count} processes: expected at most {most} workers a process, "
      f"one a shard, or data.lanes={num_workers * process_count}",
    )
    self._make_shard, self._num_shards = make_shard, num_shards
    self._batch_size, self._num_workers = batch_size, num_workers
    self._index, self._count = process_index, process_count
    self._rows = 0
    self._own = tuple(range(process_index, num_shards, process_count))
    # With workers, the state of a shard after the last row that was taken.
    self._states = {}

  def _order(self) -> tuple[int, ...]:
    """The shards of the process's next rows; they repeat."""
    start = self._rows + (self._index - self._rows) % self._count
    rows = range(start, start + self._num_shards, self._count)
    return tuple(row % self._num_shards for row in rows)

  def start_prefetch(self) -> None:
    """Starts the workers, which the first batch would do."""
    require(not self._closed, "the iterator of the data has been closed")
    if self._num_workers and self._workers is None:
      states = [(shard, self._states.get(shard)) for shard in self._own]
      dealt = [
        dict(states[w :: self._num_workers]) for w in range(self._num_workers)
      ]
      self._workers = workers.Workers(
        [_WorkerRows(self._make_shard, own, self._order()) for own in dealt]
      )

  def _iterator(self, shard: int) -> grain.DatasetIterator:
    if shard not in self._iterators:
      self._iterators[shard] = iter(self._make_shard(shard))
    return self._iterators[shard]

  def _take(self, shard: int) -> Row:
    if not self._num_workers:
      return next(self._iterator(shard))
    worker = shard // self._count % self._num_workers
    row, self._states[shard] = self._workers.take(worker)
    return row

  def __next__(self) -> Row:
    """A batch: arrays [B/P, ..] of the rows' arrays [..].

    Raises:
      Exception: what reading or packing raises, also in a worker.
    """
    self.start_prefetch()
    order = itertools.cycle(self._order())
    count = self._batch_size // self._count
    rows = [self._take(shard) for shard in itertools.islice(order, count)]
    self._rows += self._batch_size
    return {key: np.stack([row[key] for row in rows]) for key in rows[0]}

  def get_state(self) -> dict[str, Any]:
    states = {
      str(shard): self._states[shard]
      if shard in self._states
      else self._iterator(shard).get_state()
      for shard in self._own
    }
    return {"rows": self._rows, "lanes": copy.deepcopy(states)}

  def set_state(self, state: dict[str, Any]) -> None:
    """Goes to the position of a state, of the run or of this very process.

    Raises:
      ValueError: it is not a state of so many shards.
    """
    found = check_state(state)
    require(
      set(self._own) <= set(found) <= set(range(self._num_shards)),
      f"the state of the data has the lanes {_few(sorted(found))}; "
      f"data.lanes={self._num_shards} and process {self._index} of "
      f"{self._count} need {_few(self._own)}: expected the lanes that the run "
      "began with, and the states of all its processes (merge_states)",
    )
    self._stop()
    self._rows = state["rows"]
    own = {shard: copy.deepcopy(found[shard]) for shard in self._own}
    if self._num_workers:
      self._states = own
    else:
      for shard, shard_state in own.items():
        self._iterator(shard).set_state(shard_state)

  def _stop(self) -> None:
    if self._workers is not None:
      self._workers.close()
    self._workers = None

  def close(self) -> None:
    """Ends the workers."""
    self._stop()
    for iterator in self._iterators.values():
      iterator.close()
    super().close()

  def __str__(self) -> str:
    return f"VirtualShards({self._num_shards})"


def _few(shards: Sequence[int]) -> str:
  """Such as "0, 2, .., 62"."""
  if len(shards) <= 6:
    return ", ".join(map(str, shards)) or "none"
  return f"{shards[0]}, {shards[1]}, .., {shards[-1]}"


def check_state(state: Any) -> dict[int, Any]:
  """The states of the shards in a state of `VirtualShards`, by number."""
  try:
    rows, states = state["rows"], state["lanes"]
    found = {int(shard): one for shard, one in states.items()}
  except (TypeError, KeyError, AttributeError, ValueError) as e:
    has = sorted(state) if isinstance(state, dict) else type(state).__name__
    raise ValueError(
      f"the state of the data has {has}; expected 'rows' and 'lanes': a "
      "checkpoint of another version cannot be gone on with"
    ) from e
  is_count = isinstance(rows, (int, np.integer)) and not isinstance(rows, bool)
  require(
    is_count and rows >= 0 and min(found, default=-1) >= 0,
    f"the state of the data has rows={rows!r} and the lanes "
    f"{_few(sorted(found))}; expected a number of rows and some lanes",
  )
  return found


def merge_states(states: Sequence[dict[str, Any]]) -> dict[str, Any]:
  """Joins the states of all processes, in any order, to that of the run.

  Raises:
    ValueError: there is none, they are of different rows, one shard is in two
      of them, or one is in none.
  """
  require(len(states), "no states of the data: expected one of each process")
  merged = {}
  for state in states:
    found = check_state(state)
    require(
      state["rows"] == states[0]["rows"],
      f"states of the data after {states[0]['rows']} and {state['rows']} rows; "
      "expected those of one step",
    )
    twice = sorted(merged.keys() & found.keys())
    require(
      not twice,
      f"two states of the data have the lanes {_few(twice)}; expected each "
      "lane in one of them",
    )
    merged |= found
  missing = sorted(set(range(max(merged) + 1)) - merged.keys())
  require(
    not missing,
    f"no state of the data has the lanes {_few(missing)}; expected one of each "
    "process",
  )
  joined = {str(shard): merged[shard] for shard in sorted(merged)}
  return {"rows": int(states[0]["rows"]), "lanes": joined}
