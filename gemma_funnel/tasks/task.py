"""What a task is: examples in splits, labels and metrics."""

from collections.abc import Mapping, Sequence
import dataclasses
import random
from typing import Any

# Kinds that a head is fine-tuned for, and kinds that a language model answers
# by itself.
ENCODER_KINDS = ("classification", "regression", "tagging")
GENERATIVE_KINDS = ("choice", "generation", "perplexity")
KINDS = ENCODER_KINDS + GENERATIVE_KINDS
SPLITS = ("train", "dev", "test")


@dataclasses.dataclass(frozen=True)
class TextExample:
  """A text, or a pair of them, and its label.

  Attributes:
    text: the text.
    second: the second text of a pair; None where there is no pair.
    label: an index into the task's labels, or a number (regression).
  """

  text: str
  second: str | None
  label: int | float


@dataclasses.dataclass(frozen=True)
class TaggedExample:
  """A sentence of words, each with a tag.

  Attributes:
    words: not empty, and none of them is.
    tags: indices into the task's labels, one for each word.
    before: the text before each word; None is a space before all but the first.
  """

  words: tuple[str, ...]
  tags: tuple[int, ...]
  before: tuple[str, ...] | None = None


@dataclasses.dataclass(frozen=True)
class ChoiceExample:
  """Continuations of a prompt, of which one is right.

  Attributes:
    prompt: what all of them follow; may be empty (minimal pairs).
    choices: two or more texts.
    answer: the index of the right one.
    group: what results are broken down by; "" where nothing is.
  """

  prompt: str
  choices: tuple[str, ...]
  answer: int
  group: str = ""


@dataclasses.dataclass(frozen=True)
class GenerationExample:
  """A prompt and the answers that count as right."""

  prompt: str
  answers: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Document:
  """A text whose tokens are predicted (perplexity)."""

  text: str


Example = (
  TextExample | TaggedExample | ChoiceExample | GenerationExample | Document
)


@dataclasses.dataclass(frozen=True)
class Task:
  """A task, read whole.

  Attributes:
    name: what tables call it.
    kind: one of KINDS.
    labels: names of the labels (classification), or BIO2 tags or plain tags
      (tagging); () for other kinds.
    metrics: names that `metrics.compute` knows; the first is the main one.
    splits: examples by split; a task may lack some. "test" is what results
      are of; where its labels are not published, it is the development set.
    skipped: rows left out because they were malformed, by split.
  """

  name: str
  kind: str
  labels: tuple[str, ...]
  metrics: tuple[str, ...]
  splits: Mapping[str, Sequence[Example]]
  skipped: Mapping[str, int] = dataclasses.field(default_factory=dict)


def sample(
  examples: Sequence[Any], count: int | None, config: Any, what: str
) -> Sequence[Any]:
  """At most `count` of them, in their order, drawn alike on every machine.

  Args:
    examples: any items.
    count: None is all.
    config: its `split_seed` seeds the draw.
    what: a name that tells this draw from others.
  """
  if count is None or count >= len(examples):
    return examples
  rng = random.Random(f"{config.split_seed}:{what}")
  return [examples[i] for i in sorted(rng.sample(range(len(examples)), count))]
