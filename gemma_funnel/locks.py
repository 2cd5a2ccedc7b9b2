"""A lock that one process holds, and that ends with the process."""

import datetime
import fcntl
import json
import os
import socket
from typing import Any

from gemma_funnel import buckets, inputs

_MOST = 1 << 16


class HeldError(ValueError):
  """Another process holds the lock."""


class Lock:
  """A lock file, held from entering to leaving the context.

  The kernel drops it when the process ends, however it ends. On a bucket there
  is no such lock, and nothing is held.

  Attributes:
    previous: what a holder that was killed had noted; {} if none was.
  """

  def __init__(self, path: str | os.PathLike[str], what: str):
    """Takes the lock file's path, and what it guards for messages."""
    self._path, self._what = os.fspath(path), what
    self._descriptor: int | None = None
    self.previous: dict[str, Any] = {}

  def __enter__(self) -> "Lock":
    """Takes the lock.

    Raises:
      HeldError: another process holds it, which is named.
      ValueError: the file cannot be made.
    """
    if buckets.is_remote(self._path):
      return self
    try:
      self._descriptor = self._acquire()
    except OSError as error:
      raise ValueError(
        f"{self._what} cannot be written: {error.strerror or error}"
      ) from error
    self.previous = _parse(os.pread(self._descriptor, _MOST, 0))
    try:
      self.note()
    except OSError as error:
      self.__exit__()
      raise ValueError(
        f"{self._what} cannot be written: {error.strerror or error}"
      ) from error
    return self

  def _acquire(self) -> int:
    while True:
      flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
      descriptor = os.open(self._path, flags, 0o666)
      try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
      except BlockingIOError:
        holder = _parse(os.pread(descriptor, _MOST, 0))
        os.close(descriptor)
        raise HeldError(
          f"{self._what} is in use by process {holder.get('pid', '?')} on "
          f"{holder.get('host', '?')}, since {holder.get('since', '?')}: wait "
          "for it, or name another folder"
        ) from None
      try:
        # One who ended in between has removed the name: it guards nothing.
        if os.path.samestat(os.fstat(descriptor), os.stat(self._path)):
          return descriptor
      except FileNotFoundError:
        pass
      os.close(descriptor)

  def note(self, **facts: Any) -> None:
    """Notes in the file, beside who holds it, what another must know."""
    if self._descriptor is None:
      return
    since = datetime.datetime.now().isoformat(" ", "seconds")
    holder = dict(pid=os.getpid(), host=socket.gethostname(), since=since)
    content = json.dumps(holder | facts).encode()
    os.ftruncate(self._descriptor, 0)
    os.pwrite(self._descriptor, content, 0)

  def __exit__(self, *_) -> None:
    if self._descriptor is not None:
      os.unlink(self._path)  # While it is held: see `_acquire`.
      os.close(self._descriptor)
      self._descriptor = None


def read_note(path: str | os.PathLike[str]) -> dict[str, Any]:
  """What the lock file's holder, running or killed, noted; {} if none."""
  try:
    return _parse(inputs.read_bytes(path, _MOST))
  except ValueError:
    return {}


def _parse(content: bytes) -> dict[str, Any]:
  try:
    found = json.loads(content)
  except ValueError:
    return {}
  return found if isinstance(found, dict) else {}
