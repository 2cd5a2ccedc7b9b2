"""The folder of a run: its configuration, and which keys may change."""

from collections.abc import Sequence
import json
import os
from typing import Any

from etils import epath
from flax.traverse_util import flatten_dict
import jax
import ml_collections

from gemma_funnel import atomic
from gemma_funnel.parallel import processes

FOLDER = "checkpoints"
CONFIG = "config.json"
TOKENIZER = "tokenizer.model"

# Keys that may differ between the calls of one run: its place, its devices, how
# often it reports and saves.
_FREE_KEYS = (
  "workdir",
  "log_every",
  "eval_every",
  "checkpoint_every",
  "checkpoint_minutes",
  "keep",
  "keep_best",
  "keep_period",
  "tensorboard",
  "wandb",
  "watchdog_minutes",
  "on_nonfinite",
  "rollback.factor",
  "rollback.window",
  "rollback.most",
  "profile_steps",
  "eval_documents",
  "heldout_documents",
  "data.num_workers",
  "accumulate",
  "mesh.slice",
  "mesh.data",
  "mesh.fsdp",
  "mesh.sequence",
  "mesh.tensor",
  "model.remat",
  "model.kernel",
  "loss_chunk",
  "latency.batch_size",
  "latency.length",
  "latency.repeats",
)


def path_of(path: str | os.PathLike) -> epath.Path:
  """An absolute local path, or a bucket's."""
  text = os.fspath(path)
  return epath.Path(text if "://" in text else os.path.abspath(text))


def init_workdir(
  config: ml_collections.ConfigDict, free: Sequence[str] = ()
) -> None:
  """Makes `config.workdir` the folder of the run that `config` describes.

  Args:
    config: with `workdir`.
    free: further keys that may differ from those of the run that is there.

  Raises:
    ValueError: it holds a run of another configuration, or other files; it
      cannot be written to, or is not the same folder for all processes.
  """
  result = None
  if jax.process_index() == 0:
    result = processes.result_of(
      lambda: _init_workdir(config, (*_FREE_KEYS, *free))
    )
  processes.value_of(processes.broadcast_from_host0(result))
  seen = processes.gather((path_of(config.workdir) / CONFIG).exists())
  if not all(seen):
    raise ValueError(
      f"workdir={config.workdir}: process {seen.index(False)} does not see what "
      "process 0 wrote there; expected a folder that all hosts share, such as "
      "gs://bucket/run"
    )


def _init_workdir(
  config: ml_collections.ConfigDict, free: Sequence[str]
) -> None:
  folder = path_of(config.workdir)
  path = folder / CONFIG
  if folder.exists() and not folder.is_dir():
    raise ValueError(f"workdir={config.workdir} is a file, not a folder")
  # A call that failed before it made anything claims nothing: it may be
  # corrected.
  begun = (folder / FOLDER).exists() or (folder / TOKENIZER).exists()
  if path.exists():
    there, here = read_config(path), json.loads(config.to_json())
    differences = _differences(there, here, free)
    if differences and begun:
      raise ValueError(
        f"workdir={config.workdir} holds a run of another configuration "
        "(there / here): "
        + "; ".join(f"{k}: {a!r} / {b!r}" for k, a, b in differences)
        + ". Name another workdir, or remove that one."
      )
    if not differences:
      return
  elif begun:
    raise ValueError(
      f"{folder} has {FOLDER} or {TOKENIZER}, but no {CONFIG}: whose they "
      "are is not known. Name another workdir, or remove that one."
    )
  try:
    folder.mkdir(parents=True, exist_ok=True)
    atomic.write_text(path, config.to_json(indent=2) + "\n")
  except Exception as error:  # Each kind of bucket raises its own.
    raise ValueError(
      f"workdir={config.workdir} cannot be written to: "
      f"{getattr(error, 'strerror', None) or error}"
    ) from error


def read_config(path: epath.Path) -> dict[str, Any]:
  try:
    config = json.loads(path.read_text())
  except OSError as error:
    raise ValueError(f"{path} cannot be read: {error.strerror}") from error
  except ValueError as error:
    raise ValueError(f"{path} is not JSON: {error}") from error
  if not isinstance(config, dict):
    raise ValueError(f"{path} is no configuration: expected a JSON object")
  return config


def _differences(
  there: dict, here: dict, free: Sequence[str]
) -> list[tuple[str, Any, Any]]:
  there, here = (flatten_dict(x, sep=".") for x in (there, here))
  return [
    (key, there.get(key), here.get(key))
    for key in sorted((there.keys() | here.keys()) - set(free))
    if there.get(key) != here.get(key)
  ]
