"""The checkpoint that an evaluator is given, and what comes with it."""

from collections.abc import Sequence
import dataclasses
import math
import os
from typing import Any

from flax import nnx
from ml_collections import config_dict

from gemma_funnel import convert
from gemma_funnel.checks import require
from gemma_funnel.convert import hub
from gemma_funnel.convert.run import path_of
from gemma_funnel.convert.tensor_io import to_path
from gemma_funnel.data import tokenizer as tokenizer_lib
from gemma_funnel.model import Transformer


@dataclasses.dataclass(frozen=True)
class EvalModel:
  """A checkpoint that was read."""

  path: str
  model: Transformer  # With its own funnel, if it has one.
  tokenizer_path: str
  # Of a training run; None for other checkpoints.
  config: config_dict.ConfigDict | None = None
  restored_step: int | None = None

  def load_tokenizer(self) -> tokenizer_lib.Tokenizer:
    path = self.tokenizer_path
    return tokenizer_lib.find_tokenizer(
      path, path, self.model.config.vocab_size
    )

  def title(self, what: str) -> str:
    step = self.restored_step
    return f"{what}: {self.path}" + ("" if step is None else f", step {step}")

  def settings(self) -> dict[str, Any]:
    """What results depend on, as JSON values."""
    return {
      "checkpoint": self.path,
      "step": self.restored_step,
      "model": self.model.config.to_dict(),
    }


def load(
  config: Any, needs: Sequence[str] = (), dtype: str | None = None
) -> EvalModel:
  """Loads the run, or the checkpoint of others, that `config` names.

  Args:
    config: with the keys `checkpoint`, `tokenizer` and `needs`.
    needs: keys that only a training run may leave unset.
    dtype: of all; None is as trained for a run, and float32 for others.

  Raises:
    ValueError: nothing there, a key that is missing, or a tokenizer beside that
      of a run.
  """
  path = config.checkpoint
  require(
    path is not None,
    "checkpoint is missing: expected --config.checkpoint=PATH, of a training "
    "run or of what gemma_funnel.load reads",
  )
  require(
    hub.is_name(path) or path_of(path).exists(),
    f"checkpoint={path!r} is not there",
  )
  found = convert.describe(path)
  if found.is_run:
    require(
      config.tokenizer is None,
      f"tokenizer={config.tokenizer!r}: expected none, {path} is a training "
      "run with a tokenizer of its own",
    )
    run = convert.load_run(path, dtype=dtype)
    return EvalModel(path, run.model, run.tokenizer_path, run.config, run.step)
  tokenizer = config.tokenizer or found.tokenizer_path
  given = {"tokenizer": to_path(tokenizer).is_file()}
  for key, there in (given | {key: config[key] for key in needs}).items():
    require(
      there,
      f"{key} is missing: {path} is no training run, so that --config.{key} is "
      "expected",
    )
  model = convert.load(path, dtype=dtype or "float32")
  return EvalModel(path, model, tokenizer)


def default_out(path: str) -> str:
  """Where results of the checkpoint at `path` go unless said otherwise."""
  inside = path if to_path(path).is_dir() else os.path.dirname(path)
  return os.path.join(inside, "eval")


def reconfigured(model: Transformer, **changes: Any) -> Transformer:
  """The model with other values of its configuration, on the same weights."""
  config = dataclasses.replace(model.config, **changes)
  graphdef = nnx.graphdef(Transformer.abstract(config, model.stages))
  return nnx.merge(graphdef, nnx.state(model))


def on_this_device(model: Transformer) -> Transformer:
  """The model with the kernel of the devices here, not of those of its run."""
  return reconfigured(model, kernel="auto")


def perplexity(nats: float) -> float | None:
  """The exponential; None where that is out of a float's range."""
  return math.exp(nats) if nats < 709 else None
