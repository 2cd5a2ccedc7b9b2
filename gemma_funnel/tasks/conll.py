"""CoNLL files: a word and its columns a line; tags become BIO2."""

import collections
from collections.abc import Iterable, Sequence
import dataclasses
import re
from typing import Any

from gemma_funnel.checks import require, require_choice
from gemma_funnel.tasks import tables
from gemma_funnel.tasks.task import TaggedExample, Task

SCHEMES = ("auto", "bio1", "bio2", "iobes", "plain")
OUTSIDE = "O"
SPAN_METRICS = ("span_f1", "span_precision", "span_recall", "token_accuracy")
PLAIN_METRICS = ("token_accuracy", "token_macro_f1")
_DOCUMENT_MARK = "-DOCSTART-"
# L and U are E and S by other names (BILOU).
_PREFIXES = {"bio1": "BI", "bio2": "BI", "iobes": "BIESLU"}
_RULES = {
  "bio2": "a span starts with 'B-' (see 'bio1')",
  "iobes": "a span is S- alone, or B-, I- and E- of one type",
}
_SEPARATORS = {"tab": "\t", "space": " "}


@dataclasses.dataclass(frozen=True)
class Sentence:
  """Words and tags; `place` and `fault` as of `tables.Row`."""

  place: str
  words: tuple[str, ...]
  tags: tuple[str, ...]
  fault: str = ""


def load(config: Any) -> Task:
  """Reads the splits that a configuration names; see `tasks.load`."""
  columns = config.word_column, config.tag_column, config.separator
  read = lambda path: read_sentences(path, *columns)
  return make_task(config, tables.read_splits(config, read))


def make_task(
  config: Any,
  splits: dict[str, list[Sentence]],
  metrics: tuple[str, ...] | None = None,
) -> Task:
  """A task of sentences by split, whose tags become labels.

  Labels are those of the file `config.labels`, or of train: "O" and, for each
  type of span, B- and I-; plain tags are sorted. `metrics` None is those that
  fit the tags.
  """
  scheme = config.scheme
  require_choice("scheme", scheme, SCHEMES)
  if scheme == "auto":
    scheme = detect_scheme(s.tags for part in splits.values() for s in part)
  if plain := scheme == "plain":
    metrics = metrics or PLAIN_METRICS
  else:
    splits = {k: [_in_bio2(s, scheme) for s in v] for k, v in splits.items()}
  if config.labels:
    labels = tables.read_labels(config.labels)
  else:
    tags = {t for s in splits["train"] if not s.fault for t in s.tags}
    types = sorted({tag[2:] for tag in tags if tag != OUTSIDE})
    labels = (OUTSIDE, *(f"{p}-{type_}" for type_ in types for p in "BI"))
    labels = tuple(sorted(tags)) if plain else labels
  index = {tag: i for i, tag in enumerate(labels)}

  def parse(sentence: Sentence) -> TaggedExample:
    for i, tag in enumerate(sentence.tags, 1):
      require(
        tag in index,
        f"found the tag {tag!r} (word {i}); expected one that occurs in train "
        f"or in the file of labels: {list(index)[:20]}",
      )
    return TaggedExample(sentence.words, tuple(index[t] for t in sentence.tags))

  metrics = metrics or SPAN_METRICS
  return tables.make_task(config, "tagging", labels, metrics, splits, parse)


def _in_bio2(sentence: Sentence, scheme: str) -> Sentence:
  try:
    tags = to_bio2(sentence.tags, scheme)
  except ValueError as e:
    return dataclasses.replace(sentence, fault=str(e))
  return dataclasses.replace(sentence, tags=tags)


def read_sentences(
  path: str,
  word_column: int = 0,
  tag_column: int = -1,
  separator: str | None = None,
) -> list[Sentence]:
  """The sentences of a file.

  A line of white space alone ends a sentence, and so does one whose word is
  -DOCSTART-, which is left out. A line that starts with "#" is a comment where
  it precedes the first word of a sentence and has another number of columns
  than the file's: "#" with its columns is a word. A line that begins with a
  blank and lacks a column is of an empty word, as Broad Twitter has some.

  Columns count from 0; -1 is the last. `separator` is "tab", "space", or None:
  any run of spaces and tabs.
  """
  require_choice("separator", separator or None, (None, *_SEPARATORS))
  lines = [
    (number, line, _cells(line, separator))
    for number, line in tables.lines_of(tables.read_text(path))
  ]
  # The commonest number of columns, of comments if there is nothing else.
  widths = collections.Counter(
    len(cells) for _, line, cells in lines if cells and line[0] != "#"
  ) or collections.Counter(len(cells) for *_, cells in lines if cells)
  width = widths.most_common(1)[0][0] if widths else 0
  for key, column in (("word_column", word_column), ("tag_column", tag_column)):
    require(
      not width or -width <= column < width,
      f"{path}: {key}={column}, but it has {width} columns",
    )
  sentences, rows = [], []
  for number, line, cells in [*lines, (0, "", [])]:
    if line[:1].isspace() and len(cells) == width - 1:
      cells = ["", *cells]
    if not cells or _DOCUMENT_MARK in (cells[0], *cells[word_column:][:1]):
      if rows:
        sentences.append(_sentence(path, rows, width, word_column, tag_column))
      rows = []
    elif rows or len(cells) == width or not line.startswith("#"):
      rows.append((number, cells))
  return sentences


def _cells(line: str, separator: str | None) -> list[str]:
  if not line.strip():
    return []
  if separator:
    return line.split(_SEPARATORS[separator])
  # Not str.split(), which cuts at no-break spaces, too.
  return re.split(r"[ \t]+", line.strip(" \t"))


def _sentence(path, rows, width, word_column, tag_column) -> Sentence:
  for number, cells in rows:
    fault = ""
    if len(cells) != width:
      fault = f"found {len(cells)} columns; expected {width}"
    elif not cells[tag_column].strip():
      fault = "the tag is empty"
    if fault:
      return Sentence(f"{path}, line {number}", (), (), fault)
  words, tags = zip(
    *((c[word_column], c[tag_column]) for _, c in rows), strict=True
  )
  return Sentence(f"{path}, line {rows[0][0]}", words, tags)


def detect_scheme(sentences: Iterable[Sequence[str]]) -> str:
  """The scheme of tags: "plain", "iobes", "bio1" or "bio2".

  Tags are plain where none but "O" is B-, I-, E-, S-, L- or U- and a type. A
  file that is neither of bio1 and bio2 is read as bio1, the more lenient.
  """
  sentences = [tuple(tags) for tags in sentences]
  tags = {tag for sentence in sentences for tag in sentence} - {OUTSIDE}
  prefixes = {tag[0] for tag in tags if re.match("[BIESLU]-.", tag)}
  if tags and not prefixes & {"B", "I"}:
    # S-X alone can be the tags of single words.
    return "iobes" if prefixes & {"S", "U"} else "plain"
  if prefixes - {"B", "I"}:
    return "iobes"
  try:
    for sentence in sentences:
      to_bio2([t for t in sentence if t == OUTSIDE or t[1:2] == "-"], "bio2")
  except ValueError:
    return "bio1"
  return "bio2"


def to_bio2(tags: Sequence[str], scheme: str) -> tuple[str, ...]:
  """A sentence's tags as BIO2: each span starts with B-.

  In bio1 a span starts with I-, or with B- right after another of its type; as
  in conlleval, B- starts one anywhere. What the scheme does not allow raises.
  """
  result, previous = [], OUTSIDE
  for i, tag in enumerate([*tags, OUTSIDE], 1):
    prefix, _, type_ = tag.partition("-")
    if tag != OUTSIDE:
      require(
        bool(type_) and len(prefix) == 1 and prefix in _PREFIXES[scheme],
        f"found the tag {tag!r} (word {i}); expected 'O', or one of "
        f"{list(_PREFIXES[scheme])}, '-' and a type (scheme={scheme!r})",
      )
    continues = previous[0] in "BI" and previous[2:] == type_
    if scheme == "iobes":
      must = previous[0] in "BI"
      fits = must == (prefix in ("I", "E", "L")) and (continues or not must)
    else:
      fits = scheme == "bio1" or prefix != "I" or continues
    require(
      fits,
      f"found the tag {tag!r} (word {i}) after {previous!r}; with "
      f"scheme={scheme!r} {_RULES.get(scheme)}",
    )
    if tag == OUTSIDE:
      result.append(OUTSIDE)
    else:
      inside = prefix in "IEL" and continues
      result.append(("I-" if inside else "B-") + type_)
    previous = tag
  return tuple(result[:-1])
