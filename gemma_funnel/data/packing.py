"""Documents to chunks of tokens, and chunks to rows of a fixed length.

A chunk is [BOS, t1, .., tn]; a document's last chunk ends in EOS. Chunks share
rows, each starting at a multiple of the funnel's total stride: no group of
pooled tokens then holds tokens of two chunks, and the first group of every
chunk starts with its BOS.
"""

from collections.abc import Sequence
import copy

import grain
import numpy as np

from gemma_funnel.checks import require, require_int
from gemma_funnel.data.documents import Document, TokenizedDocument
from gemma_funnel.data.tokenizer import BOS_ID, EOS_ID, Tokenizer

# Chunks that are shuffled together in training: all shards share the first
# number, but none has fewer than the second.
_SHUFFLE_WINDOW = 1024
_LEAST_WINDOW = 128
# Rows that are filled at the same time, shared likewise; more of them waste
# less padding.
_NUM_OPEN_ROWS = 64
_LEAST_OPEN_ROWS = 32
# What chunks are padded with. In rows padding is 0, which may be a token too.
PADDING = -1
# A corpus of documents without text would be read for ever: this many in a row
# are an error.
_MOST_EMPTY = 1 << 18


def chunk(
  tokens: Sequence[int], length: int, bos_id: int = BOS_ID, eos_id: int = EOS_ID
) -> list[np.ndarray]:
  """Cuts the tokens of one document into chunks.

  Args:
    tokens: ids of the whole document, without BOS and EOS.
    length: tokens of a chunk at most, >= 2.
    bos_id, eos_id: the tokenizer's.

  Returns:
    int32 arrays [n], 2 <= n <= length, each starting with BOS. Without BOS
    they concatenate to `tokens` and one EOS.
  """
  ids = np.append(np.asarray(tokens, np.int32), np.int32(eos_id))
  parts = np.split(ids, range(length - 1, len(ids), length - 1))
  return [np.insert(part, 0, bos_id) for part in parts]


class ChunkDocuments(grain.experimental.FlatMapTransform):
  """Turns documents into chunks, padded to a multiple of the alignment.

  Grain's packing then starts every chunk at such a multiple. A document without
  text has no chunks.
  """

  def __init__(
    self,
    tokenizer: Tokenizer,
    length: int,
    segment_alignment: int,
    segment_padding: int = 0,
  ):
    """Checks the numbers.

    Args:
      tokenizer: what the documents are, or have been, encoded with.
      length: T, tokens of a row; a multiple of `segment_alignment`.
      segment_alignment: segments start at multiples of it.
      segment_padding: least slots of padding after a segment; a multiple of
        `segment_alignment`.

    Raises:
      ValueError: `length` below 2 (BOS and one token) or not a multiple of
        `segment_alignment`, or the latter below 1.
    """
    require_int("segment_alignment", segment_alignment, 1)
    require_int("length", length, 2)
    require(
      length % segment_alignment == 0,
      f"length={length}: expected a multiple of segment_alignment="
      f"{segment_alignment}, the total stride of the funnel",
    )
    self._tokenizer = tokenizer
    self._length = length - segment_padding
    self._alignment, self._padding = segment_alignment, segment_padding
    self._empty = 0

  def flat_map(
    self, element: Document | TokenizedDocument
  ) -> list[dict[str, np.ndarray]]:
    if not element.num_bytes:
      self._empty += 1
      require(
        self._empty < _MOST_EMPTY,
        f"the last {self._empty:,} documents have no text, that of key "
        f"{element.key!r} among them; expected some with text",
      )
      return []
    self._empty = 0
    if isinstance(element, TokenizedDocument):
      tokens = element.tokens
    else:
      tokens = self._tokenizer.encode(element.text)
    around = self._tokenizer.bos_id, self._tokenizer.eos_id
    chunks = chunk(tokens, self._length, *around)
    padding = lambda c: (0, -len(c) % self._alignment + self._padding)
    return [
      {"tokens": np.pad(c, padding(c), constant_values=PADDING)} for c in chunks
    ]

  def __call__(self, documents: grain.IterDataset) -> grain.IterDataset:
    """The dataset of the chunks of a dataset of documents."""
    # A copy: every dataset counts its own documents without text.
    return grain.experimental.FlatMapIterDataset(documents, copy.copy(self))


def _to_row(packed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Names fields as batches do, and takes chunks' padding out of segments."""
  tokens_T = packed["tokens"].astype(np.int32)
  is_token_T = tokens_T != PADDING
  return {
    "tokens": tokens_T * is_token_T,
    "segment": packed["tokens_segment_ids"] * is_token_T,
    "position": packed["tokens_positions"] * is_token_T,
  }


def pack(
  chunks: grain.IterDataset,
  length: int,
  shuffle_seed: int | None = None,
  num_shards: int = 1,
) -> grain.IterDataset:
  """Packs chunks into rows.

  Args:
    chunks: a dataset of {"tokens": int32 [n]}, as `ChunkDocuments` makes them.
    length: T, tokens of a row.
    shuffle_seed: seeds the order of chunks within windows of them, and of
      rows; None keeps the documents' order.
    num_shards: datasets like this one. They share the window in which chunks
      are shuffled and the rows that are open at the same time, down to the
      least that keeps rows full.

  Returns:
    A dataset of int32 arrays [T]: "tokens" (0 is padding), "segment" (1, 2, ..
    within the row; 0 is padding), "position" (0, 1, .. within the segment; 0
    at padding).
  """
  # The least values do not raise smaller ones.
  share = lambda all, least: max(all // num_shards, min(least, all))
  if shuffle_seed is not None:
    # A long document's chunks would otherwise make up a batch of their own.
    chunks = grain.experimental.WindowShuffleIterDataset(
      chunks,
      window_size=share(_SHUFFLE_WINDOW, _LEAST_WINDOW),
      seed=shuffle_seed,
    )
  # First fit is a choice by age: early chunks leave early, little is held back.
  rows = grain.experimental.FirstFitPackIterDataset(
    chunks,
    length_struct={"tokens": length},
    num_packing_bins=share(_NUM_OPEN_ROWS, _LEAST_OPEN_ROWS),
    seed=shuffle_seed or 0,
    shuffle_bins=shuffle_seed is not None,
  )
  return rows.map(_to_row)


def predicted_mask(segment_BT: np.ndarray) -> np.ndarray:
  """Where the next token is predicted: t and t+1 share a segment; [B, T-1]."""
  return (segment_BT[:, 1:] == segment_BT[:, :-1]) & (segment_BT[:, 1:] != 0)


def windows(bos_id: int, ids: Sequence[int], length: int) -> np.ndarray:
  """int32 [B, length]: a text's tokens in whole windows that begin with BOS.

  Raises:
    ValueError: a text of less than one window.
  """
  size = length - 1
  if len(ids) < size:
    raise ValueError(
      f"length={length}: the text has {len(ids)} tokens, fewer than a window"
    )
  rows = [ids[i : i + size] for i in range(0, len(ids) - size + 1, size)]
  return np.asarray([[bos_id, *row] for row in rows], np.int32)
