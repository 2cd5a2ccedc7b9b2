"""Interruptions of a run: signals, hangs, spikes of the loss."""

import collections
import faulthandler
import os
import signal
import statistics
import sys
import threading
import time

import jax
from jax.experimental import multihost_utils

# The exit status of a run whose watchdog has ended it (EX_TEMPFAIL of
# sysexits.h: to be tried again).
HUNG = 75


class Termination:
  """Whether the run has been asked to end, by SIGTERM or a TPU's maintenance.

  Cloud TPU sends SIGTERM for both. jax tells all processes of a signal that one
  of them got, and the step at which all of them stop.
  """

  def __init__(self):
    self._came = False
    self._shared = jax.process_count() > 1

  def __enter__(self) -> "Termination":
    if not self._shared:  # jax has its own handler.
      self._before = signal.signal(signal.SIGTERM, self._note)
    return self

  def __exit__(self, *_) -> None:
    if not self._shared:
      signal.signal(signal.SIGTERM, self._before)

  def _note(self, *_) -> None:
    self._came = True

  def by(self, step: int) -> bool:
    """Whether to end before `step` is taken; to be asked before each."""
    if self._shared:
      self._came |= multihost_utils.reached_preemption_sync_point(step)
    return self._came


class Watchdog:
  """Ends the process with status `HUNG` after too long without `heard`.

  A step that hangs, such as one that waits for a lost host, cannot be
  interrupted. Stacks of all threads are written to stderr first.
  """

  def __init__(self, minutes: float | None):
    """Watches from the first `heard` on; None never ends anything."""
    self._seconds = None if minutes is None else 60 * minutes
    self._heard, self._doing = None, "starting"
    self._stop = threading.Event()

  def __enter__(self) -> "Watchdog":
    if self._seconds is not None:
      threading.Thread(target=self._watch, daemon=True).start()
    return self

  def __exit__(self, *_) -> None:
    self._stop.set()

  def heard(self, doing: str) -> None:
    """Says what is done from now on."""
    self._heard, self._doing = time.monotonic(), doing

  def _watch(self) -> None:
    while not self._stop.wait(min(1.0, self._seconds / 4)):
      if self._heard is None:
        continue
      silent = time.monotonic() - self._heard
      if silent > self._seconds:
        print(
          f"error: {self._doing} has taken {silent:.0f} s, more than "
          f"watchdog_minutes={self._seconds / 60:g}: ending. Stacks:",
          file=sys.stderr,
          flush=True,
        )
        faulthandler.dump_traceback(all_threads=True)
        sys.stderr.flush()
        os._exit(HUNG)


class Spikes:
  """Finds losses far above those just before."""

  def __init__(self, factor: float | None, window: int):
    """A `factor` of the median of `window` losses; None finds none."""
    self._factor, self._window = factor, window
    self._losses = collections.deque(maxlen=window)

  def is_spike(self, loss: float) -> bool:
    """Whether this loss is one; if not, it is one of the last from now on."""
    full = len(self._losses) == self._window
    if self._factor is not None and full:
      if loss > self._factor * statistics.median(self._losses):
        return True
    self._losses.append(loss)
    return False
