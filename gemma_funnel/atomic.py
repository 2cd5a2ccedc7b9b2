"""Files that are whole or not there: written beside their name, then renamed."""

from collections.abc import Iterator
import contextlib
import errno
import os
import uuid

from etils import epath

# A full disk, a full quota, one for reading alone, a broken one.
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)


@contextlib.contextmanager
def naming(path: str | os.PathLike[str]) -> Iterator[None]:
  """Gives an error of a disk that names no file, as of a write, `path`."""
  try:
    yield
  except OSError as error:
    if error.filename is None and error.errno in DISK_ERRORS:
      raise type(error)(error.errno, error.strerror, str(path)) from error
    raise


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[epath.Path]:
  """A path beside `path`, on the same file system, which then takes its name.

  Gives a name that no other process has; what is written there replaces `path`
  when the block ends, and is removed if it fails.
  """
  path = epath.Path(path)
  beside = path.parent / f"{path.name}.{uuid.uuid4().hex}.tmp"
  try:
    with naming(path):
      yield beside
      beside.replace(path)
  finally:
    beside.unlink(missing_ok=True)


def write_text(path: str | os.PathLike[str], text: str) -> None:
  """Writes a text file whole, in UTF-8, or not at all."""
  with replacing(path) as beside:
    beside.write_text(text)


def write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
  """Writes a file whole, or not at all."""
  with replacing(path) as beside:
    beside.write_bytes(data)
