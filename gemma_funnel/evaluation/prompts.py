"""How a task is put to a language model, and how its answers are read."""

from collections.abc import Callable, Sequence
import dataclasses
import re
from typing import Any

from gemma_funnel.checks import require, require_choice, require_int
from gemma_funnel.tasks.task import GENERATIVE_KINDS, SPLITS, Task, sample

# The first is the main one of a task that names none.
METRICS = {
  "choice": ("accuracy", "accuracy_norm"),
  "perplexity": ("bits_per_byte", "loss", "perplexity", "word_perplexity"),
  "generation": ("exact_match",),
}


@dataclasses.dataclass(frozen=True)
class Settings:
  """How a task is put to a model."""

  batch_size: int = 8  # Rows of a pass.
  # Tokens of a pass at most; None is the model's max_length. A prompt too long
  # loses its beginning, but BOS.
  max_length: int | None = None
  split: str = "test"
  # A sample of the split, the same for a seed; None is all.
  max_examples: int | None = None
  split_seed: int = 0  # Of that sample, and of the examples before a prompt.
  # Examples before each prompt, a sample of the train split, and what they and
  # the prompt look like. {answer} is the first right one.
  few_shot: int = 0
  shot_format: str = "{prompt}{answer}\n\n"
  prompt_format: str = "{prompt}"
  max_new_tokens: int = 128  # Of a generated answer.
  stop: Sequence[str] = ()  # Ends it, and is no part of it; so does EOS.
  # A regular expression whose first group (or match, without one) is the answer
  # within what was generated; then commas between digits and a full stop at its
  # end are dropped. None takes all that was generated.
  answer_pattern: str | None = None
  lower_case: bool = False  # Whether case does not matter.

  def __post_init__(self):
    require_int("batch_size", self.batch_size, 1)
    require_int("max_new_tokens", self.max_new_tokens, 1)
    require_int("few_shot", self.few_shot)
    require_int("split_seed", self.split_seed)
    for name, least in (("max_length", 2), ("max_examples", 1)):
      if getattr(self, name) is not None:
        require_int(name, getattr(self, name), least)
    require_choice("split", self.split, SPLITS)
    texts = all(isinstance(s, str) and s for s in self.stop)
    require(
      texts and not isinstance(self.stop, str),
      f"stop={self.stop!r}: expected a tuple of texts, none of them empty",
    )
    object.__setattr__(self, "stop", tuple(self.stop))
    _check_format("prompt_format", self.prompt_format, ("prompt",))
    _check_format("shot_format", self.shot_format, ("prompt", "answer"))
    pattern = self.answer_pattern
    try:
      re.compile(pattern or "")
    except re.error as error:
      raise ValueError(
        f"answer_pattern={pattern!r} is no regular expression: {error}"
      ) from error

  def sample(self, examples: Sequence[Any]) -> Sequence[Any]:
    """`max_examples` of a split, in their order."""
    return sample(examples, self.max_examples, self, "max_examples")


def _check_format(name: str, text: str, fields: Sequence[str]) -> None:
  expected = f"expected a text with {{{'} and {'.join(fields)}}}"
  marks = {field: f"\0{field}\0" for field in fields}
  try:
    made = text.format(**marks)
  except (KeyError, IndexError, ValueError, AttributeError) as error:
    raise ValueError(f"{name}={text!r}: {expected} ({error!r})") from error
  require(
    all(mark in made for mark in marks.values()), f"{name}={text!r}: {expected}"
  )


def check(task: Task, settings: Settings) -> None:
  """Checks what can be known without a model.

  Raises:
    ValueError: see `generative.evaluate`.
  """
  require(
    task.kind in GENERATIVE_KINDS,
    f"task {task.name} is of kind {task.kind!r}, which a head is fine-tuned "
    f"for: expected one of {list(GENERATIVE_KINDS)}, or as checkpoint a "
    "fine-tuned run (train.py --config=configs/finetune.py)",
  )
  require(
    bool(task.splits.get(settings.split)),
    f"task {task.name} has no examples in split={settings.split!r}: those "
    f"with some are {sorted(k for k, v in task.splits.items() if v)}",
  )
  few_shot, split = settings.few_shot, settings.split
  there = len(task.splits.get("train", ()))
  for ok, why in (
    (task.kind != "perplexity", ": perplexity has no prompts"),
    (
      few_shot <= there,
      f": {task.name} has {there} examples in its train split",
    ),
    (
      split != "train",
      " would show answers of split='train': expected another",
    ),
  ):
    require(ok or not few_shot, f"few_shot={few_shot}{why}")
  main_metric(task)


def main_metric(task: Task) -> str:
  """The first metric of the task that is measured.

  Raises:
    ValueError: none of them is.
  """
  known = METRICS[task.kind]
  for name in task.metrics or known:
    if name in known:
      return name
  raise ValueError(
    f"task {task.name}: metrics={task.metrics}: expected one of {list(known)}, "
    f"its kind is {task.kind!r}"
  )


def prompt_maker(
  task: Task, settings: Settings, answer_of: Callable[[Any], str]
) -> Callable[[Any], str]:
  """A function that makes an example's prompt, few-shot examples first."""
  train = task.splits.get("train", ())
  shots = "".join(
    settings.shot_format.format(prompt=shot.prompt, answer=answer_of(shot))
    for shot in sample(train, settings.few_shot, settings, "few_shot")
  )
  return lambda example: (
    shots + settings.prompt_format.format(prompt=example.prompt)
  )


def extract(text: str, pattern: str | None) -> str | None:
  """The answer within a text; None where the pattern is not in it."""
  if pattern is None:
    return text
  match = re.search(pattern, text)
  return match and match[1 if match.re.groups else 0]


def normalize(text: str | None, settings: Settings) -> str:
  """An answer as it is compared: see `Settings`; "" where there is none."""
  text = " ".join((text or "").split())
  if settings.answer_pattern is not None:
    text = re.sub(r"(?<=\d),(?=\d)", "", text).removesuffix(".")
  return text.lower() if settings.lower_case else text
