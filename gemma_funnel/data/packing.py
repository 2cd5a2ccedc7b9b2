"""Documents to chunks of tokens, and chunks to rows of a fixed length.

A chunk is [BOS, t1, .., tn]; a document's last chunk ends in EOS. Chunks share
rows, each starting at a multiple of the funnel's total stride: no group of
pooled tokens then holds tokens of two chunks, and the first group of every
chunk starts with its BOS.
"""

from collections.abc import Sequence

import grain
import numpy as np

from gemma_funnel.data import sources
from gemma_funnel.data import tokenizer as tokenizer_lib

# Chunks that are shuffled together in training.
_SHUFFLE_WINDOW = 1024
# Rows that are filled at the same time; more of them waste less padding.
_NUM_OPEN_ROWS = 64


def check_lengths(length: int, align: int) -> None:
  """Checks the length of rows against the alignment of segments.

  Raises:
    ValueError: `length` below 2 (BOS and one token), `align` below 1, or
      `length` not a multiple of `align`.
  """
  if align < 1:
    raise ValueError(f"align={align}: expected an integer >= 1")
  if length < 2:
    raise ValueError(f"length={length}: expected at least 2, BOS and a token")
  if length % align:
    raise ValueError(
      f"length={length}: expected a multiple of align={align}, the total "
      "stride of the funnel"
    )


def chunk(tokens: Sequence[int], length: int) -> list[np.ndarray]:
  """Cuts the tokens of one document into chunks.

  Args:
    tokens: ids of the whole document, without BOS and EOS.
    length: tokens of a chunk at most, >= 2.

  Returns:
    int32 arrays [n], 2 <= n <= length, each starting with BOS. Without BOS
    they concatenate to `tokens` and one EOS.
  """
  ids = np.asarray([*tokens, tokenizer_lib.EOS_ID], np.int32)
  parts = np.split(ids, range(length - 1, len(ids), length - 1))
  bos = np.asarray([tokenizer_lib.BOS_ID], np.int32)
  return [np.concatenate([bos, part]) for part in parts]


class ChunkDocuments(grain.experimental.FlatMapTransform):
  """Turns a `Document` into its chunks, padded to a multiple of `align`.

  Grain's packing then starts every chunk at a multiple of `align`. `gap` more
  slots of padding follow each chunk.
  """

  def __init__(
    self, tokenizer: tokenizer_lib.Tokenizer, length: int, align: int, gap: int
  ):
    check_lengths(length, align)
    self._tokenizer = tokenizer
    self._length = length - gap
    self._align = align
    self._gap = gap

  def flat_map(self, element: sources.Document) -> list[dict[str, np.ndarray]]:
    chunks = chunk(self._tokenizer.encode(element.text), self._length)
    padding = lambda c: (0, -len(c) % self._align + self._gap)
    return [{"tokens": np.pad(c, padding(c))} for c in chunks]


def _to_row(packed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Names fields as batches do, and takes chunks' padding out of segments."""
  tokens_T = packed["tokens"].astype(np.int32)
  # Text never encodes to PAD, so PAD is padding wherever it stands.
  is_token_T = tokens_T != tokenizer_lib.PAD_ID
  return {
    "tokens": tokens_T,
    "segment": packed["tokens_segment_ids"] * is_token_T,
    "position": packed["tokens_positions"] * is_token_T,
  }


def pack(
  documents: grain.IterDataset,
  tokenizer: tokenizer_lib.Tokenizer,
  *,
  length: int,
  align: int,
  gap: int = 0,
  shuffle_seed: int | None = None,
) -> grain.IterDataset:
  """Packs documents into rows.

  Args:
    documents: a dataset of `Document`.
    tokenizer: what they are encoded with.
    length: T, tokens of a row; a multiple of `align`.
    align: segments start at multiples of it.
    gap: slots of padding after each segment at least; a multiple of `align`.
    shuffle_seed: seeds the order of chunks within windows of them, and of
      rows; None keeps the documents' order.

  Returns:
    A dataset of int32 arrays [T]: "tokens" (0 is padding), "segment" (1, 2, ..
    within the row; 0 is padding), "position" (0, 1, .. within the segment; 0
    at padding).

  Raises:
    ValueError: see `check_lengths`.
  """
  chunks = grain.experimental.FlatMapIterDataset(
    documents, ChunkDocuments(tokenizer, length, align, gap)
  )
  if shuffle_seed is not None:
    # A long document's chunks would otherwise make up a batch of their own.
    chunks = grain.experimental.WindowShuffleIterDataset(
      chunks, window_size=_SHUFFLE_WINDOW, seed=shuffle_seed
    )
  # First fit is a choice by age: early chunks leave early, little is held back.
  rows = grain.experimental.FirstFitPackIterDataset(
    chunks,
    length_struct={"tokens": length},
    num_packing_bins=_NUM_OPEN_ROWS,
    seed=shuffle_seed or 0,
    shuffle_bins=shuffle_seed is not None,
  )
  return rows.map(_to_row)


def predicted_mask(segment_BT: np.ndarray) -> np.ndarray:
  """Where the next token is one to predict from this one.

  Args:
    segment_BT: segment ids [B, T], 0 at padding.

  Returns:
    bool [B, T-1]: t and t+1 are in the same segment.
  """
  return (segment_BT[:, 1:] == segment_BT[:, :-1]) & (segment_BT[:, 1:] != 0)
