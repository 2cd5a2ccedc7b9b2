"""Examples of a task as rows of tokens, and rows as batches.

A text is [BOS] text [EOS], a pair [BOS] first [EOS] second [EOS]. Tagged words
are encoded one by one, so that each has tokens of its own. A word's label
stands at its last token, which has seen all of the word in a causal model.
"""

from collections.abc import Iterator, Sequence
import dataclasses
import functools

import grain
import numpy as np

from gemma_funnel.checks import require_choice, require_int
from gemma_funnel.data.tokenizer import Tokenizer
from gemma_funnel.tasks.task import TaggedExample, Task, TextExample

LONG = ("truncate", "window")
# Where nothing is to be predicted.
IGNORE = -1
# Batches are of rows about as long as each other, among so many batches' rows.
_SORT_BATCHES = 16
_LEAST_WIDTH = 16


@dataclasses.dataclass(frozen=True)
class Row:
  """A row of tokens and what is to be predicted of it."""

  tokens: np.ndarray  # int32 [n].
  # An index or a number; where tokens are tagged, int32 [n]: IGNORE at all but
  # the last token of each word.
  label: int | float | np.ndarray
  example: int  # Which example it is of.
  first_word: int = 0  # Among the words of that example.
  num_cut: int = 0  # Words after it that no row has; of a text, 1 if it is cut.


def encode(
  task: Task,
  examples: Sequence[TextExample] | Sequence[TaggedExample],
  tokenizer: Tokenizer,
  length: int,
  long: str = "truncate",
) -> list[Row]:
  """Rows of all examples, in order.

  Args:
    task: whose examples they are.
    examples: of one of its splits.
    tokenizer: what they are encoded with.
    length: tokens of a row at most, >= 4.
    long: what becomes of tagged sentences beyond it: "truncate" drops the words
      that do not fit (they are then predicted as the first label), "window"
      makes several rows of them. Texts are cut; of a pair, the longer first.
  """
  require_choice("long", long, LONG)
  require_int("length", length, 4)
  if task.kind == "tagging":
    return [
      row
      for number, example in enumerate(examples)
      for row in _tagged_rows(number, example, tokenizer, length, long)
    ]
  # A regression's labels are numbers, however they are written.
  label_of = float if task.kind == "regression" else int
  return [
    Row(tokens, label_of(x.label), number, num_cut=cut)
    for number, x in enumerate(examples)
    for tokens, cut in [_text_tokens(x, tokenizer, length)]
  ]


def _text_tokens(
  example: TextExample, tokenizer: Tokenizer, length: int
) -> tuple[np.ndarray, bool]:
  """The tokens, and whether some are missing."""
  first, second = tokenizer.encode(example.text), []
  cut = False
  room = length - 2
  if example.second is not None:
    second, room = tokenizer.encode(example.second), length - 3
    # The longer of the two is cut, until both fit.
    kept = second[: max(room - len(first), room // 2)]
    cut, second = len(kept) < len(second), [*kept, tokenizer.eos_id]
    room -= len(kept)
  bos, eos = tokenizer.bos_id, tokenizer.eos_id
  tokens = np.asarray([bos, *first[:room], eos, *second], np.int32)
  return tokens, cut or len(first) > room


def _tagged_rows(
  number: int, example: TaggedExample, tokenizer: Tokenizer, length, long
) -> Iterator[Row]:
  room = length - 2  # BOS and EOS.
  tokens, labels, first_word = [], [], 0

  def row(num_cut: int = 0):
    return Row(
      np.asarray([tokenizer.bos_id, *tokens, tokenizer.eos_id], np.int32),
      np.asarray([IGNORE, *labels, IGNORE], np.int32),
      number,
      first_word,
      num_cut,
    )

  before = example.before or ("", *[" "] * (len(example.words) - 1))
  for at, (space, word, tag) in enumerate(
    zip(before, example.words, example.tags, strict=True)
  ):
    # Nothing may be left of a word that is all unknown to a tokenizer; of one
    # that no row would hold, the end is.
    nothing = tokenizer.eos_id if tokenizer.unk_id is None else tokenizer.unk_id
    ids = (tokenizer.encode(space + word) or [nothing])[-room:]
    if len(tokens) + len(ids) > room:
      if long == "truncate":
        yield row(len(example.words) - at)
        return
      yield row()
      tokens, labels, first_word = [], [], at
    tokens += ids
    labels += [IGNORE] * (len(ids) - 1) + [tag]
  yield row()


def join_words(
  task: Task, rows: Sequence[Row], labels: Sequence[np.ndarray], examples
) -> list[list[str]]:
  """Tags of each example's words, of its rows' predictions.

  Words that no row has get the outside tag "O", or the first label where there
  is none.

  Args:
    task: the labels' names.
    rows: from `encode`.
    labels: predicted label indices of each row, [n] as its tokens.
    examples: what `rows` were made of.
  """
  outside = "O" if "O" in task.labels else task.labels[0]
  tags = [[outside] * len(example.words) for example in examples]
  for row, predicted in zip(rows, labels, strict=True):
    found = np.asarray(predicted)[row.label != IGNORE]
    for at, index in enumerate(found, start=row.first_word):
      tags[row.example][at] = task.labels[int(index)]
  return tags


def batch(rows: Sequence[Row], size: int, width: int) -> dict[str, np.ndarray]:
  """Rows padded to a width of tokens, and filled up to `size` of them.

  Returns:
    "tokens" and "segment" (1 at tokens), int32 [B, T]; "label", [B] or [B, T],
    int32, or float32 where labels are numbers; "weight", float32 like "label":
    0 where there is nothing to predict.
  """
  tokens = np.zeros((size, width), np.int32)
  segment = np.zeros((size, width), np.int32)
  first = rows[0].label
  dtype = np.float32 if isinstance(first, float) else np.int32
  per_token = isinstance(first, np.ndarray)
  label = np.zeros((size, width) if per_token else size, dtype)
  weight = np.zeros(label.shape, np.float32)
  for at, row in enumerate(rows):
    count = len(row.tokens)
    tokens[at, :count] = row.tokens
    segment[at, :count] = 1
    where = (at, slice(count)) if per_token else at
    label[where] = np.maximum(row.label, 0) if per_token else row.label
    weight[where] = row.label != IGNORE if per_token else 1
  return dict(tokens=tokens, segment=segment, label=label, weight=weight)


def _width(rows: Sequence[Row], chosen: Sequence[int], length: int) -> int:
  """A power of two that holds the chosen rows, or `length` if that is less.

  Each width is a program to compile: few are wanted.
  """
  longest = max(len(rows[i].tokens) for i in chosen)
  return min(max(_LEAST_WIDTH, 1 << (longest - 1).bit_length()), length)


@dataclasses.dataclass(eq=False)
class TrainBatches:
  """The batches of so many steps, each of them at random access.

  Rows are shuffled anew each epoch, and sorted by length within some batches,
  so that little of a batch is padding. The last rows of an epoch that make no
  whole batch are left to the next ones.
  """

  rows: Sequence[Row]
  _: dataclasses.KW_ONLY
  batch_size: int  # Of all processes together.
  length: int
  seed: int
  num_steps: int
  process_index: int = 0
  process_count: int = 1

  def __post_init__(self):
    self.epoch_steps = steps_of_epoch(len(self.rows), self.batch_size)
    self._order = functools.lru_cache(maxsize=1)(self._make_order)

  def __len__(self) -> int:
    return self.num_steps

  def __getitem__(self, step: int) -> dict[str, np.ndarray]:
    epoch, at = divmod(step, self.epoch_steps)
    chosen = self._order(epoch)[at]
    # Of the whole batch: all processes' parts of it are as wide.
    width = _width(self.rows, chosen, self.length)
    mine = chosen[self.process_index :: self.process_count]
    return batch([self.rows[i] for i in mine], len(mine), width)

  def _make_order(self, epoch: int) -> list[np.ndarray]:
    rng = np.random.default_rng((self.seed, epoch))
    size = self.batch_size
    order = rng.permutation(len(self.rows))
    order = np.resize(order, self.epoch_steps * size)
    batches = []
    for start in range(0, len(order), _SORT_BATCHES * size):
      part = order[start : start + _SORT_BATCHES * size]
      lengths = [len(self.rows[i].tokens) for i in part]
      part = part[np.argsort(lengths, kind="stable")]
      batches += np.split(part, len(part) // size)
    return [batches[i] for i in rng.permutation(len(batches))]


def steps_of_epoch(num_rows: int, batch_size: int) -> int:
  """Whole batches of an epoch; one at least, with rows twice if need be."""
  return max(1, num_rows // batch_size)


def train_iterator(batches: TrainBatches) -> grain.DatasetIterator:
  """Batches in order, with a state that a checkpoint can hold."""
  dataset = grain.MapDataset.source(batches)
  return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=0)))


def eval_batches(
  rows: Sequence[Row], batch_size: int, length: int
) -> Iterator[tuple[list[int], dict[str, np.ndarray]]]:
  """(indices of rows, batch), all rows once, the shortest first."""
  order = np.argsort([len(row.tokens) for row in rows], kind="stable")
  for start in range(0, len(order), batch_size):
    chosen = [int(i) for i in order[start : start + batch_size]]
    width = _width(rows, chosen, length)
    yield chosen, batch([rows[i] for i in chosen], batch_size, width)
