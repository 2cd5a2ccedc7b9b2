"""Documents, sequences of them that are read on demand, and their split.

A sequence of documents is a list or a `LazyDocuments`. The latter knows keys
without reading texts, so that splitting a corpus reads none.
"""

from collections.abc import Iterator, Sequence
import dataclasses
import hashlib
import math

import numpy as np


@dataclasses.dataclass(frozen=True, slots=True)
class Document:
  """A text and the key that decides its split."""

  key: str  # The same on every machine: "asyncio/events.py", "notes.txt:3".
  text: str  # Empty only in formats whose texts are not known before reading.

  @property
  def num_bytes(self) -> int:
    """UTF-8 bytes of the text."""
    return len(self.text.encode())


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class TokenizedDocument:
  """The token ids of a `Document`."""

  key: str
  tokens: np.ndarray  # [n] without BOS and EOS, of an unsigned type.
  num_bytes: int  # UTF-8 bytes of the text.


def digest(key: str) -> int:
  """The hash of a key that decides its document's split, in [0, 2**64)."""
  return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big")


class LazyDocuments(Sequence):
  """Documents that are read when they are indexed.

  Subclasses define `__len__`, `read(i)` and `key(i)` for 0 <= i < len.
  """

  parts: tuple[
    Sequence[Document], ...
  ] = ()  # What it is made of, if not files.

  def __getitem__(self, i):
    if isinstance(i, slice):
      return Subset(self, np.arange(*i.indices(len(self))))
    at = i + len(self) if i < 0 else i
    if not 0 <= at < len(self):
      raise IndexError(f"document {i} of {len(self)}")
    return self.read(int(at))

  def digests(self) -> np.ndarray:
    """The digests of all keys, uint64 [n]."""
    keys = map(self.key, range(len(self)))
    return np.fromiter(map(digest, keys), np.uint64, len(self))


def key_of(documents: Sequence[Document], i: int) -> str:
  """The key of document i, without its text if that has to be read."""
  lazy = isinstance(documents, LazyDocuments)
  return documents.key(i) if lazy else documents[i].key


def _digests(documents: Sequence[Document]) -> np.ndarray:
  if isinstance(documents, LazyDocuments):
    return documents.digests()
  return np.asarray([digest(d.key) for d in documents], np.uint64)


class Joined(LazyDocuments):
  """Sequences of documents, one after the other."""

  def __init__(self, parts: Sequence[Sequence[Document]]):
    self.parts = tuple(part for part in parts if len(part))
    self._starts = np.cumsum([0, *map(len, self.parts)])

  def __len__(self) -> int:
    return int(self._starts[-1])

  def _find(self, i: int) -> tuple[Sequence[Document], int]:
    which = int(np.searchsorted(self._starts, i, "right")) - 1
    return self.parts[which], i - int(self._starts[which])

  def key(self, i: int) -> str:
    return key_of(*self._find(i))

  def read(self, i: int) -> Document:
    part, at = self._find(i)
    return part[at]

  def digests(self) -> np.ndarray:
    empty = np.zeros(0, np.uint64)
    return np.concatenate([empty, *map(_digests, self.parts)])


class Subset(LazyDocuments):
  """Some documents of a sequence, by their indices."""

  def __init__(self, documents: Sequence[Document], indices: np.ndarray):
    self.parts, self._indices = (documents,), indices

  def __len__(self) -> int:
    return len(self._indices)

  def key(self, i: int) -> str:
    return key_of(self.parts[0], int(self._indices[i]))

  def read(self, i: int) -> Document:
    return self.parts[0][int(self._indices[i])]

  def digests(self) -> np.ndarray:
    return _digests(self.parts[0])[self._indices]


def files_of(documents: Sequence[Document]) -> Iterator[Sequence[Document]]:
  """The files and lists that a sequence is made of."""
  parts = getattr(documents, "parts", ())
  for part in parts:
    yield from files_of(part)
  if not parts:
    yield documents


def split(
  documents: Sequence[Document], heldout_fraction: float
) -> tuple[Subset, Subset]:
  """Splits into train and held-out: those whose key has a small digest.

  A larger fraction moves documents to the held-out split only.
  """
  # An integer is below a number if it is below its ceiling.
  threshold = np.uint64(math.ceil(heldout_fraction * 2**64))
  held = _digests(documents) < threshold
  return tuple(Subset(documents, np.flatnonzero(m)) for m in (~held, held))
