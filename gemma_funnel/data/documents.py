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
  """A text and the key that decides its split.

  Attributes:
    key: a name that is the same on every machine, such as
      "asyncio/events.py" or "notes.txt:3".
    text: the content. Empty texts occur only in formats whose texts are not
      known before they are read; such a document has no chunks.
  """

  key: str
  text: str

  @property
  def num_bytes(self) -> int:
    """UTF-8 bytes of the text."""
    return len(self.text.encode())


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class TokenizedDocument:
  """The token ids of a `Document`.

  Attributes:
    key: the document's key.
    tokens: ids [n] without BOS and EOS, of an unsigned type.
    num_bytes: UTF-8 bytes of the text.
  """

  key: str
  tokens: np.ndarray
  num_bytes: int


def digest(key: str) -> int:
  """The hash of a key that decides its document's split, in [0, 2**64)."""
  return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big")


def is_heldout(key: str, heldout_fraction: float) -> bool:
  """Whether the document of this key is held out: a hash below a threshold.

  A larger fraction moves documents to the held-out split only.
  """
  return digest(key) < heldout_fraction * 2**64


class LazyDocuments(Sequence):
  """Documents that are read when they are indexed.

  Subclasses define `__len__`, `read(i)` and `key(i)` for 0 <= i < len.

  Attributes:
    parts: the sequences that this one is made of; none of a file.
  """

  parts: tuple[Sequence[Document], ...] = ()

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
  keys = (document.key for document in documents)
  return np.fromiter(map(digest, keys), np.uint64, len(documents))


class Joined(LazyDocuments):
  """Sequences of documents, one after the other."""

  def __init__(self, parts: Sequence[Sequence[Document]]):
    self.parts = tuple(part for part in parts if len(part))
    self._ends = np.cumsum([len(part) for part in self.parts], dtype=np.int64)

  def __len__(self) -> int:
    return int(self._ends[-1]) if self.parts else 0

  def _find(self, i: int) -> tuple[Sequence[Document], int]:
    which = int(np.searchsorted(self._ends, i, "right"))
    part = self.parts[which]
    return part, i - (int(self._ends[which]) - len(part))

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
    self.parts = (documents,)
    self._indices = indices

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
  """Splits by the hash of keys, as `is_heldout` does; (train, held-out)."""
  # An integer is below a number if it is below its ceiling.
  threshold = np.uint64(math.ceil(heldout_fraction * 2**64))
  held = _digests(documents) < threshold
  train, heldout = (
    Subset(documents, np.flatnonzero(mask)) for mask in (~held, held)
  )
  return train, heldout
