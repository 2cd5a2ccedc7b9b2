"""Batches: an endless, checkpointable train iterator and a held-out set."""

from collections.abc import Sequence
import dataclasses
import functools
import os
from typing import Any

from absl import flags
import grain
from ml_collections import config_dict
import numpy as np

from gemma_funnel.data import packing, sources
from gemma_funnel.data import tokenizer as tokenizer_lib

Batch = dict[str, np.ndarray]

TOKENIZER_FILE = "tokenizer.model"


@dataclasses.dataclass(frozen=True)
class Corpus:
  """Documents of both splits and the tokenizer for them.

  Attributes:
    train: documents to train on.
    heldout: documents to evaluate on.
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
    source: "stdlib", or comma-separated globs of text and `.jsonl` files.
    heldout: globs of held-out files; None splits `source` by a hash.
    heldout_fraction: share of `source` that the hash holds out.
    text_key: key of the text in a line of `.jsonl`.
    tokenizer: path of a SentencePiece model; None trains one on the corpus.
    num_workers: processes that prepare batches; 0 is none but the caller's.
    seed: of the order of the training data.
  """
  return config_dict.create(
    source=sources.STDLIB,
    heldout=config_dict.placeholder(str),
    heldout_fraction=0.1,
    text_key="text",
    tokenizer=config_dict.placeholder(str),
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
  _require_int("num_workers", cfg.num_workers, 0)
  _require_int("seed", cfg.seed, 0, 2**32)


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
      they should be; see `sources.load_split` and `tokenizer.get_tokenizer`.
  """
  _check_config(cfg)
  cache_path = os.path.join(workdir, TOKENIZER_FILE)
  # Before the corpus: a wrong tokenizer is found without reading it.
  tokenizer = tokenizer_lib.find_tokenizer(
    cfg.tokenizer, cache_path, vocab_size
  )
  train, heldout = sources.load_split(
    cfg.source,
    heldout=cfg.heldout,
    heldout_fraction=cfg.heldout_fraction,
    text_key=cfg.text_key,
  )
  if tokenizer is None:
    tokenizer = tokenizer_lib.train(train, vocab_size, cache_path)
  return Corpus(train, heldout, tokenizer)


def _read(documents: grain.MapDataset) -> grain.IterDataset:
  # The documents are in memory: reading threads would have nothing to wait for.
  return documents.to_iter_dataset(grain.ReadOptions(num_threads=0))


def _shard(
  documents: Sequence[sources.Document],
  process_index: int,
  process_count: int,
) -> grain.MapDataset:
  """The documents of one process."""
  _require_int("process_count", process_count, 1)
  _require_int("process_index", process_index, 0, process_count)
  if len(documents) < process_count:
    raise ValueError(
      f"{len(documents)} training documents for process_count="
      f"{process_count} processes: expected at least one each"
    )
  return grain.MapDataset.source(documents)[process_index::process_count]


def _prefetch(batches: grain.IterDataset, num_workers: int):
  # Grain's workers read absl flags, which fails in a program that has none.
  if not flags.FLAGS.is_parsed():
    flags.FLAGS.mark_as_parsed()
  return batches.mp_prefetch(
    grain.MultiprocessingOptions(num_workers=num_workers)
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
  num_workers: int = 0,
  process_index: int = 0,
  process_count: int = 1,
) -> grain.DatasetIterator:
  """An endless iterator of packed batches for one process.

  Documents are dealt out to processes, then shuffled anew each epoch, cut into
  chunks and packed. The state (`get_state`, `set_state`, or grain's
  `CheckpointSave` and `CheckpointRestore`) is some integers. It means something
  only to an iterator with the same arguments, `num_workers` among them, which
  then continues with exactly the batches that would have come. With workers,
  call `close` when done.

  Args:
    documents: all training documents, in the same order in every process.
    tokenizer: what to encode them with.
    batch_size: B, rows of a batch of this process.
    length: T, tokens of a row; a multiple of `align`.
    align: segments start at multiples of it: the funnel's total stride, 1
      without a funnel.
    seed: of all orders, in [0, 2**32).
    gap: padding after each segment at least, as `packing.pack` takes it.
    num_workers: processes that prepare batches ahead; 0 prepares them in the
      caller's. Another number gives another order. Workers are spawned, so a
      script's entry point has to be guarded by `__name__ == "__main__"`.
    process_index: this process, in [0, process_count).
    process_count: processes that share the documents.

  Returns:
    An iterator of dicts of int32 arrays [B, T]: "tokens" (0 is padding),
    "segment" (1, 2, .. within a row; 0 is padding), "position" (0, 1, ..
    within a segment; 0 at padding).

  Raises:
    ValueError: an argument out of range, or fewer documents than processes.
  """
  packing.check_lengths(length, align)
  _require_int("batch_size", batch_size, 1)
  _require_int("seed", seed, 0, 2**32)
  _require_int("num_workers", num_workers, 0)
  shard = _shard(documents, process_index, process_count)
  # seed() before shuffle(): with shuffle(seed), epoch 1 of seed 0 would have
  # the order of epoch 0 of seed 1.
  shuffled = shard.seed(seed).shuffle().repeat()
  rows = packing.pack(
    _read(shuffled), tokenizer, length=length, align=align, gap=gap,
    shuffle_seed=seed,
  )  # fmt: skip
  batches = rows.batch(batch_size, drop_remainder=True)
  if num_workers:
    batches = _prefetch(batches, num_workers)
  return iter(batches)


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
    ValueError: an argument out of range, or no documents.
  """
  packing.check_lengths(length, align)
  _require_int("batch_size", batch_size, 1)
  if max_documents is not None:
    _require_int("max_documents", max_documents, 1)
  if not documents:
    raise ValueError("no held-out documents: expected at least one")
  chosen = _spread(documents, max_documents)
  rows = packing.pack(
    _read(grain.MapDataset.source(chosen)),
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
    num_bytes=sum(len(d.text.encode()) for d in chosen),
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
