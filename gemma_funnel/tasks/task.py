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
  """A text, or a pair of them, and its label."""

  text: str
  second: str | None
  label: int | float  # An index into the labels; of regression, a number.


@dataclasses.dataclass(frozen=True)
class TaggedExample:
  """A sentence of words, each with a tag."""

  words: tuple[str, ...]  # One at least; a word may be empty.
  tags: tuple[int, ...]  # Indices into the task's labels.
  # The text before each word; None is a space before all but the first.
  before: tuple[str, ...] | None = None


@dataclasses.dataclass(frozen=True)
class ChoiceExample:
  """Continuations of a prompt, of which one is right."""

  prompt: str  # May be empty (minimal pairs).
  choices: tuple[str, ...]
  answer: int  # The index of the right one.
  group: str = ""  # What results are broken down by.


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
  """A task, read whole."""

  name: str  # What tables call it.
  kind: str  # One of KINDS.
  # Names of classes, or tags (BIO2 or plain); () for other kinds.
  labels: tuple[str, ...]
  metrics: tuple[str, ...]  # Of `metrics.compute`; the first is the main one.
  # Results are of "test": the development set where labels are not published.
  splits: Mapping[str, Sequence[Example]]
  # Malformed rows left out, by split.
  skipped: Mapping[str, int] = dataclasses.field(default_factory=dict)


def sample(
  examples: Sequence[Any], count: int | None, config: Any, what: str
) -> Sequence[Any]:
  """At most `count` (None: all), in their order, drawn alike on every machine.

  `config.split_seed` seeds the draw; `what` tells it from other draws.
  """
  if count is None or count >= len(examples):
    return examples
  rng = random.Random(f"{config.split_seed}:{what}")
  return [examples[i] for i in sorted(rng.sample(range(len(examples)), count))]
