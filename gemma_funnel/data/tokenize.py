"""Tokenizes a corpus once, for training to read ids instead of text.

  python -m gemma_funnel.data.tokenize --config=configs/tokenize.py

The folder it writes is complete or not there; `data.source` and `data.heldout`
take it, with the copy of the tokenizer in it as `data.tokenizer`. Documents
keep their keys and their order, so that splits and batches are those of the
text. The same command goes on with shards where it was interrupted.
"""

from collections.abc import Iterator, Sequence
import json
import os
import pathlib
import time
from typing import Any

import numpy as np

from gemma_funnel import cli
from gemma_funnel.data import files, sources, tokenized, workers
from gemma_funnel.data import tokenizer as tokenizer_lib
from gemma_funnel.data.documents import Document, digest

# Documents that a worker is given at a time.
_BLOCK_DOCUMENTS = 64
_PROGRESS_SECONDS = 10.0
_PLAN = "plan.json"

# What a worker works with: the documents, the tokenizer and the ids' type.
_state: dict[str, Any] = {}


def _start(documents, tokenizer, dtype) -> None:
  _state.update(documents=documents, tokenizer=tokenizer, dtype=dtype)


def _encode(block: range) -> list[tuple[bytes, int, int, int]]:
  """Of each document its record, digest, and numbers of tokens and bytes."""
  encoded = []
  for i in block:
    document = _state["documents"][i]
    ids = _state["tokenizer"].encode(document.text)
    record = tokenized.encode_record(document, ids, _state["dtype"])
    encoded.append((record, digest(document.key), len(ids), document.num_bytes))
  return encoded


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


def _check(config: Any) -> None:
  for key in ("tokenizer", "out"):
    if not config[key]:
      raise ValueError(f"{key} is not set; expected a path")
  for key, least in (("shards", 1), ("num_workers", 0)):
    value = config[key]
    if not isinstance(value, int) or value < least:
      raise ValueError(f"{key}={value!r}: expected an integer >= {least}")
  if files.is_remote(config.out):
    raise ValueError(
      f"out={config.out!r}: expected a local folder, to be copied from there"
    )
  if os.path.exists(config.out):
    raise ValueError(f"out={config.out!r}: is there already; expected nothing")


def _claim(folder: pathlib.Path, plan: dict[str, Any]) -> None:
  """Makes the folder that is written, or goes on with that of this plan."""
  path = folder / _PLAN
  if path.exists():
    found = json.loads(path.read_text())
    differ = sorted(key for key in plan if found.get(key) != plan[key])
    if differ:
      raise ValueError(
        f"{folder}: was begun with other values of {differ}, such as "
        f"{differ[0]}={found.get(differ[0])!r}; delete it, or go on with those"
      )
    return
  folder.mkdir(parents=True, exist_ok=True)
  tokenized.write_bytes(str(path), json.dumps(plan, indent=2).encode())


def _shard_name(index: int, count: int) -> str:
  return f"tokens-{index:05d}-of-{count:05d}.array_record"


def _finished(folder: pathlib.Path, name: str) -> dict[str, Any] | None:
  """What is known of a shard that is whole: its numbers are written last."""
  path = folder / f"{name}.json"
  return json.loads(path.read_text()) if path.exists() else None


def _write_shard(
  folder: pathlib.Path, name: str, blocks: Iterator[list], progress: _Progress
) -> dict[str, Any]:
  """Writes the records of a shard, their digests, and their numbers last."""
  from array_record.python import array_record_module

  digests, tokens, num_bytes = [], 0, 0
  # Groups of one record are read one by one without reading others.
  writer = array_record_module.ArrayRecordWriter(
    str(folder / f"{name}.tmp"), "group_size:1"
  )
  try:
    for block in blocks:
      for record, key_digest, ids, size in block:
        writer.write(record)
        digests.append(key_digest)
        tokens, num_bytes = tokens + ids, num_bytes + size
      progress.add(len(block), sum(ids for _, _, ids, _ in block))
  finally:
    writer.close()
  path = folder / name
  os.replace(f"{path}.tmp", path)
  with open(tokenized.digests_path(str(path)), "wb") as f:
    np.save(f, np.asarray(digests, np.uint64))
  numbers = {
    "file": name,
    "documents": len(digests),
    "tokens": tokens,
    "bytes": num_bytes,
  }
  tokenized.write_bytes(f"{path}.json", json.dumps(numbers).encode())
  return numbers


def _blocks(bounds: Sequence[int], todo: Sequence[int]) -> Iterator[range]:
  for shard in todo:
    start, end = bounds[shard], bounds[shard + 1]
    for at in range(start, end, _BLOCK_DOCUMENTS):
      yield range(at, min(at + _BLOCK_DOCUMENTS, end))


def _write_shards(
  folder: pathlib.Path, documents: Sequence[Document], tokenizer, config
) -> list[dict[str, Any]]:
  """Writes the shards that are not there yet; the numbers of all."""
  count = config.shards
  bounds = [i * len(documents) // count for i in range(count + 1)]
  names = [_shard_name(i, count) for i in range(count)]
  numbers = {i: _finished(folder, name) for i, name in enumerate(names)}
  todo = [i for i in range(count) if numbers[i] is None]
  done = sum(n["documents"] for n in numbers.values() if n)
  progress = _Progress(len(documents), done)
  encoded = workers.ordered_map(
    _encode,
    _blocks(bounds, todo),
    config.num_workers,
    _start,
    (documents, tokenizer, tokenized.dtype_for(tokenizer.vocab_size)),
  )
  for i in todo:
    size = bounds[i + 1] - bounds[i]
    blocks = (next(encoded) for _ in range(0, size, _BLOCK_DOCUMENTS))
    numbers[i] = _write_shard(folder, names[i], blocks, progress)
  encoded.close()
  progress.say()
  return [numbers[i] for i in range(count)]


def tokenize(config: Any) -> dict[str, Any]:
  """Writes a corpus of ids; see the module.

  Args:
    config: as in configs/tokenize.py.

  Returns:
    What metadata.json says: see `tokenized.metadata_of`.

  Raises:
    ValueError: a key has no valid value, the folder is there already or was
      begun with other values, or a document cannot be read.
  """
  _check(config)
  tokenizer = tokenizer_lib.Tokenizer.load(config.tokenizer)
  documents = sources.load(config.source, config.text_key)
  if len(documents) < config.shards:
    raise ValueError(
      f"shards={config.shards} of {len(documents)} documents in "
      f"{config.source!r}: expected at least one each"
    )
  tokenized.check_is_text(documents)
  folder = pathlib.Path(f"{os.path.normpath(config.out)}.partial")
  about = {"source": config.source, "text_key": config.text_key}
  plan = {
    **about,
    "tokenizer": tokenizer.sha256,
    "shards": config.shards,
    "documents": len(documents),
  }
  _claim(folder, plan)
  shards = _write_shards(folder, documents, tokenizer, config)
  metadata = tokenized.metadata_of(tokenizer, shards, **about)
  copy = folder / tokenized.tokenizer_file(tokenizer)
  tokenized.write_bytes(str(copy), tokenizer.content)
  for shard in shards:
    (folder / f"{shard['file']}.json").unlink(missing_ok=True)
  content = json.dumps(metadata, indent=2).encode()
  tokenized.write_bytes(str(folder / tokenized.METADATA), content)
  (folder / _PLAN).unlink()
  os.rename(folder, config.out)
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
  cli.main(_run)
