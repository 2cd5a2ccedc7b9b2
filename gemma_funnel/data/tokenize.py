"""Tokenizes a corpus once, for training to read ids instead of text.

  python -m gemma_funnel.data.tokenize --config=configs/tokenize.py

The folder it writes is complete or not there; `data.source` and `data.heldout`
take it, with the copy of the tokenizer in it as `data.tokenizer`. Documents
keep their keys and their order, so that splits and batches are those of the
text. The same command goes on with shards where it was interrupted.
"""

from collections.abc import Iterator, Sequence
import contextlib
import dataclasses
import json
import os
import pathlib
import time
from typing import Any

import numpy as np

from gemma_funnel import atomic, buckets, cli, inputs, locks
from gemma_funnel.checks import require, require_int
from gemma_funnel.data import sources, tokenized, workers
from gemma_funnel.data.documents import Document, digest
from gemma_funnel.data.tokenizer import Tokenizer

# Documents that a worker is given at a time.
_BLOCK_DOCUMENTS = 64
_PROGRESS_SECONDS = 10.0
_PLAN = "plan.json"


@dataclasses.dataclass(frozen=True)
class _Encoder:
  """Encodes blocks of documents, here or in a worker."""

  documents: Sequence[Document]
  tokenizer: Tokenizer
  blocks: Sequence[range]

  def __call__(self) -> Iterator[list[tuple[bytes, int, int, int]]]:
    """Of each document its record, digest, and numbers of tokens and bytes."""
    dtype = tokenized.dtype_for(self.tokenizer.vocab_size)
    for block in self.blocks:
      encoded = []
      for document in map(self.documents.__getitem__, block):
        ids = self.tokenizer.encode(document.text)
        record = tokenized.encode_record(document, ids, dtype)
        key_digest = digest(document.key)
        encoded.append((record, key_digest, len(ids), document.num_bytes))
      yield encoded


def _encode(
  documents: Sequence[Document],
  tokenizer: Tokenizer,
  blocks: Sequence[range],
  num_workers: int,
) -> Iterator[list[tuple[bytes, int, int, int]]]:
  """Encodes blocks in their order; workers take turns at them."""
  if not num_workers:
    yield from _Encoder(documents, tokenizer, blocks)()
    return
  dealt = [blocks[w::num_workers] for w in range(num_workers)]
  made = workers.Workers(
    [_Encoder(documents, tokenizer, own) for own in dealt], ahead=4
  )
  with contextlib.closing(made):
    for i in range(len(blocks)):
      yield made.take(i % num_workers)


class _Progress:
  """Lines with the documents and tokens of a second, and the time left."""

  def __init__(self, total: int, done: int):
    self._total, self._first, self._done = total, done, done
    self._tokens = 0
    self._start = self._said = time.monotonic()

  def add(self, documents: int, tokens: int) -> None:
    self._done += documents
    self._tokens += tokens
    if time.monotonic() - self._said > _PROGRESS_SECONDS:
      self.say()

  def say(self) -> None:
    self._said = time.monotonic()
    seconds = max(self._said - self._start, 1e-9)
    rate = (self._done - self._first) / seconds
    left = (self._total - self._done) / rate if rate else 0.0
    cli.say(
      f"tokenized {self._done:,}/{self._total:,} documents  {rate:,.0f} "
      f"documents/s  {self._tokens / seconds:,.0f} tokens/s  ETA {left:,.0f} s"
    )


def _write_json(path: pathlib.Path, content: Any) -> None:
  atomic.write_text(path, json.dumps(content, indent=2))


def _begin(folder: pathlib.Path, plan: dict[str, Any]) -> None:
  """Makes the folder that is written, or goes on with that of this plan."""
  path = folder / _PLAN
  if not path.exists():
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(path, plan)
    return
  found = json.loads(inputs.read_bytes(path, inputs.MAX_JSON))
  files_then = found.get("files", plan["files"])  # Version 0.1 kept none.
  changed = [n for n, v in plan["files"].items() if files_then.get(n) != v]
  require(
    not changed,
    f"{folder}: the source is not what it was when this was begun: "
    f"{', '.join(changed[:5])}; put it back, or delete the folder",
  )
  plan = {k: v for k, v in plan.items() if k != "files"}
  differ = {k: found.get(k) for k in sorted(plan) if found.get(k) != plan[k]}
  require(
    not differ,
    f"{folder}: was begun with other values of {list(differ)}, found "
    f"{differ}; delete it, or go on with those",
  )


@dataclasses.dataclass(frozen=True)
class _Shard:
  """A shard to write: documents [start, end) as an array_record."""

  path: pathlib.Path
  start: int
  end: int

  @property
  def numbers_path(self) -> pathlib.Path:
    """Its numbers, which are written last, when the shard is whole."""
    return self.path.parent / f"{self.path.name}.json"

  def blocks(self) -> Iterator[range]:
    for at in range(self.start, self.end, _BLOCK_DOCUMENTS):
      yield range(at, min(at + _BLOCK_DOCUMENTS, self.end))

  def write(self, encoded: Iterator[list], progress: _Progress) -> None:
    """Writes the records of its blocks, their digests, and its numbers."""
    from array_record.python import array_record_module

    digests, tokens, num_bytes = [], 0, 0
    with atomic.replacing(self.path) as beside:
      # Groups of one record are read one by one without reading others.
      writer = array_record_module.ArrayRecordWriter(
        str(beside), "group_size:1"
      )
      with contextlib.closing(writer):
        for _ in self.blocks():
          block = next(encoded)
          for record, key_digest, ids, size in block:
            writer.write(record)
            digests.append(key_digest)
            tokens, num_bytes = tokens + ids, num_bytes + size
          progress.add(len(block), sum(ids for _, _, ids, _ in block))
    np.save(
      tokenized.digests_path(str(self.path)), np.asarray(digests, np.uint64)
    )
    numbers = {
      "file": self.path.name,
      "documents": len(digests),
      "tokens": tokens,
      "bytes": num_bytes,
    }
    _write_json(self.numbers_path, numbers)


def _write_shards(
  shards: list[_Shard], documents: Sequence[Document], tokenizer, num_workers
) -> list[dict[str, Any]]:
  """Writes the shards that are not there yet; the numbers of all."""
  todo = [shard for shard in shards if not shard.numbers_path.exists()]
  left = sum(shard.end - shard.start for shard in todo)
  progress = _Progress(len(documents), len(documents) - left)
  blocks = [block for shard in todo for block in shard.blocks()]
  encoded = _encode(documents, tokenizer, blocks, num_workers)
  with contextlib.closing(encoded):
    for shard in todo:
      shard.write(encoded, progress)
  progress.say()
  return [json.loads(shard.numbers_path.read_text()) for shard in shards]


def tokenize(config: Any) -> dict[str, Any]:
  """Writes a corpus of ids; see the module and configs/tokenize.py.

  Returns:
    The content of metadata.json: "format"; "source" and "text_key", for the
    reader; "tokenizer" with its "file" in the folder, "sha256" and
    "vocab_size"; "dtype" of ids; "documents", "tokens" (without BOS and EOS)
    and "bytes" (of text); and "shards", each with its "file" and these three.

  Raises:
    ValueError: a key has no valid value, the folder is there already or was
      begun with other values, or a document cannot be read.
  """
  for key in ("tokenizer", "out"):
    require(config[key], f"{key} is not set; expected a path")
  require_int("shards", config.shards, 1)
  require_int("num_workers", config.num_workers, 0, workers.MOST)
  out = config.out
  require(
    not buckets.is_remote(out),
    f"out={out!r}: expected a local folder, to be copied from there",
  )
  path = pathlib.Path(os.path.abspath(out))
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise ValueError(
      f"out={out!r}: cannot be written: {error.strerror}"
    ) from error
  with locks.Lock(path.with_name(f".{path.name}.lock"), f"out={out}"):
    require(
      not os.path.exists(out),
      f"out={out!r}: is there already; expected nothing",
    )
    return _tokenize(config)


def _tokenize(config: Any) -> dict[str, Any]:
  out, count = config.out, config.shards
  tokenizer = Tokenizer.load(config.tokenizer)
  documents = sources.load(config.source, config.text_key, config.on_bad)
  require(
    len(documents) >= count,
    f"shards={count} of {len(documents)} documents in {config.source!r}: "
    "expected at least one each",
  )
  for file in tokenized.tokenized_files(documents):
    raise ValueError(
      f"source {file.folder}: is tokenized already; expected text"
    )
  folder = pathlib.Path(f"{os.path.normpath(out)}.partial")
  about = {"source": config.source, "text_key": config.text_key}
  plan = about | {
    "tokenizer": tokenizer.sha256,
    "shards": count,
    "documents": len(documents),
    "files": sources.fingerprints(config.source),
  }
  _begin(folder, plan)
  bounds = [i * len(documents) // count for i in range(count + 1)]
  shards = [
    _Shard(folder / f"tokens-{i:05d}-of-{count:05d}.array_record", *span)
    for i, span in enumerate(zip(bounds, bounds[1:], strict=False))
  ]
  numbers = _write_shards(shards, documents, tokenizer, config.num_workers)
  name = "tokenizer.json" if tokenizer.is_json else "tokenizer.model"
  metadata = {
    "format": tokenized.FORMAT,
    **about,
    "files": plan["files"],
    "tokenizer": {
      "file": name,
      "sha256": tokenizer.sha256,
      "vocab_size": tokenizer.vocab_size,
    },
    "dtype": tokenized.dtype_for(tokenizer.vocab_size).str,
    **{
      key: sum(shard[key] for shard in numbers)
      for key in ("documents", "tokens", "bytes")
    },
    "shards": numbers,
  }
  tokenizer.save(folder)
  for shard in shards:
    shard.numbers_path.unlink()
  _write_json(folder / tokenized.METADATA, metadata)
  (folder / _PLAN).unlink()
  os.rename(folder, out)
  return metadata


def _run(config: Any) -> None:
  metadata = tokenize(config)
  cli.say(
    f"{config.out}: {metadata['documents']:,} documents, "
    f"{metadata['tokens']:,} tokens in {len(metadata['shards'])} shards; read "
    f"them with --config.data.source={config.out} --config.data.tokenizer="
    f"{os.path.join(config.out, metadata['tokenizer']['file'])}"
  )


if __name__ == "__main__":
  cli.main(_run, "-m gemma_funnel.data.tokenize")
