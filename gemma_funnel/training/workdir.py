"""The folder of a run: its configuration, and which keys may change."""

from collections.abc import Iterator, Sequence
import contextlib
import dataclasses
import json
import os
from typing import Any

from flax.traverse_util import flatten_dict
import ml_collections

from gemma_funnel import atomic, locks
from gemma_funnel.checks import require
from gemma_funnel.config import (
  TransformerConfig,
  format_funnel,
  parse_funnel,
  resolve_funnel,
)
from gemma_funnel.convert.run import CONFIG, FOLDER, TOKENIZER, path_of
from gemma_funnel.convert.tensor_io import read_json
from gemma_funnel.parallel import processes
from gemma_funnel.registry import RECOVERIES, REDUCERS

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
  "accept_changed",
  "eval_documents",
  "heldout_documents",
  "data.num_workers",
  "data.on_bad",
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


@contextlib.contextmanager
def hold(workdir: str) -> Iterator[None]:
  """Makes the folder, and keeps other runs out of it until the block ends.

  Raises:
    ValueError: it is a file, cannot be written to, or has a name that Orbax
      takes for a pattern, so that no checkpoint could be read.
    HeldError: another run trains in it.
  """
  folder = path_of(workdir)

  def take() -> None:
    require(
      not set("[]*?") & set(os.fspath(folder)),
      f"workdir={workdir!r}: expected no [, ], * and ? in its path: checkpoints "
      "below it could not be read",
    )
    with _writing(workdir):
      is_file = folder.exists() and not folder.is_dir()
    require(not is_file, f"workdir={workdir} is a file, not a folder")
    with _writing(workdir):
      folder.mkdir(parents=True, exist_ok=True)
    stack.enter_context(locks.Lock(folder / ".lock", f"workdir={workdir}"))

  with contextlib.ExitStack() as stack:
    processes.on_host0(take)
    with atomic.naming(workdir):  # TensorBoard, say, tells no name.
      yield


@contextlib.contextmanager
def _writing(workdir: str) -> Iterator[None]:
  try:
    yield
  except Exception as error:  # Each kind of bucket raises its own.
    raise ValueError(
      f"workdir={workdir} cannot be written to: "
      f"{getattr(error, 'strerror', None) or error}"
    ) from error


def init_workdir(
  config: ml_collections.ConfigDict, free: Sequence[str] = ()
) -> None:
  """Makes `config.workdir` the folder of the run that `config` describes.

  Keys of `free` too may differ from those of the run that is there.

  Raises:
    ValueError: it holds a run of another configuration, or other files; it
      cannot be written to, or is not the same folder for all processes.
  """
  processes.on_host0(lambda: _init_workdir(config, (*_FREE_KEYS, *free)))
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
  # A call that failed before it made anything claims nothing: it may be
  # corrected.
  begun = (folder / FOLDER).exists() or (folder / TOKENIZER).exists()
  if path.exists():
    there, here = read_json(path), json.loads(config.to_json())
    differences = _differences(there, here, free)
    if differences and begun:
      raise ValueError(
        f"workdir={config.workdir} holds a run of another configuration "
        "(there / here): "
        + "; ".join(f"{k}: {a!r} / {b!r}" for k, a, b in differences)
        + ". Name another workdir, or remove that one."
      )
    if not differences:
      if begun:
        _check_learned(there)
      return
  elif begun:
    raise ValueError(
      f"{folder} has {FOLDER} or {TOKENIZER}, but no {CONFIG}: whose they "
      "are is not known. Name another workdir, or remove that one."
    )
  with _writing(config.workdir):
    folder.mkdir(parents=True, exist_ok=True)
    atomic.write_text(path, config.to_json(indent=2) + "\n")


def _differences(
  there: dict, here: dict, free: Sequence[str]
) -> list[tuple[str, Any, Any]]:
  there, here = (flatten_dict(x, sep=".") for x in (there, here))
  one, other = _canonical(there), _canonical(here)
  return [
    (key, there.get(key), here.get(key))
    for key in sorted((one.keys() | other.keys()) - set(free))
    if one.get(key) != other.get(key)
  ]


def _canonical(config: dict[str, Any]) -> dict[str, Any]:
  """Flat keys; those a previous version has not are what they default to."""
  config = dict(config)
  depth = config.get("model.num_layers", 0)
  for name in ("funnel", "funnel_sampled"):
    value = config.get(name)
    if isinstance(value, list):
      config[name] = [_resolved(text, depth) for text in value]
    elif name in config:
      config[name] = _resolved(value, depth)
  if depth:
    for field in dataclasses.fields(TransformerConfig):
      key = f"model.{field.name}"
      if field.default is None and any(k.startswith(f"{key}.") for k in config):
        continue  # A record, not left out.
      if field.default is not dataclasses.MISSING:
        config.setdefault(key, field.default)
  return config


def _resolved(funnel: Any, depth: int) -> Any:
  try:
    return format_funnel(resolve_funnel(funnel, depth))
  except ValueError:  # Of a reducer that is not registered here.
    return funnel


def _check_learned(there: dict) -> None:
  """Refuses version 0.1's checkpoints of what a funnel learns."""
  model = there.get("model", {})
  if "num_layers" not in model or "activation" in model:
    return
  for funnel in (there.get("funnel"), *(there.get("funnel_sampled") or ())):
    for stage in parse_funnel(funnel):
      if REDUCERS[stage.reduce].rows or RECOVERIES[stage.recover].rows:
        raise ValueError(
          f"workdir={there.get('workdir')} was written by version 0.1, and its "
          f"funnel {funnel!r} learns parameters, which have other paths now: "
          "finish it with that version, or start another run from it (init_from)"
        )
