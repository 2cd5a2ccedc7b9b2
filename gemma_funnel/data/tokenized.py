"""Corpora of token ids: what `data.tokenize` writes, and how it is read.

A folder has array_record shards, the digests of their documents' keys (by
which a corpus is split without reading it), a copy of the tokenizer and
metadata.json. A record is a header, the key and the ids, in the corpus' order.
"""

from collections.abc import Sequence
import io
import json
import os
import struct
from typing import Any

from etils import epath
import numpy as np

from gemma_funnel.data import documents, files
from gemma_funnel.data import tokenizer as tokenizer_lib

METADATA = "metadata.json"
_FORMAT = "gemma_funnel tokens 1"
# Bytes of the key; UTF-8 bytes of the text. Ids follow the key.
_HEADER = struct.Struct("<IQ")


def dtype_for(vocab_size: int) -> np.dtype:
  """The smallest type of ids below `vocab_size` that is written."""
  return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def encode_record(
  document: documents.Document, ids: Sequence[int], dtype: np.dtype
) -> bytes:
  """The record of a document."""
  key = document.key.encode()
  header = _HEADER.pack(len(key), document.num_bytes)
  return header + key + np.asarray(ids, dtype).tobytes()


def decode_record(
  record: bytes, dtype: np.dtype
) -> documents.TokenizedDocument:
  """The document of a record.

  Raises:
    ValueError: its sizes cannot be.
  """
  if len(record) < _HEADER.size:
    raise ValueError(f"found {len(record)} bytes, expected a header")
  key_size, num_bytes = _HEADER.unpack_from(record)
  start = _HEADER.size + key_size
  if len(record) < start or (len(record) - start) % dtype.itemsize:
    raise ValueError(
      f"found {len(record)} bytes, expected {start} and ids of "
      f"{dtype.itemsize} bytes"
    )
  key = record[_HEADER.size : start].decode()
  tokens = np.frombuffer(record, dtype, offset=start)
  return documents.TokenizedDocument(key, tokens, num_bytes)


def digests_path(path: str) -> str:
  """The file of a shard's digests."""
  return path.removesuffix(".array_record") + ".digests.npy"


def is_tokenized(folder: str) -> bool:
  """Whether a folder is a corpus that `data.tokenize` wrote."""
  path = os.path.join(folder, METADATA)
  if not files.is_file(path):
    return False
  try:
    metadata = json.loads(files.read_bytes(path))
  except ValueError:
    return False  # Of somebody else.
  return isinstance(metadata, dict) and metadata.get("format") == _FORMAT


def read_metadata(folder: str) -> dict[str, Any]:
  """What `data.tokenize` says of a folder: see `metadata_of`."""
  return json.loads(files.read_bytes(os.path.join(folder, METADATA)))


def metadata_of(
  tokenizer: tokenizer_lib.Tokenizer, shards: list[dict[str, Any]], **about
) -> dict[str, Any]:
  """The content of metadata.json.

  Args:
    tokenizer: what the ids are of.
    shards: of each "file", "documents", "tokens" (without BOS and EOS) and
      "bytes" (of text).
    **about: "source" and "text_key", for the reader.
  """
  total = lambda name: sum(shard[name] for shard in shards)
  return {
    "format": _FORMAT,
    **about,
    "tokenizer": {
      "file": tokenizer_file(tokenizer),
      "sha256": tokenizer.sha256,
      "vocab_size": tokenizer.vocab_size,
    },
    "dtype": dtype_for(tokenizer.vocab_size).str,
    "documents": total("documents"),
    "tokens": total("tokens"),
    "bytes": total("bytes"),
    "shards": shards,
  }


def tokenizer_file(tokenizer: tokenizer_lib.Tokenizer) -> str:
  """What the copy of a tokenizer is called in the folder."""
  is_json = tokenizer.content.lstrip().startswith(b"{")
  return "tokenizer.json" if is_json else "tokenizer.model"


class TokenizedFile(files.RecordFile):
  """One shard."""

  def __init__(self, path: str):
    """Opens a shard by the metadata beside it.

    Raises:
      ValueError: it is not one of those named there, or is damaged.
    """
    self.folder = os.path.dirname(path)
    self.metadata = read_metadata(self.folder)
    shards = {shard["file"]: shard for shard in self.metadata["shards"]}
    name = os.path.basename(path)
    if name not in shards:
      raise ValueError(
        f"{path}: {METADATA} names no such shard; found {sorted(shards)[:4]}"
      )
    super().__init__(path)
    self._dtype = np.dtype(self.metadata["dtype"])
    self._digests = self._read_digests()
    for what, count in (
      (path, len(self)),
      (digests_path(path), len(self._digests)),
    ):
      if count != shards[name]["documents"]:
        raise ValueError(
          f"{what}: found {count} documents, {METADATA} says "
          f"{shards[name]['documents']}; copy or tokenize the corpus again"
        )
    if len(self) and documents.digest(self.key(0)) != self._digests[0]:
      raise ValueError(
        f"{path}: its first document is {self.key(0)!r}, which "
        f"{digests_path(name)} is not of; copy or tokenize the corpus again"
      )

  def _read_digests(self) -> np.ndarray:
    path = digests_path(self.path)
    content = io.BytesIO(files.read_bytes(path))
    try:
      return np.load(content, allow_pickle=False)
    except (ValueError, EOFError) as e:
      raise ValueError(f"{path}: not what data.tokenize writes: {e}") from e

  def key(self, i: int) -> str:
    return self.read(i).key

  def read(self, i: int) -> documents.TokenizedDocument:
    try:
      return decode_record(self.record(i), self._dtype)
    except ValueError as e:
      raise ValueError(f"{self.path}, record {i}: damaged: {e}") from e

  def digests(self) -> np.ndarray:
    return self._digests


def shard_paths(folder: str) -> list[str]:
  """All shards of a folder.

  Raises:
    ValueError: one is missing.
  """
  names = [shard["file"] for shard in read_metadata(folder)["shards"]]
  missing = [n for n in names if not files.is_file(os.path.join(folder, n))]
  if missing:
    raise ValueError(
      f"{folder}: {len(missing)} of {len(names)} shards are missing, such as "
      f"{missing[0]}; copy or tokenize the corpus again"
    )
  return [os.path.join(folder, name) for name in names]


def check_tokenizer(
  corpus: Sequence[documents.Document],
  tokenizer: tokenizer_lib.Tokenizer | None,
) -> None:
  """Checks that tokenized files are of this tokenizer.

  Args:
    corpus: any documents.
    tokenizer: the one in use; None is one that is yet to be trained.

  Raises:
    ValueError: they are of another one; it names both.
  """
  for file in documents.files_of(corpus):
    if not isinstance(file, TokenizedFile):
      continue
    made_by = file.metadata["tokenizer"]
    if tokenizer is not None and tokenizer.sha256 == made_by["sha256"]:
      continue
    found = "none, which would train one"
    if tokenizer is not None:
      found = f"{tokenizer.name} (sha256 {tokenizer.sha256[:12]})"
    raise ValueError(
      f"source {file.folder}: was tokenized with {made_by['file']} (sha256 "
      f"{made_by['sha256'][:12]}), the tokenizer is {found}; expected "
      f"data.tokenizer={os.path.join(file.folder, made_by['file'])}"
    )


def write_bytes(path: str, content: bytes) -> None:
  """Writes a file that is either whole or not there."""
  temporary = epath.Path(f"{path}.tmp")
  temporary.write_bytes(content)
  temporary.replace(path)


def check_is_text(corpus: Sequence[documents.Document]) -> None:
  """Checks that a corpus has not been tokenized.

  Raises:
    ValueError: a part of it has.
  """
  for file in documents.files_of(corpus):
    if isinstance(file, TokenizedFile):
      raise ValueError(
        f"source {file.folder}: is tokenized already; expected text"
      )
