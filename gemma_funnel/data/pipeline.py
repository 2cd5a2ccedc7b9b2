"""Batches: an endless, checkpointable train iterator and a held-out set."""

from collections.abc import Sequence
import dataclasses
import functools
import os
from typing import Any
import zlib

import grain
from ml_collections import config_dict
import numpy as np

from gemma_funnel import buckets
from gemma_funnel.checks import require, require_int
from gemma_funnel.data import documents as documents_lib
from gemma_funnel.data import (
  files,
  mixture,
  packing,
  sources,
  tokenized,
  workers,
)
from gemma_funnel.data import tokenizer as tokenizer_lib
from gemma_funnel.data.documents import Document
from gemma_funnel.data.shards import VirtualShards

Batch = dict[str, np.ndarray]

TOKENIZER_FILE = "tokenizer.model"

_MOST_SEED = 2**32 - 1
_NO_THREADS = grain.ReadOptions(num_threads=0)


@dataclasses.dataclass(frozen=True)
class Corpus:
  """Documents of both splits and the tokenizer for them."""

  train: Sequence[Document]  # A `mixture.Mixture` if one is configured.
  heldout: Sequence[Document]  # Of a mixture, those of each entry in turn.
  tokenizer: tokenizer_lib.Tokenizer  # Ids are below the model's vocab_size.


@dataclasses.dataclass(frozen=True)
class HeldOut:
  """Batches of the held-out documents, and what a loss is divided by."""

  batches: tuple[Batch, ...]  # Shapes and fields of `train_iterator`'s.
  num_bytes: int  # UTF-8 bytes of the documents' text.
  # Predicted tokens in all batches: text tokens, and one EOS a document; BOS is
  # never predicted.
  num_tokens: int
  num_documents: int


def default_config() -> config_dict.ConfigDict:
  """The configuration of the data, every key with its default.

  Keys:
    source: "stdlib", or comma-separated globs of text, `.jsonl`, `.parquet`
      and `.array_record` files and of folders that `data.tokenize` wrote,
      local or of a bucket ("gs://.."), and "tfds:NAME[:VERSION][:SPLIT]".
    heldout: held-out files, named likewise; None splits `source` by a hash.
    heldout_fraction: share of `source` that the hash holds out.
    text_key: key of the text in a JSON object; column of the text.
    on_bad: "skip" leaves out rows of files that cannot be read, and tells of
      them; "error" ends with the first, of JSON lines before the first step.
    mixture: by name, dict(source=.., weight=..), and heldout and text_key where
      they differ. Replaces `source` and `heldout`. Weights are shares of the
      training tokens; they need not sum to 1.
    tokenizer: path of a SentencePiece model; None trains one on the corpus.
    lanes: virtual shards, the streams that the order of the data is made of; a
      multiple of the number of processes a run may ever have. Another number
      is another order.
    num_workers: processes that prepare batches, at most the shards of a
      process; 0 is none but the caller's.
    seed: of the order of the training data.
  """
  return config_dict.create(
    source=sources.STDLIB,
    heldout=config_dict.placeholder(str),
    heldout_fraction=0.1,
    text_key="text",
    on_bad="skip",
    mixture=config_dict.ConfigDict(),
    tokenizer=config_dict.placeholder(str),
    lanes=1,
    num_workers=0,
    seed=0,
  )


def load_corpus(
  cfg: Any, vocab_size: int, workdir: str | os.PathLike
) -> Corpus:
  """Reads both splits, and loads or trains their tokenizer.

  A tokenizer that has to be trained is kept as `workdir`/tokenizer.model, and
  read from there the next time.

  Args:
    cfg: an object with the attributes of `default_config()`.
    vocab_size: the model's; a trained tokenizer has as many pieces.
    workdir: the run's folder.

  Raises:
    ValueError: a key is missing or has no valid value, or files are not what
      they should be; see `sources.load_split`, `mixture.load_split` and
      `tokenizer.find_tokenizer`. A tokenized corpus is of another tokenizer.
  """
  # Version 0.1 had no such key.
  on_bad = getattr(cfg, "on_bad", files.ON_BAD[0])
  missing = [
    k for k in default_config() if k != "on_bad" and not hasattr(cfg, k)
  ]
  require(
    not missing,
    f"the data configuration lacks {missing}; expected the keys "
    f"{sorted(default_config())}",
  )
  require_int("data.lanes", cfg.lanes, 1)
  require_int("data.num_workers", cfg.num_workers, 0, workers.MOST)
  require_int("data.seed", cfg.seed, 0, _MOST_SEED)
  cache_path = os.path.join(workdir, TOKENIZER_FILE)
  # Before the corpus: a wrong tokenizer is found without reading it.
  tokenizer = tokenizer_lib.find_tokenizer(
    cfg.tokenizer, cache_path, vocab_size
  )
  if cfg.mixture:
    train, heldout = mixture.load_split(cfg, on_bad)
  else:
    train, heldout = sources.load_split(
      cfg.source,
      heldout=cfg.heldout,
      heldout_fraction=cfg.heldout_fraction,
      text_key=cfg.text_key,
      on_bad=on_bad,
    )
  for documents in (train, heldout):
    tokenized.check_tokenizer(documents, tokenizer)
  if tokenizer is None:
    tokenizer = tokenizer_lib.train(train, vocab_size, cache_path)
  return Corpus(train, heldout, tokenizer)


def fingerprints(cfg: Any) -> dict[str, str]:
  """What tells the text of a data configuration from what it was.

  By name of the file within its source, so that folders may move; what is only
  known by its name (TFDS) is left out.

  Raises:
    ValueError: a source that is not there.
  """
  parts = dict(cfg.mixture) if cfg.mixture else {"": cfg}
  found = {}
  for part, values in sorted(parts.items()):
    for key in ("source", "heldout"):
      if not (source := values.get(key)):
        continue
      name = ".".join(filter(None, (part, key)))
      files = sources.fingerprints(source)
      found |= {f"{name}:{file}": value for file, value in files.items()}
  return found


@dataclasses.dataclass(frozen=True)
class _MakeShard:
  """Makes the endless rows of a virtual shard s of S.

  They are of documents s, s + S, .. of each source, shuffled anew each epoch,
  cut into chunks, mixed and packed.
  """

  documents: Sequence[Document]
  chunk: packing.ChunkDocuments
  length: int
  seed: int
  num_shards: int

  def __call__(self, shard: int) -> grain.IterDataset:
    if isinstance(self.documents, mixture.Mixture):
      parts = self.documents.mixed
      chunks = mixture.MixChunks(
        {p.name: self._chunks(shard, p.documents, p.name) for p in parts},
        [p.weight for p in parts],
      )
    else:
      chunks = self._chunks(shard, self.documents)
    # Grain counts windows up from this seed, in 32 bits.
    shuffle_seed = self._seed(shard) % 2**31
    return packing.pack(chunks, self.length, shuffle_seed, self.num_shards)

  def _seed(self, shard: int, name: str = "") -> int:
    """The seed of a shard, or of a mixture's source in it.

    With one seed for all, shards of as many documents would read neighbours of
    each other at the same time.
    """
    if shard == 0 and not name:
      return self.seed
    entropy = (self.seed, shard, zlib.crc32(name.encode()))
    return int(np.random.SeedSequence(entropy).generate_state(1)[0]) >> 1

  def _chunks(
    self, shard: int, documents: Sequence[Document], name: str = ""
  ) -> grain.IterDataset:
    own = grain.MapDataset.source(documents)[shard :: self.num_shards]
    # seed() before shuffle(): with shuffle(seed), epoch 1 of seed 0 would have
    # the order of epoch 0 of seed 1.
    own = own.seed(self._seed(shard, name)).shuffle().repeat()
    of = documents_lib.files_of(documents)
    if any(buckets.is_remote(getattr(file, "path", "")) for file in of):
      options = grain.ReadOptions(num_threads=16, prefetch_buffer_size=64)
    else:
      options = _NO_THREADS  # They would wait for nothing.
    return self.chunk(own.to_iter_dataset(options))


def train_iterator(
  documents: Sequence[Document],
  tokenizer: tokenizer_lib.Tokenizer,
  *,
  batch_size: int,
  length: int,
  segment_alignment: int,
  seed: int,
  segment_padding: int = 0,
  num_shards: int | None = None,
  num_workers: int = 0,
  process_index: int = 0,
  process_count: int = 1,
) -> VirtualShards:
  """An endless iterator of packed batches for one process.

  Documents are dealt out to virtual shards, which are shuffled anew each epoch,
  cut into chunks and packed; `VirtualShards` describes how they make up batches
  and the state. With workers, call `close` when done.

  Args:
    documents: all training documents, in the same order in every process; a
      `mixture.Mixture` has its parts drawn by weight.
    tokenizer: what to encode them with.
    batch_size: rows of a batch of this process.
    length: T, tokens of a row; a multiple of `segment_alignment`.
    segment_alignment: segments start at multiples of it: the funnel's total
      stride, 1 without a funnel.
    seed: of all orders, in [0, 2**32).
    segment_padding: least padding after a segment; see `ChunkDocuments`.
    num_shards: a multiple of `process_count`; None is as many. The order
      depends on it, and on neither processes, batches nor workers.
    num_workers: processes that prepare rows ahead, at most the shards of this
      process; 0 prepares them in the caller's. Workers are spawned, so a
      script's entry point has to be guarded by `__name__ == "__main__"`.
    process_index: this process, in [0, process_count).
    process_count: processes that share the documents.

  Returns:
    An iterator of dicts of int32 arrays [batch_size, T]: "tokens" (0 is
    padding), "segment" (1, 2, .. within a row; 0 is padding), "position" (0, 1,
    .. within a segment; 0 at padding).

  Raises:
    ValueError: an argument out of range, fewer documents than shards, or a
      tokenized corpus of another tokenizer.
  """
  require_int("batch_size", batch_size, 1)
  require_int("seed", seed, 0, _MOST_SEED)
  require_int("num_workers", num_workers)
  require_int("process_count", process_count, 1)
  require_int("process_index", process_index, 0, process_count - 1)
  num_shards = process_count if num_shards is None else num_shards
  require_int("data.lanes", num_shards, 1)
  parts = [mixture.Part("", 1.0, documents)]
  for part in getattr(documents, "mixed", parts):
    where = f" of data.mixture.{part.name}" if part.name else ""
    require(
      len(part.documents) >= num_shards,
      f"{len(part.documents)} training documents{where} for data.lanes="
      f"{num_shards}: expected at least one a shard",
    )
  tokenized.check_tokenizer(documents, tokenizer)
  chunk = packing.ChunkDocuments(
    tokenizer, length, segment_alignment, segment_padding
  )
  return VirtualShards(
    _MakeShard(documents, chunk, length, seed, num_shards),
    num_shards=num_shards,
    batch_size=batch_size * process_count,
    process_index=process_index,
    process_count=process_count,
    num_workers=num_workers,
  )


def heldout_batches(
  documents: Sequence[Document],
  tokenizer: tokenizer_lib.Tokenizer,
  *,
  batch_size: int,
  length: int,
  segment_alignment: int,
  segment_padding: int = 0,
  max_documents: int | None = None,
) -> HeldOut:
  """Packs held-out documents into batches, the same ones every time.

  Arguments are those of `train_iterator`, but the last batch is filled up with
  rows of padding, and `max_documents` is the most documents used, evenly spaced
  in `documents`.

  Raises:
    ValueError: an argument out of range, no documents, or a tokenized corpus
      of another tokenizer.
  """
  require_int("batch_size", batch_size, 1)
  if max_documents is not None:
    require_int("max_documents", max_documents, 1)
  require(len(documents), "no held-out documents: expected at least one")
  tokenized.check_tokenizer(documents, tokenizer)
  count = min(max_documents or len(documents), len(documents))
  spread = (documents[i * len(documents) // count] for i in range(count))
  # Some formats do not tell which texts are empty.
  chosen = [document for document in spread if document.num_bytes]
  require(chosen, "the held-out documents are empty: expected one with text")
  chunk = packing.ChunkDocuments(
    tokenizer, length, segment_alignment, segment_padding
  )
  in_memory = grain.MapDataset.source(chosen).to_iter_dataset(_NO_THREADS)
  fill_up = functools.partial(
    grain.experimental.batch_and_pad, batch_size=batch_size
  )
  rows = packing.pack(chunk(in_memory), length)
  batches = tuple(rows.batch(batch_size, batch_fn=fill_up))
  predicted = [packing.predicted_mask(b["segment"]).sum() for b in batches]
  return HeldOut(
    batches=batches,
    num_bytes=sum(document.num_bytes for document in chosen),
    num_tokens=int(sum(predicted)),
    num_documents=len(chosen),
  )


def unigram_bits_per_byte(heldout: HeldOut) -> float:
  """The least bits per byte of any model that ignores the context.

  That is the entropy of the distribution of the predicted tokens themselves,
  times predicted tokens per byte.
  """
  targets = np.concatenate(
    [
      batch["tokens"][:, 1:][packing.predicted_mask(batch["segment"])]
      for batch in heldout.batches
    ]
  )
  counts = np.bincount(targets)
  p = counts[counts > 0] / len(targets)
  entropy_bits = -float(np.sum(p * np.log2(p)))
  return entropy_bits * heldout.num_tokens / heldout.num_bytes
