"""Corpora of token ids: what `data.tokenize` writes, and how it is read.

A folder has array_record shards, the digests of their documents' keys (by
which a corpus is split without reading it), a copy of the tokenizer and
metadata.json. A record is a header, the key and the ids, in the corpus' order.
"""

from collections.abc import Iterator, Sequence
import io
import json
import os
import struct
from typing import Any

import numpy as np

from gemma_funnel.checks import require
from gemma_funnel.data import files
from gemma_funnel.data.documents import (
  Document,
  TokenizedDocument,
  digest,
  files_of,
)
from gemma_funnel.data.tokenizer import Tokenizer

METADATA = "metadata.json"
FORMAT = "gemma_funnel tokens 1"
# Bytes of the key; UTF-8 bytes of the text. Ids follow the key.
_HEADER = struct.Struct("<IQ")
_AGAIN = "copy or tokenize the corpus again"


def dtype_for(vocab_size: int) -> np.dtype:
  """The smallest type of ids below `vocab_size` that is written."""
  return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def encode_record(
  document: Document, ids: Sequence[int], dtype: np.dtype
) -> bytes:
  """The record of a document."""
  key = document.key.encode()
  header = _HEADER.pack(len(key), document.num_bytes)
  return header + key + np.asarray(ids, dtype).tobytes()


def decode_record(record: bytes, dtype: np.dtype) -> TokenizedDocument:
  """The document of a record; a ValueError if its sizes are impossible."""
  size, header = len(record), _HEADER.size
  require(size >= header, f"found {size} bytes, expected a header")
  key_size, num_bytes = _HEADER.unpack_from(record)
  start = header + key_size
  require(
    size >= start and (size - start) % dtype.itemsize == 0,
    f"found {size} bytes, expected {start} and ids of {dtype.itemsize} bytes",
  )
  tokens = np.frombuffer(record, dtype, offset=start)
  return TokenizedDocument(record[header:start].decode(), tokens, num_bytes)


def digests_path(path: str) -> str:
  """The file of a shard's digests."""
  return path.removesuffix(".array_record") + ".digests.npy"


def read_metadata(folder: str) -> dict[str, Any]:
  """The metadata of a folder, as `tokenize.tokenize` returns it."""
  return json.loads(files.read_bytes(os.path.join(folder, METADATA)))


def is_tokenized(folder: str) -> bool:
  """Whether a folder is a corpus that `data.tokenize` wrote."""
  if not files.is_file(os.path.join(folder, METADATA)):
    return False
  try:
    metadata = read_metadata(folder)
  except ValueError:
    return False  # Of somebody else.
  return isinstance(metadata, dict) and metadata.get("format") == FORMAT


def is_shard(path: str) -> bool:
  """Whether a file is an array_record in such a folder."""
  return path.endswith(files.RECORD_ENDS) and is_tokenized(
    os.path.dirname(path)
  )


def shard_paths(folder: str) -> list[str]:
  """All shards of a folder, none of which may be missing."""
  names = [shard["file"] for shard in read_metadata(folder)["shards"]]
  missing = [n for n in names if not files.is_file(os.path.join(folder, n))]
  require(
    not missing,
    f"{folder}: {len(missing)} of {len(names)} shards are missing, such as "
    f"{missing[:1]}; {_AGAIN}",
  )
  return [os.path.join(folder, name) for name in names]


class TokenizedFile(files.RecordFile):
  """One shard, opened by the metadata beside it."""

  def __init__(self, path: str):
    self.folder, name = os.path.split(path)
    self.metadata = read_metadata(self.folder)
    shards = {s["file"]: s["documents"] for s in self.metadata["shards"]}
    require(
      name in shards,
      f"{path}: {METADATA} names no such shard; found {sorted(shards)[:4]}",
    )
    super().__init__(path)
    self._dtype = np.dtype(self.metadata["dtype"])
    digests_file = digests_path(path)
    content = io.BytesIO(files.read_bytes(digests_file))
    try:
      self._digests = np.load(content, allow_pickle=False)
    except (ValueError, EOFError) as e:
      raise ValueError(
        f"{digests_file}: not what data.tokenize writes: {e}"
      ) from e
    for file, count in ((path, len(self)), (digests_file, len(self._digests))):
      require(
        count == shards[name],
        f"{file}: found {count} documents, {METADATA} says {shards[name]}; "
        f"{_AGAIN}",
      )
    if len(self):
      first = self.key(0)
      require(
        digest(first) == self._digests[0],
        f"{path}: its first document is {first!r}, which "
        f"{digests_path(name)} is not of; {_AGAIN}",
      )

  def key(self, i: int) -> str:
    return self.read(i).key

  def read(self, i: int) -> TokenizedDocument:
    try:
      return decode_record(self.record(i), self._dtype)
    except ValueError as e:
      raise ValueError(f"{self.path}, record {i}: damaged: {e}") from e

  def digests(self) -> np.ndarray:
    return self._digests


def tokenized_files(corpus: Sequence[Document]) -> Iterator[TokenizedFile]:
  """The files of a corpus that have been tokenized."""
  return (f for f in files_of(corpus) if isinstance(f, TokenizedFile))


def check_tokenizer(
  corpus: Sequence[Document], tokenizer: Tokenizer | None
) -> None:
  """Checks that tokenized files are of this tokenizer; None is one to train."""
  found = "none, which would train one"
  if tokenizer is not None:
    found = f"{tokenizer.name} (sha256 {tokenizer.sha256[:12]})"
  for file in tokenized_files(corpus):
    name, sha256 = (file.metadata["tokenizer"][k] for k in ("file", "sha256"))
    require(
      tokenizer is not None and tokenizer.sha256 == sha256,
      f"source {file.folder}: was tokenized with {name} (sha256 "
      f"{sha256[:12]}), the tokenizer is {found}; expected "
      f"data.tokenizer={os.path.join(file.folder, name)}",
    )
