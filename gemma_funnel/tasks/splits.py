"""Which examples a split has: dev out of train, and seeded samples."""

from collections.abc import Mapping, Sequence
import dataclasses
import random
from typing import Any

from gemma_funnel.tasks.task import GENERATIVE_KINDS, SPLITS, Example, Task


def finish(task: Task, config: Any) -> Task:
  """Takes dev from train where there is none, and samples what is too much.

  Args:
    task: with the splits as they were read; train among them, unless the kind
      is generative.
    config: checked; `dev_fraction`, `split_seed` and `max_train`, `max_dev`,
      `max_test`.

  Returns:
    The task with train, dev and test, or, for a generative kind, the splits
    that were given.

  Raises:
    ValueError: a split that is empty, or too small to be divided.
  """
  splits = dict(task.splits)
  _require_examples(task, splits)
  if "dev" not in splits and task.kind not in GENERATIVE_KINDS:
    splits["train"], splits["dev"] = _divide(splits["train"], config)
  for split in splits:
    splits[split] = sample(splits[split], config[f"max_{split}"], config, split)
  ordered = {split: tuple(splits[split]) for split in SPLITS if split in splits}
  return dataclasses.replace(task, splits=ordered)


def check(config: Any) -> None:
  """Raises ValueError on a value that `finish` cannot work with."""
  fraction = config.dev_fraction
  is_number = isinstance(fraction, float)
  if not is_number or not 0 < fraction < 1:
    raise ValueError(
      f"dev_fraction={fraction!r}: expected a number between 0 and 1, both "
      "excluded"
    )
  for split in SPLITS:
    count = config[f"max_{split}"]
    if count is not None and count < 1:
      raise ValueError(f"max_{split}={count}: expected an integer >= 1")


def generator(config: Any, what: str) -> random.Random:
  """Random numbers that are the same on every machine."""
  return random.Random(f"{config.split_seed}:{what}")


def sample(
  examples: Sequence[Example], count: int | None, config: Any, what: str
) -> Sequence[Example]:
  """At most `count` of them, any one as likely as another, in their order."""
  if count is None or count >= len(examples):
    return examples
  chosen = generator(config, what).sample(range(len(examples)), count)
  return [examples[i] for i in sorted(chosen)]


def _require_examples(
  task: Task, splits: Mapping[str, Sequence[Example]]
) -> None:
  for split, examples in splits.items():
    if not examples:
      skipped = task.skipped.get(split, 0)
      why = f" ({skipped} malformed rows were skipped)" if skipped else ""
      raise ValueError(
        f"the split {split} of {task.name!r} is empty{why}; expected at least "
        "one example"
      )


def _divide(train: Sequence[Example], config: Any):
  if len(train) < 2:
    raise ValueError(
      f"train has {len(train)} example, too few to take dev from; name a dev"
    )
  count = round(len(train) * config.dev_fraction)
  count = min(max(count, 1), len(train) - 1)
  indices = range(len(train))
  held = set(generator(config, "dev of train").sample(indices, count))
  dev = [train[i] for i in sorted(held)]
  return [train[i] for i in indices if i not in held], dev
