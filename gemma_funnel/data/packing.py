"""Documents to chunks of tokens, and chunks to rows of a fixed length.

A chunk is [BOS, t1, .., tn]; a document's last chunk ends in EOS. Chunks share
rows, each starting at a multiple of the funnel's total stride: no group of
pooled tokens then holds tokens of two chunks, and the first group of every
chunk starts with its BOS.
"""

from collections.abc import Sequence

import grain
import numpy as np

from gemma_funnel.data import tokenizer as tokenizer_lib
from gemma_funnel.data.documents import Document, TokenizedDocument

# Chunks that are shuffled together in training. All lanes share them, but none
# has fewer than the second number.
_SHUFFLE_WINDOW = 1024
_LEAST_WINDOW = 128
# Rows that are filled at the same time; more of them waste less padding. All
# lanes share them as well.
_NUM_OPEN_ROWS = 64
_LEAST_OPEN_ROWS = 32
# So many documents without text in a row are a mistake: a corpus of nothing
# else would be read for ever.
_MOST_EMPTY = 1 << 18


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
  eos = np.asarray([tokenizer_lib.EOS_ID], np.int32)
  ids = np.concatenate([np.asarray(tokens, np.int32), eos])
  parts = np.split(ids, range(length - 1, len(ids), length - 1))
  bos = np.asarray([tokenizer_lib.BOS_ID], np.int32)
  return [np.concatenate([bos, part]) for part in parts]


class ChunkDocuments(grain.experimental.FlatMapTransform):
  """Turns a `Document` into its chunks, padded to a multiple of `align`.

  Grain's packing then starts every chunk at a multiple of `align`. `gap` more
  slots of padding follow each chunk. A document without text has no chunks.
  """

  def __init__(
    self, tokenizer: tokenizer_lib.Tokenizer, length: int, align: int, gap: int
  ):
    check_lengths(length, align)
    self._tokenizer = tokenizer
    self._length = length - gap
    self._align = align
    self._gap = gap
    self._empty = 0

  def flat_map(
    self, element: Document | TokenizedDocument
  ) -> list[dict[str, np.ndarray]]:
    if not element.num_bytes:
      self._empty += 1
      if self._empty >= _MOST_EMPTY:
        raise ValueError(
          f"the last {self._empty:,} documents have no text, that of key "
          f"{element.key!r} among them; expected some with text"
        )
      return []
    self._empty = 0
    if isinstance(element, TokenizedDocument):
      tokens = element.tokens
    else:
      tokens = self._tokenizer.encode(element.text)
    chunks = chunk(tokens, self._length)
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


def chunks(
  documents: grain.IterDataset,
  tokenizer: tokenizer_lib.Tokenizer,
  *,
  length: int,
  align: int,
  gap: int = 0,
) -> grain.IterDataset:
  """The chunks of documents, in their order; see `pack`."""
  return grain.experimental.FlatMapIterDataset(
    documents, ChunkDocuments(tokenizer, length, align, gap)
  )


def pack_chunks(
  chunks: grain.IterDataset,
  *,
  length: int,
  shuffle_seed: int | None = None,
  lanes: int = 1,
) -> grain.IterDataset:
  """Packs chunks into rows.

  Args:
    chunks: a dataset of {"tokens": int32 [n]}, as `chunks` gives them.
    length: T, tokens of a row.
    shuffle_seed: see `pack`.
    lanes: how many datasets like this one there are. Each has its share of
      the window in which chunks are shuffled and of the rows that are open at
      the same time, though not less than what keeps rows full.

  Returns:
    A dataset of rows, as of `pack`.
  """
  # The least values do not raise smaller ones.
  window = max(_SHUFFLE_WINDOW // lanes, min(_LEAST_WINDOW, _SHUFFLE_WINDOW))
  open_rows = max(
    _NUM_OPEN_ROWS // lanes, min(_LEAST_OPEN_ROWS, _NUM_OPEN_ROWS)
  )
  if shuffle_seed is not None:
    # A long document's chunks would otherwise make up a batch of their own.
    chunks = grain.experimental.WindowShuffleIterDataset(
      chunks, window_size=window, seed=shuffle_seed
    )
  # First fit is a choice by age: early chunks leave early, little is held back.
  rows = grain.experimental.FirstFitPackIterDataset(
    chunks,
    length_struct={"tokens": length},
    num_packing_bins=open_rows,
    seed=shuffle_seed or 0,
    shuffle_bins=shuffle_seed is not None,
  )
  return rows.map(_to_row)


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
    documents: a dataset of `Document` or `TokenizedDocument`.
    tokenizer: what they are, or have been, encoded with.
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
  return pack_chunks(
    chunks(documents, tokenizer, length=length, align=align, gap=gap),
    length=length,
    shuffle_seed=shuffle_seed,
  )


def predicted_mask(segment_BT: np.ndarray) -> np.ndarray:
  """Where the next token is one to predict from this one.

  Args:
    segment_BT: segment ids [B, T], 0 at padding.

  Returns:
    bool [B, T-1]: t and t+1 are in the same segment.
  """
  return (segment_BT[:, 1:] == segment_BT[:, :-1]) & (segment_BT[:, 1:] != 0)
