"""Interruptions of a run: signals, hangs, spikes of the loss."""

import collections
import contextlib
import faulthandler
import os
import signal
import socket
import statistics
import sys
import threading
import time

import jax
from jax._src import distributed
from jax.experimental import multihost_utils

from gemma_funnel import cli

# The exit status of a run whose watchdog has ended it (EX_TEMPFAIL of
# sysexits.h: to be tried again).
HUNG = 75
# Where processes write that they are there.
_HEARD = "gemma_funnel/heard"


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


class Peers:
  """Ends the process when another of the run is heard of no more.

  Each writes, again and again, into the store of jax's coordination service,
  and reads what the others have written. jax itself takes 100 s, and ends in a
  stack that names nobody.
  """

  def __init__(self, seconds: float = 25.0):
    """Watches while it is entered; a process may be silent for so long."""
    self._seconds = seconds
    self._stop = threading.Event()
    self._own = f"{_HEARD}/{jax.process_index()}"

  def __enter__(self) -> "Peers":
    if jax.process_count() > 1:
      # As Orbax does: jax has no public name for it.
      self._client = distributed.global_state.client
      self._thread = threading.Thread(target=self._watch, daemon=True)
      self._thread.start()
    return self

  def __exit__(self, kind, error, stack) -> None:
    if jax.process_count() > 1:
      if isinstance(error, jax.errors.JaxRuntimeError):
        # Of a collective, maybe: is it the loss of another that ended it?
        self._thread.join(1.2 * self._seconds)
      self._stop.set()
      with contextlib.suppress(RuntimeError):  # It may be lost itself.
        self._client.key_value_delete(self._own)

  def _watch(self) -> None:
    last, host, number = {}, socket.gethostname(), 0
    while not self._stop.wait(self._seconds / 10):
      number += 1
      try:
        self._client.key_value_set(self._own, f"{number} {host}", True)
        found = dict(self._client.key_value_dir_get(_HEARD))
      except RuntimeError:
        if not self._stop.is_set():
          self._end("process 0, which the others meet at, cannot be reached")
        return
      now = time.monotonic()
      # One that ended has taken its line away.
      last = {
        k: last[k] for k in found if last.get(k, ("",))[0] == found[k]
      } | {
        k: (text, now)
        for k, text in found.items()
        if last.get(k, ("",))[0] != text
      }
      for key, (text, heard) in last.items():
        if now - heard > self._seconds:
          name = f"process {key.rpartition('/')[2]} of {jax.process_count()}"
          self._end(
            f"{name}, on {text.partition(' ')[2]}, has not been heard of for "
            f"{now - heard:.0f} s"
          )

  def _end(self, what: str) -> None:
    cli.say(f"error: {what}: it is lost, and this one ends too")
    if jax.process_index() == 0:
      # Without the store the others would abort before they say so.
      time.sleep(self._seconds / 5)
    os._exit(1)


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
