"""Worker processes that prepare items ahead, and end with their parent.

Grain's own (mp_prefetch) deal whole batches out, so that the order depends on
their number. These are told which rows to make.
"""

from collections.abc import Callable, Iterator, Sequence
import contextlib
import multiprocessing
from multiprocessing import connection
import os
import pickle
import queue
import signal
import threading
import traceback
from typing import Any

# More than any machine has cores.
MOST = 1024
_SPAWN = multiprocessing.get_context("spawn")

Items = Callable[[], Iterator[Any]]


def _work(make: Items, to_parent: connection.Connection, ahead: int) -> None:
  """Sends what `make` yields, and at last None or the error it ends with."""
  # A launcher may signal all processes; those signals are for the parent, which
  # may need this one to save.
  for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, signal.SIG_IGN)
  parent = multiprocessing.parent_process()

  def end_with_parent():
    # With SIGKILL too: the system closes the parent's end of a pipe.
    connection.wait([parent.sentinel])
    os._exit(1)

  threading.Thread(target=end_with_parent, daemon=True).start()
  ready = queue.Queue(ahead)

  def send():
    # An OSError: the parent no longer listens.
    with contextlib.suppress(OSError):
      for message in iter(ready.get, None):
        to_parent.send_bytes(message)
    os._exit(0)

  sender = threading.Thread(target=send)
  sender.start()
  try:
    for item in make():
      # Pickled here: the state that comes with a row may change with the next.
      ready.put(pickle.dumps((item, None, "")))
  except Exception as e:
    text = "".join(traceback.format_exception(e))
    try:
      message = pickle.dumps((None, e, text))
      pickle.loads(message)
    except Exception:  # Another process cannot read this error itself.
      error = RuntimeError(f"{type(e).__name__}: {e}")
      message = pickle.dumps((None, error, text))
    ready.put(message)
  ready.put(None)
  sender.join()


class Workers:
  """Processes, each with its own items."""

  def __init__(self, makes: Sequence[Items], ahead: int = 64):
    """Starts them.

    Args:
      makes: a picklable call for the items of each process.
      ahead: most items that a process has ready and nobody has taken.
    """
    self._processes, self._pipes = [], []
    for make in makes:
      receiver, sender = _SPAWN.Pipe(duplex=False)
      args = make, sender, ahead
      process = _SPAWN.Process(target=_work, args=args, daemon=True)
      process.start()
      # Or the pipe would not end with the worker.
      sender.close()
      self._processes.append(process)
      self._pipes.append(receiver)

  def take(self, i: int) -> Any:
    """The next item of process i.

    Raises:
      Exception: what it raised, with its traceback as a note.
      RuntimeError: it has ended otherwise.
    """
    try:
      item, error, text = pickle.loads(self._pipes[i].recv_bytes())
    except EOFError as e:
      self._processes[i].join()
      raise RuntimeError(
        f"worker process {i} of data.num_workers={len(self._processes)} ended "
        f"with exit code {self._processes[i].exitcode}; -9 is often a lack of "
        "memory"
      ) from e
    if error is not None:
      error.add_note(f"In worker process {i}:\n{text}")
      raise error
    return item

  def close(self) -> None:
    """Ends them; may be called again."""
    for pipe, process in zip(self._pipes, self._processes, strict=True):
      pipe.close()
      process.kill()  # They hold nothing that has to be put away.
    for process in self._processes:
      process.join()
      process.close()
    self._pipes, self._processes = [], []
