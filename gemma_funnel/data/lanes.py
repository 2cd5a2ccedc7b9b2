"""Lanes: endless streams of rows that any number of processes take turns at.

Row g of a run is row g // L of lane g % L. What a process, a batch or a worker
is does not come into that, so that all of them may change within a run: what
has been read is a number of rows, and the state of each lane.
"""

from collections.abc import Callable, Iterator, Sequence
import copy
import dataclasses
import itertools
from typing import Any

import grain
import numpy as np

from gemma_funnel.data import workers

Row = dict[str, np.ndarray]
MakeLane = Callable[[int], grain.IterDataset]


@dataclasses.dataclass(frozen=True)
class _Turns:
  """The rows of some lanes in the order they are taken, made in a worker.

  Attributes:
    make_lane: gives the dataset of a lane; picklable.
    lanes: those of the worker.
    order: the lanes of the process's next rows, which repeat.
    states: of the lanes that are not at their beginning.
  """

  make_lane: MakeLane
  lanes: tuple[int, ...]
  order: tuple[int, ...]
  states: dict[int, Any]

  def __call__(self) -> Iterator[tuple[Row, Any]]:
    iterators = {lane: iter(self.make_lane(lane)) for lane in self.lanes}
    for lane, state in self.states.items():
      iterators[lane].set_state(state)
    for lane in itertools.cycle(i for i in self.order if i in iterators):
      yield next(iterators[lane]), iterators[lane].get_state()


def _check(
  lanes: int, batch_size: int, process_count: int, num_workers: int
) -> None:
  for name, value in (("data.lanes", lanes), ("batch_size", batch_size)):
    if value % process_count:
      raise ValueError(
        f"{name}={value} with {process_count} processes: expected a multiple "
        "of their number"
      )
  if num_workers > lanes // process_count:
    raise ValueError(
      f"data.num_workers={num_workers} with data.lanes={lanes} and "
      f"{process_count} processes: expected at most "
      f"{lanes // process_count} workers a process, one a lane, or "
      f"data.lanes={num_workers * process_count}"
    )


class Lanes(grain.DatasetIterator):
  """An endless iterator of the batches of one process.

  Batch s of a run that has taken N rows before has the rows [N + sB, N +
  (s+1)B), of which process p of P has those with g % P == p, in order. These
  are of the lanes l with l % P == p; no other process reads those.

  The state is {"rows": N, "lanes": {str(l): state of lane l}}, with the lanes
  of the process: `merge_states` makes the state of the run of those of all
  processes. It is of numbers and strings, so that JSON can hold it. With the
  run's, any iterator of the same lanes goes on where it was, whatever its
  batches, processes and workers.
  """

  def __init__(
    self,
    make_lane: MakeLane,
    *,
    lanes: int,
    batch_size: int,
    process_index: int = 0,
    process_count: int = 1,
    num_workers: int = 0,
  ):
    """Starts nothing yet: workers start with the first batch.

    Args:
      make_lane: gives the endless dataset of rows of a lane; picklable if
        there are workers.
      lanes: L, a multiple of `process_count`.
      batch_size: B, rows of a batch of all processes; a multiple of it too.
      process_index: p, in [0, process_count).
      process_count: P.
      num_workers: processes that prepare rows ahead; 0 prepares them in this
        one. At most the lanes of a process.

    Raises:
      ValueError: the numbers do not fit each other; it names the keys.
    """
    super().__init__()
    self._iterators, self._workers = {}, None  # Before what `close` is of.
    _check(lanes, batch_size, process_count, num_workers)
    self._make_lane, self._num_lanes = make_lane, lanes
    self._batch_size, self._num_workers = batch_size, num_workers
    self._index, self._count = process_index, process_count
    self._rows = 0
    self._own = tuple(range(process_index, lanes, process_count))
    # By lane, as of the last row that was taken; without workers the iterators
    # have them.
    self._states = {}

  def _order(self) -> tuple[int, ...]:
    """The lanes of the process's next rows; they repeat."""
    start = self._rows + (self._index - self._rows) % self._count
    rows = range(start, start + self._num_lanes, self._count)
    return tuple(row % self._num_lanes for row in rows)

  def _worker_of(self, lane: int) -> int:
    return lane // self._count % self._num_workers

  def start_prefetch(self) -> None:
    """Starts the workers, which the first batch would do."""
    if self._closed:
      raise ValueError("the iterator of the data has been closed")
    if self._num_workers and self._workers is None:
      dealt = [
        tuple(lane for lane in self._own if self._worker_of(lane) == w)
        for w in range(self._num_workers)
      ]
      states = lambda lanes: {
        lane: self._states[lane] for lane in lanes if lane in self._states
      }
      order = self._order()
      self._workers = workers.Workers(
        [_Turns(self._make_lane, own, order, states(own)) for own in dealt]
      )

  def _iterator(self, lane: int) -> grain.DatasetIterator:
    if lane not in self._iterators:
      self._iterators[lane] = iter(self._make_lane(lane))
    return self._iterators[lane]

  def _take(self, lane: int) -> Row:
    if not self._num_workers:
      return next(self._iterator(lane))
    row, self._states[lane] = self._workers.take(self._worker_of(lane))
    return row

  def __next__(self) -> Row:
    """A batch: arrays [B/P, ..] of the rows' arrays [..].

    Raises:
      Exception: what reading or packing raises, also in a worker.
    """
    self.start_prefetch()
    order = itertools.cycle(self._order())
    count = self._batch_size // self._count
    rows = [self._take(lane) for lane in itertools.islice(order, count)]
    self._rows += self._batch_size
    return {key: np.stack([row[key] for row in rows]) for key in rows[0]}

  def get_state(self) -> dict[str, Any]:
    states = {}
    for lane in self._own:
      if lane in self._states:
        states[str(lane)] = self._states[lane]
      else:
        states[str(lane)] = self._iterator(lane).get_state()
    return {"rows": self._rows, "lanes": copy.deepcopy(states)}

  def set_state(self, state: dict[str, Any]) -> None:
    """Goes to where a state is of.

    Args:
      state: of the run, or of this very process.

    Raises:
      ValueError: it is not a state of so many lanes.
    """
    found = check_state(state)
    wrong = [lane for lane in found if lane >= self._num_lanes]
    missing = [lane for lane in self._own if lane not in found]
    if wrong or missing:
      raise ValueError(
        f"the state of the data has the lanes {_few(sorted(found))}; "
        f"data.lanes={self._num_lanes} and process {self._index} of "
        f"{self._count} need {_few(self._own)}: expected the lanes that the "
        "run began with, and the states of all its processes (merge_states)"
      )
    self._stop()
    self._rows = state["rows"]
    own = {lane: copy.deepcopy(found[lane]) for lane in self._own}
    if self._num_workers:
      self._states = own
    else:
      for lane, lane_state in own.items():
        self._iterator(lane).set_state(lane_state)

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
    return f"Lanes({self._num_lanes})"


def _few(lanes: Sequence[int]) -> str:
  """Such as "0, 2, .., 62"."""
  if len(lanes) <= 6:
    return ", ".join(map(str, lanes)) or "none"
  return f"{lanes[0]}, {lanes[1]}, .., {lanes[-1]}"


def check_state(state: Any) -> dict[int, Any]:
  """The states of the lanes in a state, by number.

  Raises:
    ValueError: it is none of `Lanes`.
  """
  try:
    rows, lanes = state["rows"], state["lanes"]
    found = {int(lane): lane_state for lane, lane_state in lanes.items()}
  except (TypeError, KeyError, AttributeError, ValueError) as e:
    has = sorted(state) if isinstance(state, dict) else type(state).__name__
    raise ValueError(
      f"the state of the data has {has}; expected 'rows' and 'lanes': a "
      "checkpoint of another version cannot be gone on with"
    ) from e
  is_count = isinstance(rows, (int, np.integer)) and not isinstance(rows, bool)
  if not is_count or rows < 0 or min(found, default=-1) < 0:
    raise ValueError(
      f"the state of the data has rows={rows!r} and the lanes "
      f"{_few(sorted(found))}; expected a number of rows and some lanes"
    )
  return found


def merge_states(states: Sequence[dict[str, Any]]) -> dict[str, Any]:
  """The state of a run, of those of all its processes in any order.

  Raises:
    ValueError: there is none, they are of different rows, one lane is in two
      of them, or one is in none.
  """
  if not states:
    raise ValueError("no states of the data: expected one of each process")
  merged = {}
  for state in states:
    found = check_state(state)
    if state["rows"] != states[0]["rows"]:
      raise ValueError(
        f"states of the data after {states[0]['rows']} and "
        f"{state['rows']} rows; expected those of one step"
      )
    twice = sorted(merged.keys() & found.keys())
    if twice:
      raise ValueError(
        f"two states of the data have the lanes {_few(twice)}; expected each "
        "lane in one of them"
      )
    merged |= found
  missing = sorted(set(range(max(merged) + 1)) - merged.keys())
  if missing:
    raise ValueError(
      f"no state of the data has the lanes {_few(missing)}; expected one of "
      "each process"
    )
  lanes = {str(lane): merged[lane] for lane in sorted(merged)}
  return {"rows": int(states[0]["rows"]), "lanes": lanes}
