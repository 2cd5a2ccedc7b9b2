"""The checkpoint that an evaluator is given, and what comes with it."""

from collections.abc import Sequence
import dataclasses
import os
from typing import Any

from flax import nnx
from ml_collections import config_dict

from gemma_funnel import convert
from gemma_funnel.model import Transformer


@dataclasses.dataclass(frozen=True)
class Subject:
  """A checkpoint that was read.

  Attributes:
    model: with its own funnel, if it has one.
    tokenizer_path: of the checkpoint, or the one that was named.
    config: of the training run; None where it is none.
    step: that the run was at; None where it is none.
  """

  model: Transformer
  tokenizer_path: str
  config: config_dict.ConfigDict | None = None
  step: int | None = None


def load(
  config: Any, needs: Sequence[str] = (), dtype: str | None = None
) -> Subject:
  """Loads the run, or the checkpoint of others, that `config` names.

  Args:
    config: with the keys `checkpoint`, `tokenizer` and `needs`.
    needs: keys that may be unset for a training run alone.
    dtype: of parameters and compute; None is as trained, and float32 for what
      is no training run.

  Raises:
    ValueError: nothing there, a key that is missing, or a tokenizer beside that
      of a run.
  """
  path = config.checkpoint
  if path is None:
    raise ValueError(
      "checkpoint is missing: expected --config.checkpoint=PATH, of a "
      "training run or of what gemma_funnel.load reads"
    )
  if not os.path.exists(path):
    raise ValueError(f"checkpoint={path!r} is not there")
  found = convert.describe(path)
  if found.is_run:
    if config.tokenizer is not None:
      raise ValueError(
        f"tokenizer={config.tokenizer!r}: expected none, {path} is a "
        "training run with a tokenizer of its own"
      )
    run = convert.load_run(path, dtype=dtype)
    return Subject(run.model, run.tokenizer_path, run.config, run.step)
  tokenizer = config.tokenizer or found.tokenizer_path
  given = {"tokenizer": os.path.isfile(tokenizer)}
  given |= {key: config[key] for key in needs}
  for key, there in given.items():
    if not there:
      raise ValueError(
        f"{key} is missing: {path} is no training run, so that "
        f"--config.{key} is expected"
      )
  return Subject(convert.load(path, dtype=dtype or "float32"), tokenizer)


def folder(path: str) -> str:
  """Where results of the checkpoint at `path` go unless said otherwise."""
  inside = path if os.path.isdir(path) else os.path.dirname(path)
  return os.path.join(inside, "eval")


def on_this_device(model: Transformer) -> Transformer:
  """The model with the kernel that suits the devices here.

  That of a run is the one of the devices it was trained on.
  """
  config = dataclasses.replace(model.config, kernel="auto")
  graphdef = nnx.graphdef(Transformer.abstract(config, model.stages))
  return nnx.merge(graphdef, nnx.state(model))
