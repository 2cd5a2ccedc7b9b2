"""Files on buckets: what etils.epath, which opens and lists them, has not."""

from collections.abc import Iterator
import contextlib
import functools
import os
from typing import Any

from etils import epath

# Of fsspec, which would keep a listing for good: what other processes and
# TensorStore write would not be seen.
_OPTIONS = {"use_listings_cache": False}
# Of a content, by what fsspec calls it; an ETag may change with a copy.
_CHECKSUMS = ("crc32c", "md5Hash")


def is_remote(path: str | os.PathLike[str]) -> bool:
  """Whether a path is of a bucket and not of this machine."""
  return "://" in os.fspath(path)


@functools.cache
def prepare(scheme: str) -> None:
  """Sets what clients of buckets need, before the first is made."""
  try:
    import fsspec
  except ImportError:
    return  # TensorFlow's client then.
  for name in {"gs": ("gs", "gcs")}.get(scheme, (scheme,)):
    fsspec.config.conf.setdefault(name, {}).update(_OPTIONS)


@contextlib.contextmanager
def naming(path: str | os.PathLike[str]) -> Iterator[None]:
  """Turns an error of reading `path` into a ValueError that names it."""
  try:
    yield
  except ValueError:
    raise
  except OSError as error:
    raise ValueError(
      f"{os.fspath(path)}: cannot be read: {error.strerror or error}"
    ) from error
  except Exception as error:  # Clients of buckets raise of every kind.
    if not is_remote(path):
      raise
    text = " ".join(f"{type(error).__name__}: {error}".split())
    raise ValueError(f"{os.fspath(path)}: cannot be read: {text}") from error


def _client(path: str) -> Any:
  """The file system of fsspec that epath uses for it; None is another kind."""
  backend = epath.Path(path)._backend
  return backend.fs(path) if hasattr(backend, "fs") else None


def size_of(path: str | os.PathLike[str]) -> int:
  """Bytes of a file, here or on a bucket; a ValueError where there is none."""
  with naming(path):
    return epath.Path(path).stat().length


def read_range(path: str | os.PathLike[str], start: int, stop: int) -> bytes:
  """A file's bytes from `start` to `stop`, or to its end, by one request.

  Raises:
    ValueError: it cannot be read.
  """
  name = os.fspath(path)
  if stop <= start:
    return b""
  with naming(name):
    if client := _client(name):
      return client.cat_file(name, start=start, end=stop)
    with epath.Path(name).open("rb") as file:
      file.seek(start)
      return file.read(stop - start)


def _find(folder: str | os.PathLike[str]) -> dict[str, Any] | None:
  """What a client says of all files below it, by path; None is no client."""
  name = os.fspath(folder)
  client = _client(name) if is_remote(name) else None
  if client is None:
    return None
  with naming(name):
    scheme, found = name.partition("://")[0], client.find(name, detail=True)
  return {f"{scheme}://{path}": about for path, about in found.items()}


def files_in(folder: epath.Path) -> list[epath.Path] | None:
  """All files below it, by one request; None where there is no such request."""
  found = _find(folder)
  return None if found is None else [epath.Path(path) for path in found]


def checksums_in(folder: str | os.PathLike[str]) -> dict[str, list[int | str]]:
  """Size and checksum of the files below it, by path, as the store has them.

  The store checks a file by it whenever it is read. {} where it has none.
  """
  return {
    path: [about["size"], f"{kind}:{about[kind]}"]
    for path, about in (_find(folder) or {}).items()
    for kind in [next((k for k in _CHECKSUMS if about.get(k)), None)]
    if kind
  }
