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

from gemma_funnel.data import documents as documents_lib
from gemma_funnel.data import files, mixture, packing, sources, tokenized
from gemma_funnel.data import tokenizer as tokenizer_lib
from gemma_funnel.data.lanes import Lanes

Batch = dict[str, np.ndarray]

TOKENIZER_FILE = "tokenizer.model"


@dataclasses.dataclass(frozen=True)
class Corpus:
  """Documents of both splits and the tokenizer for them.

  Attributes:
    train: documents to train on; a `mixture.Mixture` if one is configured.
    heldout: documents to evaluate on, of a mixture those of each entry in turn.
    tokenizer: ids are below the model's vocab_size.
  """

  train: Sequence[sources.Document]
  heldout: Sequence[sources.Document]
  tokenizer: tokenizer_lib.Tokenizer


@dataclasses.dataclass(frozen=True)
class HeldOut:
  """Batches of the held-out documents, and what a loss is divided by.

  Attributes:
    batches: of the same shapes and fields as those of `train_iterator`.
    num_bytes: UTF-8 bytes of the documents' text.
    num_tokens: predicted tokens in all batches: text tokens, and one EOS a
      document; BOS is never predicted.
    num_documents: documents in the batches.
  """

  batches: tuple[Batch, ...]
  num_bytes: int
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
    mixture: by name, dict(source=.., weight=..), and heldout and text_key where
      they are others than of the rest. Weights are shares of the tokens that
      are trained on; they need not sum to 1. Instead of `source` and `heldout`.
    tokenizer: path of a SentencePiece model; None trains one on the corpus.
    lanes: streams that the order of the data is made of, a multiple of the
      number of processes a run may ever have. It is the run's: another number
      is another order.
    num_workers: processes that prepare batches, at most the lanes of a process;
      0 is none but the caller's.
    seed: of the order of the training data.
  """
  return config_dict.create(
    source=sources.STDLIB,
    heldout=config_dict.placeholder(str),
    heldout_fraction=0.1,
    text_key="text",
    mixture=config_dict.ConfigDict(),
    tokenizer=config_dict.placeholder(str),
    lanes=1,
    num_workers=0,
    seed=0,
  )


def _require_int(
  name: str, value: Any, least: int, below: int | None = None
) -> None:
  ok = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
  if not ok or value < least or (below is not None and value >= below):
    upper = "" if below is None else f" and < {below}"
    raise ValueError(f"{name}={value!r}: expected an integer >= {least}{upper}")


def _check_config(cfg: Any) -> None:
  missing = [key for key in default_config() if not hasattr(cfg, key)]
  if missing:
    raise ValueError(
      f"the data configuration lacks {missing}; expected the keys "
      f"{sorted(default_config())}"
    )
  _require_int("data.lanes", cfg.lanes, 1)
  _require_int("data.num_workers", cfg.num_workers, 0)
  _require_int("data.seed", cfg.seed, 0, 2**32)


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

  Returns:
    The corpus.

  Raises:
    ValueError: a key is missing or has no valid value, or files are not what
      they should be; see `sources.load_split`, `mixture.load_split` and
      `tokenizer.get_tokenizer`. A tokenized corpus is of another tokenizer.
  """
  _check_config(cfg)
  cache_path = os.path.join(workdir, TOKENIZER_FILE)
  # Before the corpus: a wrong tokenizer is found without reading it.
  tokenizer = tokenizer_lib.find_tokenizer(
    cfg.tokenizer, cache_path, vocab_size
  )
  if cfg.mixture:
    train, heldout = mixture.load_split(cfg)
  else:
    train, heldout = sources.load_split(
      cfg.source,
      heldout=cfg.heldout,
      heldout_fraction=cfg.heldout_fraction,
      text_key=cfg.text_key,
    )
  for documents in (train, heldout):
    tokenized.check_tokenizer(documents, tokenizer)
  if tokenizer is None:
    tokenizer = tokenizer_lib.train(train, vocab_size, cache_path)
  return Corpus(train, heldout, tokenizer)


def _read(documents: Sequence[sources.Document]) -> grain.ReadOptions:
  """How documents are read: ahead, by threads, where a read has to wait."""
  paths = (
    getattr(file, "path", "") for file in documents_lib.files_of(documents)
  )
  if any(map(files.is_remote, paths)):
    return grain.ReadOptions(num_threads=16, prefetch_buffer_size=64)
  return grain.ReadOptions(num_threads=0)


def _seed_of(seed: int, lane: int, name: str) -> int:
  """The seed of a lane, or of a mixture's source in it, below 2**31.

  With one seed for all, lanes of as many documents would read neighbours of
  each other at the same time.
  """
  if lane == 0 and not name:
    return seed
  entropy = (seed, lane, zlib.crc32(name.encode()))
  return int(np.random.SeedSequence(entropy).generate_state(1)[0]) >> 1


def _make_lane(
  lane: int,
  lanes: int,
  documents: Sequence[sources.Document],
  tokenizer: tokenizer_lib.Tokenizer,
  seed: int,
  shape: dict[str, int],
) -> grain.IterDataset:
  """The endless rows of a lane.

  Of documents l, l + lanes, .. of each source, shuffled anew each epoch, cut
  into chunks, mixed and packed.
  """

  def chunks(name, part):
    mine = grain.MapDataset.source(part)[lane::lanes]
    # seed() before shuffle(): with shuffle(seed), epoch 1 of seed 0 would have
    # the order of epoch 0 of seed 1.
    mine = mine.seed(_seed_of(seed, lane, name)).shuffle().repeat()
    return packing.chunks(mine.to_iter_dataset(_read(part)), tokenizer, **shape)

  if isinstance(documents, mixture.Mixture):
    mixed = mixture.MixChunks(
      {
        part.name: chunks(part.name, part.documents) for part in documents.mixed
      },
      [part.weight for part in documents.mixed],
    )
  else:
    mixed = chunks("", documents)
  # Grain counts windows up from this seed, in 32 bits.
  shuffle_seed = _seed_of(seed, lane, "") % 2**31
  return packing.pack_chunks(
    mixed, length=shape["length"], shuffle_seed=shuffle_seed, lanes=lanes
  )


def _check_lanes(documents: Sequence[sources.Document], lanes: int) -> None:
  parts = [mixture.Part("", 1.0, documents)]
  if isinstance(documents, mixture.Mixture):
    parts = documents.mixed
  for part in parts:
    if len(part.documents) < lanes:
      where = f" of data.mixture.{part.name}" if part.name else ""
      raise ValueError(
        f"{len(part.documents)} training documents{where} for data.lanes="
        f"{lanes}: expected at least one a lane"
      )


def train_iterator(
  documents: Sequence[sources.Document],
  tokenizer: tokenizer_lib.Tokenizer,
  *,
  batch_size: int,
  length: int,
  align: int,
  seed: int,
  gap: int = 0,
  lanes: int | None = None,
  num_workers: int = 0,
  process_index: int = 0,
  process_count: int = 1,
) -> Lanes:
  """An endless iterator of packed batches for one process.

  Documents are dealt out to lanes, which are shuffled anew each epoch, cut into
  chunks and packed; see `lanes.Lanes` for how batches are made of them, and for
  the state. With workers, call `close` when done.

  Args:
    documents: all training documents, in the same order in every process; a
      `mixture.Mixture` has its parts drawn by weight.
    tokenizer: what to encode them with.
    batch_size: rows of a batch of this process.
    length: T, tokens of a row; a multiple of `align`.
    align: segments start at multiples of it: the funnel's total stride, 1
      without a funnel.
    seed: of all orders, in [0, 2**32).
    gap: padding after each segment at least, as `packing.pack` takes it.
    lanes: a multiple of `process_count`; None is as many. The order depends on
      it, and on neither processes, batches nor workers.
    num_workers: processes that prepare rows ahead, at most the lanes of this
      process; 0 prepares them in the caller's. Workers are spawned, so a
      script's entry point has to be guarded by `__name__ == "__main__"`.
    process_index: this process, in [0, process_count).
    process_count: processes that share the documents.

  Returns:
    An iterator of dicts of int32 arrays [batch_size, T]: "tokens" (0 is
    padding), "segment" (1, 2, .. within a row; 0 is padding), "position" (0, 1,
    .. within a segment; 0 at padding).

  Raises:
    ValueError: an argument out of range, fewer documents than lanes, or a
      tokenized corpus of another tokenizer.
  """
  packing.check_lengths(length, align)
  _require_int("batch_size", batch_size, 1)
  _require_int("seed", seed, 0, 2**32)
  _require_int("num_workers", num_workers, 0)
  _require_int("process_count", process_count, 1)
  _require_int("process_index", process_index, 0, process_count)
  lanes = process_count if lanes is None else lanes
  _require_int("data.lanes", lanes, 1)
  _check_lanes(documents, lanes)
  tokenized.check_tokenizer(documents, tokenizer)
  make_lane = functools.partial(
    _make_lane,
    lanes=lanes,
    documents=documents,
    tokenizer=tokenizer,
    seed=seed,
    shape=dict(length=length, align=align, gap=gap),
  )
  return Lanes(
    make_lane,
    lanes=lanes,
    batch_size=batch_size * process_count,
    process_index=process_index,
    process_count=process_count,
    num_workers=num_workers,
  )


def _spread(
  documents: Sequence[sources.Document], count: int | None
) -> list[sources.Document]:
  """All documents, or `count` of them, evenly spaced in the order given."""
  if count is None or count >= len(documents):
    return list(documents)
  return [documents[i * len(documents) // count] for i in range(count)]


def heldout_batches(
  documents: Sequence[sources.Document],
  tokenizer: tokenizer_lib.Tokenizer,
  *,
  batch_size: int,
  length: int,
  align: int,
  gap: int = 0,
  max_documents: int | None = None,
) -> HeldOut:
  """Packs held-out documents into batches, the same ones every time.

  Args:
    documents: the held-out split.
    tokenizer: what to encode them with.
    batch_size: B; the last batch is filled up with rows of padding.
    length: T, tokens of a row; a multiple of `align`.
    align: segments start at multiples of it.
    gap: padding after each segment at least, as `packing.pack` takes it.
    max_documents: use so many documents at most, evenly spaced in `documents`.

  Returns:
    Batches as those of `train_iterator`, with the number of bytes and of
    predicted tokens in them.

  Raises:
    ValueError: an argument out of range, no documents, or a tokenized corpus
      of another tokenizer.
  """
  packing.check_lengths(length, align)
  _require_int("batch_size", batch_size, 1)
  if max_documents is not None:
    _require_int("max_documents", max_documents, 1)
  if not documents:
    raise ValueError("no held-out documents: expected at least one")
  tokenized.check_tokenizer(documents, tokenizer)
  # Some formats do not tell which texts are empty.
  chosen = [d for d in _spread(documents, max_documents) if d.num_bytes]
  if not chosen:
    raise ValueError("the held-out documents are empty: expected one with text")
  rows = packing.pack(
    grain.MapDataset.source(chosen).to_iter_dataset(
      grain.ReadOptions(num_threads=0)  # They are in memory.
    ),
    tokenizer,
    length=length,
    align=align,
    gap=gap,
  )
  fill_up = functools.partial(
    grain.experimental.batch_and_pad, batch_size=batch_size
  )
  batches = tuple(rows.batch(batch_size, batch_fn=fill_up))
  return HeldOut(
    batches=batches,
    num_bytes=sum(d.num_bytes for d in chosen),
    num_tokens=sum(
      int(packing.predicted_mask(b["segment"]).sum()) for b in batches
    ),
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
