"""Files that others wrote, or may have changed: bounds, and fingerprints.

Every reader of a local file opens it here, so that a FIFO, a device or a file
without end is an error and neither a hang nor a full memory. What a result
depends on is known by its content: see `fingerprint`.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
import contextlib
import hashlib
import json
import os
import stat
from typing import Any, BinaryIO

from etils import epath

from gemma_funnel import buckets
from gemma_funnel.checks import require

# A configuration, an index or bookkeeping; those of the largest have 100 kB.
MAX_JSON = 64 << 20
# The largest tokenizers have 40 MB.
MAX_TOKENIZER = 256 << 20
# Of a log or of results, a line: a record of a few hundred numbers.
MAX_LINE = 4 << 20
# Larger local files are known by parts of them.
_PARTS, _PART_BYTES = 256, 1 << 20
# Of many files together, beyond so many bytes: a few parts of each.
_MANY_BYTES, _FEW_PARTS = 4 << 30, 16


@contextlib.contextmanager
def open_file(
  path: str | os.PathLike[str], most: int | None = None
) -> Iterator[BinaryIO]:
  """Opens a file for reading bytes; links are followed.

  Args:
    path: local, or of a bucket.
    most: bytes that it may have; None is any number.

  Raises:
    ValueError: it is not there, cannot be read, is no regular file (a folder,
      FIFO, device or socket), or is larger.
  """
  name = os.fspath(path)
  with buckets.naming(name):
    if buckets.is_remote(name):
      size, opened = None, epath.Path(name).open("rb")
    else:
      # Opened without waiting: a FIFO would wait for a writer.
      flags = os.O_RDONLY | os.O_NONBLOCK | getattr(os, "O_CLOEXEC", 0)
      descriptor = os.open(name, flags)
      found = os.fstat(descriptor)
      if not stat.S_ISREG(found.st_mode):
        os.close(descriptor)
        raise ValueError(f"{name} is {_kind(found.st_mode)}: expected a file")
      size, opened = found.st_size, open(descriptor, "rb")
  with opened:
    if None not in (most, size) and size > most:
      raise ValueError(f"{name} has {size:,} bytes: expected at most {most:,}")
    yield opened


def is_gguf(path: str | os.PathLike[str]) -> bool:
  """Whether it is a GGUF file, by its first bytes; never raises."""
  try:
    if buckets.is_remote(path):
      return buckets.read_range(path, 0, 4) == b"GGUF"
    if not os.path.isfile(path):
      return False
    with open_file(path) as file:
      return file.read(4) == b"GGUF"
  except ValueError:
    return False


def _kind(mode: int) -> str:
  kinds = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
  }
  return kinds.get(stat.S_IFMT(mode), "a device")


def read_bytes(path: str | os.PathLike[str], most: int) -> bytes:
  """A file's content, of `most` bytes; raises as `open_file` does."""
  with open_file(path, most) as file, buckets.naming(path):
    content = file.read(most + 1)  # A file of /proc has no size.
  require(
    len(content) <= most,
    f"{os.fspath(path)} has more than {most:,} bytes, the most expected",
  )
  return content


def parse_json_lines(
  content: bytes,
  tell: Callable[[int, str], None],
  fault: Callable[[dict[str, Any]], str | None] = lambda record: None,
) -> list[dict[str, Any]]:
  """The JSON objects of a log, one a line, in order.

  A line that is none is left out and `tell` is called with its number, from 1,
  and what is wrong with it: a log never stops a run. So is an object that
  `fault` returns a text for.
  """
  records = []
  for number, line in enumerate(content.split(b"\n"), start=1):
    if not line.strip():
      continue
    try:
      require(len(line) <= MAX_LINE, f"it has {len(line):,} bytes")
      record = json.loads(line.decode("utf-8"))
      kind = type(record).__name__
      require(isinstance(record, dict), f"a JSON {kind}, expected an object")
      wrong = fault(record)
      require(wrong is None, str(wrong))
    except (ValueError, RecursionError) as error:
      tell(number, str(error))
    else:
      records.append(record)
  return records


def fingerprint(path: str | os.PathLike[str], parts: int = _PARTS) -> str:
  """What tells the content of a file from another: its size and a SHA-256.

  The hash is of the whole file up to 256 MiB. It is of `parts` parts of 1 MiB,
  256 if nothing is said, the first and the last among them, of a larger one,
  and for a file of a bucket it is of size and time of change alone: the names
  of the kinds differ.

  Raises:
    ValueError: see `open_file`.
  """
  name = os.fspath(path)
  if buckets.is_remote(name):
    with buckets.naming(name):
      found = epath.Path(name).stat()
    return f"{found.length}:changed:{found.mtime}"
  with open_file(path) as file:
    size = os.fstat(file.fileno()).st_size
    if size <= parts * _PART_BYTES:
      found = hashlib.file_digest(file, "sha256")
      return f"{size}:sha256:{found.hexdigest()}"
    found = hashlib.sha256()
    for part in range(parts):
      file.seek((size - _PART_BYTES) * part // (parts - 1))
      found.update(file.read(_PART_BYTES))
    return f"{size}:sha256-of-{parts}-parts:{found.hexdigest()}"


def digest(content: bytes) -> str:
  """The fingerprint of a file of this content, wherever it is."""
  return f"{len(content)}:sha256:{hashlib.sha256(content).hexdigest()}"


def fingerprint_all(paths: Iterable[str | os.PathLike[str]]) -> dict[str, str]:
  """The fingerprint of each file, by its path; see `fingerprint`.

  Of more than 4 GiB in all, 16 parts of each file are read.
  """
  names = [os.fspath(path) for path in paths]
  local = [name for name in names if not buckets.is_remote(name)]
  try:
    many = sum(os.path.getsize(name) for name in local) > _MANY_BYTES
  except OSError:
    many = False  # It is told of as it is read.
  parts = _FEW_PARTS if many else _PARTS
  return {name: fingerprint(name, parts) for name in names}


def require_unchanged(
  what: str,
  kept: Mapping[str, str],
  found: Mapping[str, str],
  accept: bool = False,
) -> None:
  """Compares what something depends on with what is there now.

  Args:
    what: depends on it, for messages: "the run in runs/a".
    kept: fingerprints that were kept with it, by name.
    found: those of now, by the same names.
    accept: only tell, in a line on stderr, and go on.

  Raises:
    ValueError: something is gone, new or another, unless `accept`.
  """
  changed = []
  for name in sorted(kept.keys() | found.keys()):
    if name not in found:
      changed.append(f"{name} (gone)")
    elif kept.get(name) != found[name]:
      changed.append(f"{name} ({'changed' if name in kept else 'new'})")
  if not changed:
    return
  more = f" and {len(changed) - 5} more" if len(changed) > 5 else ""
  message = f"{what} depends on other content: {', '.join(changed[:5])}{more}"
  require(
    accept,
    f"{message}. Put it back, name another folder, or go on with what is there "
    "now by accept_changed",
  )
  from gemma_funnel import cli

  cli.say(f"warning: {message}; accepted")
