"""Checkpoints of others, and of ours, to a `Gemma`.

`load` tells what it was given by the content, never by the name. A format is a
module with three functions: whether a folder is one of its own, what
configuration it holds, and its tensors one at a time, as pieces
`(path, layer, array)`: where in our parameter tree, which layer of a stacked
parameter (None where it is not stacked), and the values in our layout.
"""

from collections.abc import Iterable
import dataclasses
import os
import pathlib

from flax import nnx
import jax.numpy as jnp
import numpy as np

from gemma_funnel.config import (
  Funnel,
  FunnelConfig,
  GemmaConfig,
  resolve_funnel,
)
from gemma_funnel.convert import huggingface
from gemma_funnel.model import Gemma

Piece = tuple[tuple[str, ...], int | None, np.ndarray]
_TOKENIZER = "tokenizer.model"


@dataclasses.dataclass(frozen=True)
class Description:
  """What a checkpoint is, by its configuration alone.

  Attributes:
    config: of the model; its dtypes are those of a training run.
    stages: of the funnel it was trained with, resolved; () is none.
    tokenizer_path: where its tokenizer is, if it has one.
    is_run: whether it is a training run of ours.
  """

  config: GemmaConfig
  stages: tuple[FunnelConfig, ...]
  tokenizer_path: str
  is_run: bool


def load(
  path: str | os.PathLike[str],
  funnel: Funnel = None,
  dtype: str = "float32",
) -> Gemma:
  """Loads a checkpoint, whatever its format.

  Args:
    path: a Hugging Face folder (config.json beside model.safetensors, or beside
      its shards and their index), or the folder of a training run of ours.
    funnel: the funnel to run it with. None is no funnel; for a training run it
      is the one that the run was trained with ("off" is no funnel there). What
      it learns and the checkpoint has not is made afresh, and a line says so.
    dtype: what parameters are stored in and matrices are multiplied in:
      "float32", "bfloat16" or "float16".

  Returns:
    The model, on the default device.

  Raises:
    ValueError: nothing that is known at `path`; an unsupported configuration;
      a funnel that does not fit the depth; or a checkpoint that is damaged or
      whose tensors are missing, unexpected or mis-shaped: all are named.
  """
  folder = pathlib.Path(path)
  if _is_training_run(folder):
    from gemma_funnel.training import checkpoint

    return checkpoint.load_model(folder, funnel, dtype)
  _require_huggingface(folder)
  config = dataclasses.replace(
    huggingface.read_config(folder), param_dtype=dtype, dtype=dtype
  )
  # A funnel that does not fit is said before any weight is read.
  stages = resolve_funnel(funnel, config.num_layers)
  plain = _assemble(
    Gemma.abstract(config), huggingface.read_pieces(folder, config)
  )
  return plain.with_funnel(stages)


def describe(path: str | os.PathLike[str]) -> Description:
  """Says what `load` would load, without reading weights.

  Raises:
    ValueError: nothing that is known at `path`, or no configuration of ours.
  """
  folder = pathlib.Path(path)
  own = str(folder / _TOKENIZER)
  if not _is_training_run(folder):
    _require_huggingface(folder)
    return Description(huggingface.read_config(folder), (), own, False)
  file = folder / "config.json"
  try:
    run = huggingface.peek(file)
    model, funnel = run["model"], run["funnel"]
    given = run["data"]["tokenizer"]
  except (KeyError, TypeError) as error:
    raise ValueError(
      f"{file} is no configuration of a training run: expected an object with "
      "model, funnel and data.tokenizer"
    ) from error
  config = GemmaConfig.from_dict(model)
  stages = resolve_funnel(funnel, config.num_layers)
  return Description(config, stages, given or own, True)


def _require_huggingface(folder: pathlib.Path) -> None:
  if not huggingface.is_checkpoint(folder):
    raise ValueError(
      f"{folder} is no checkpoint that is known: {_describe(folder)}. "
      "Expected a Hugging Face folder (config.json with a model_type, and "
      "model.safetensors or model.safetensors.index.json) or the folder of "
      "a training run (with checkpoints/ in it)"
    )


def _is_training_run(folder: pathlib.Path) -> bool:
  config = huggingface.peek(folder / "config.json")
  if "model_type" in config:
    return False
  return "gemma_funnel" in config or (folder / "checkpoints").is_dir()


def _describe(folder: pathlib.Path, most: int = 10) -> str:
  if not folder.exists():
    return "there is nothing there"
  if not folder.is_dir():
    return "it is a file, not a folder"
  names = sorted(entry.name for entry in folder.iterdir())
  more = f" and {len(names) - most} more" if len(names) > most else ""
  return f"it holds {names[:most]}{more}" if names else "it is empty"


def _assemble(abstract: Gemma, pieces: Iterable[Piece]) -> Gemma:
  """The abstract model with values, which `pieces` must hold in full.

  Each piece goes straight to its place in a host array of the final dtype, so
  that at most one tensor exists twice.
  """
  graphdef, state = nnx.split(abstract)
  params = dict(nnx.to_flat_state(state))
  host = {path: np.empty(p.shape, p.dtype) for path, p in params.items()}
  for path, layer, array in pieces:
    host[path][... if layer is None else layer] = array
  for path, param in params.items():
    params[path] = param.replace(jnp.asarray(host.pop(path)))
  return nnx.merge(graphdef, nnx.from_flat_state(params))
