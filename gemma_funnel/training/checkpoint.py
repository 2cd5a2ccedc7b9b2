"""Checkpoints of a run: parameters, optimizer, data iterator, step and config.

A run is a folder:

  config.json      the configuration it was started with
  tokenizer.model  where the run trained its own
  checkpoints/N/   after N steps, one Orbax checkpoint of everything

Orbax writes asynchronously and makes a checkpoint visible by a rename, when it
is complete. Sums of its files are written before that, and checked before it
is read.
"""

from collections.abc import Callable
import dataclasses
import json
import os
import pathlib
from typing import Any
import zlib

from flax import nnx
import jax
from jax.experimental import multihost_utils
import ml_collections

from gemma_funnel.config import Funnel, GemmaConfig, resolve_funnel
from gemma_funnel.model import Gemma
from gemma_funnel.training import sharding

FOLDER = "checkpoints"
CONFIG = "config.json"
TOKENIZER = "tokenizer.model"
# Of a run; a fine-tuned one has a copy of what it was given.
TOKENIZERS = (TOKENIZER, "tokenizer.json")
SUMS = "sums.json"

# What may differ between the calls that make up one run: where it lies, and
# how often it reports or saves.
_FREE_KEYS = (
    "workdir", "log_every", "eval_every", "checkpoint_every", "keep",
    "tensorboard", "eval_documents", "heldout_documents",
    "latency.batch_size", "latency.length", "latency.repeats",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Run:
  """A finished or interrupted run, read back.

  Attributes:
    model: with the parameters of `step`, and the funnel that was asked for.
    config: the run's configuration.
    tokenizer_path: its tokenizer.model.
    step: of the checkpoint that was read.
    extra: other trees that were asked for, by name.
  """

  model: Gemma
  config: ml_collections.ConfigDict
  tokenizer_path: str
  step: int
  extra: dict[str, Any] = dataclasses.field(default_factory=dict)


class Checkpoints:
  """The checkpoints of one run, written asynchronously."""

  def __init__(
    self,
    workdir: str | os.PathLike,
    keep: int | None = None,
    read_only: bool = False,
  ):
    """Opens the run in `workdir`.

    Args:
      workdir: the run's folder.
      keep: how many checkpoints to keep, the newest; None is all.
      read_only: for a run that may be another process's: nothing is changed.
    """
    import orbax.checkpoint as ocp

    self._ocp = ocp
    self._folder = pathlib.Path(workdir).absolute() / FOLDER
    self._read_only = read_only
    self._saving = None
    writes = dict(
      max_to_keep=keep,
      cleanup_tmp_directories=True,  # Of a save that was killed.
      enable_async_checkpointing=True,
      # Called when the files are complete and not yet renamed.
      async_options=ocp.AsyncOptions(
        post_finalization_callback=self._write_sums
      ),
    )
    self._manager = ocp.CheckpointManager(
      self._folder,
      options=ocp.CheckpointManagerOptions(
        **(dict(create=False) if read_only else writes)
      ),
    )

  def __enter__(self) -> "Checkpoints":
    return self

  def __exit__(self, *_) -> None:
    self._manager.close()

  def latest(self) -> int | None:
    """The newest checkpoint's step; None if there is none."""
    return max(self._steps(), default=None)

  def _steps(self) -> list[int]:
    return _steps_in(self._folder)

  def save(self, step: int, trees: dict[str, Any], data, config) -> None:
    """Starts writing a checkpoint, unless `step` has one; returns early.

    Args:
      step: how many steps have been taken.
      trees: of arrays, by name: "params" the model's parameters, "opt_state"
        the optimizer's state, and others.
      data: the grain iterator that gave the last batch.
      config: the run's ConfigDict.
    """
    import grain

    if step in self._steps():
      return
    self.wait()  # The sums of the one before are then written.
    self._saving = step
    args = self._ocp.args
    self._manager.save(
      step,
      args=args.Composite(
        **{name: args.StandardSave(tree) for name, tree in trees.items()},
        data=grain.checkpoint.CheckpointSave(data),
        config=args.JsonSave(json.loads(config.to_json())),
      ),
    )

  def wait(self) -> None:
    """Returns when all that was saved is complete on disk."""
    self._manager.wait_until_finished()

  def _write_sums(self) -> None:
    (folder,) = (
      path
      for path in self._folder.iterdir()
      if path.name.split(".orbax-checkpoint-tmp")[0] == str(self._saving)
    )
    (folder / SUMS).write_text(json.dumps(_sums(folder), indent=1))

  def restore(self, trees: dict[str, Any], data) -> tuple[int, dict[str, Any]]:
    """Reads the newest checkpoint whose files are as they were written.

    Newer ones are renamed, so that their steps can be saved again, and named
    in a line each.

    Args:
      trees: as for `save`, of ShapeDtypeStructs with shardings.
      data: a grain iterator, whose state is set.

    Returns:
      (step, trees).

    Raises:
      ValueError: all of them are damaged.
    """
    import grain

    step, args = self._newest_intact(), self._ocp.args
    restored = self._manager.restore(
      step,
      args=args.Composite(
        **{name: args.StandardRestore(tree) for name, tree in trees.items()},
        data=grain.checkpoint.CheckpointRestore(data),
      ),
    )
    return step, {name: restored[name] for name in trees}

  def restore_trees(self, abstract_of: Callable[[dict], dict[str, Any]]):
    """Reads configuration and weights, of the same checkpoint as `restore`.

    Args:
      abstract_of: gives trees of ShapeDtypeStructs for a configuration, by the
        names that they were saved under.

    Returns:
      (step, configuration as a dict, trees).

    Raises:
      ValueError: all of them are damaged.
    """
    step, args = self._newest_intact(), self._ocp.args
    restore = lambda **items: self._manager.restore(
      step, args=args.Composite(**items)
    )
    config = restore(config=args.JsonRestore())["config"]
    wanted = {
      name: args.StandardRestore(tree)
      for name, tree in abstract_of(config).items()
    }
    found = restore(**wanted)
    return step, config, {name: found[name] for name in wanted}

  def _newest_intact(self) -> int:
    step, damaged = _find_intact(self._folder)
    if damaged and not self._read_only:
      if jax.process_index() == 0:
        for broken in damaged:
          _set_aside(self._folder / str(broken))
      multihost_utils.sync_global_devices("damaged checkpoints are set aside")
      self._manager.reload()
    return step


def newest_intact(workdir: str | os.PathLike) -> pathlib.Path:
  """The folder of a run's newest checkpoint whose files are as written.

  Raises:
    ValueError: there is none.
  """
  folder = pathlib.Path(workdir) / FOLDER
  return folder / str(_find_intact(folder)[0])


def _steps_in(folder: pathlib.Path) -> list[int]:
  # Orbax's own list leaves out what it finds incomplete, and tells no one.
  names = [path.name for path in folder.iterdir()]
  return sorted(int(name) for name in names if name.isdecimal())


def _find_intact(folder: pathlib.Path) -> tuple[int, list[int]]:
  """The newest step that is intact, and the newer ones, which a line tells."""
  damages = {}
  for step in reversed(_steps_in(folder)):
    damage = _damage_of(folder / str(step))
    if damage is None:
      break
    damages[step] = damage
  else:
    listed = "; ".join(f"{step}: {what}" for step, what in damages.items())
    raise ValueError(
      f"no checkpoint in {folder} can be read: " + (listed or "it is empty")
    )
  for broken, damage in damages.items():
    if jax.process_index() == 0:
      print(
        f"checkpoint {broken} is damaged ({damage}); using {step} instead",
        flush=True,
      )
  return step, list(damages)


def _sums(folder: pathlib.Path) -> dict[str, list[int]]:
  """Size and CRC-32 of each file that Orbax will not touch again."""
  return {
    str(path.relative_to(folder)): [path.stat().st_size, _crc32(path)]
    for path in sorted(folder.rglob("*"))
    if path.is_file() and path.parent != folder
  }


def _crc32(path: pathlib.Path) -> int:
  crc = 0
  with path.open("rb") as f:
    while block := f.read(1 << 22):
      crc = zlib.crc32(block, crc)
  return crc


def _damage_of(folder: pathlib.Path) -> str | None:
  """What is wrong with a checkpoint's files; None if nothing is.

  Orbax itself reads some damaged files without a word.
  """
  try:
    expected = json.loads((folder / SUMS).read_text())
    found = _sums(folder)
  except (OSError, ValueError) as error:
    return f"{SUMS}: {error}"
  for name, sums in expected.items():
    if name not in found:
      return f"{name} is missing"
    if found[name] != sums:
      size, was = found[name][0], sums[0]
      return f"{name} has " + (
        f"{size} bytes of {was}" if size != was else "other content"
      )
  return None


def _set_aside(folder: pathlib.Path) -> None:
  name, number = f"{folder.name}.damaged", 0
  while (target := folder.with_name(f"{name}{number or ''}")).exists():
    number += 1
  folder.rename(target)


def claim_workdir(config: ml_collections.ConfigDict) -> None:
  """Makes `config.workdir` the folder of the run that `config` describes.

  Raises:
    ValueError: it holds a run of another configuration, or other files.
  """
  folder = pathlib.Path(config.workdir)
  path = folder / CONFIG
  if folder.exists() and not folder.is_dir():
    raise ValueError(f"workdir={config.workdir} is a file, not a folder")
  # A call that failed before it made anything claims nothing: it may be
  # corrected.
  begun = (folder / FOLDER).exists() or (folder / TOKENIZER).exists()
  if path.exists():
    differences = _differences(_read_config(path), json.loads(config.to_json()))
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
  temporary = path.with_suffix(".tmp")
  try:
    folder.mkdir(parents=True, exist_ok=True)
    temporary.write_text(config.to_json(indent=2) + "\n")
  except OSError as error:
    raise ValueError(
      f"workdir={config.workdir} cannot be written to: {error.strerror}"
    ) from error
  os.replace(temporary, path)


def _read_config(path: pathlib.Path) -> dict[str, Any]:
  try:
    config = json.loads(path.read_text())
  except OSError as error:
    raise ValueError(f"{path} cannot be read: {error.strerror}") from error
  except ValueError as error:
    raise ValueError(f"{path} is not JSON: {error}") from error
  if not isinstance(config, dict):
    raise ValueError(f"{path} is no configuration: expected a JSON object")
  return config


def _differences(there: dict, here: dict) -> list[tuple[str, Any, Any]]:
  def flat(tree, prefix=""):
    for key, value in tree.items():
      if isinstance(value, dict):
        yield from flat(value, f"{prefix}{key}.")
      elif prefix + key not in _FREE_KEYS:
        yield prefix + key, value

  there, here = dict(flat(there)), dict(flat(here))
  return [
    (key, there.get(key), here.get(key))
    for key in sorted(there.keys() | here.keys())
    if there.get(key) != here.get(key)
  ]


def load_run(
  path: str | os.PathLike,
  funnel: Funnel = None,
  dtype: str | None = None,
  mesh: jax.sharding.Mesh | None = None,
  extra: Callable[[GemmaConfig], dict[str, Any]] = lambda config: {},
) -> Run:
  """Reads the newest readable checkpoint of a run.

  Args:
    path: the run's folder (its workdir).
    funnel: a funnel to use instead of the one it was trained with, which None
      is; "off" is none. See `Gemma.with_funnel` for what it learns.
    dtype: of parameters and compute; None is as trained.
    mesh: where parameters are placed, by the rules of `sharding`; each process
      reads its own share. None is the default device.
    extra: shapes of further trees to read, by their names in the checkpoint.

  Raises:
    ValueError: no readable checkpoint there, or a funnel that does not fit.
  """
  path = pathlib.Path(path)
  if not (path / FOLDER).is_dir():
    raise ValueError(f"{path} is no run: it has no folder {FOLDER}/")
  dtypes = {} if dtype is None else {"param_dtype": dtype, "dtype": dtype}

  def abstract_model(config: dict) -> Gemma:
    model_config = GemmaConfig.from_dict({**config["model"], **dtypes})
    # A funnel that does not fit is said before anything is read.
    resolve_funnel(funnel, model_config.num_layers)
    return Gemma.abstract(model_config, config["funnel"])

  def abstract_trees(config: dict):
    model = abstract_model(config)
    trees = {
      "params": nnx.to_pure_dict(nnx.state(model)),
      **extra(model.config),
    }
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shardings = (
      jax.tree.map(lambda _: device, trees)
      if mesh is None
      else sharding.shardings_of(trees, mesh)
    )
    return jax.tree.map(
      lambda p, place: jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=place),
      trees,
      shardings,
    )

  with Checkpoints(path, read_only=True) as checkpoints:
    abstract_model(_read_config(path / CONFIG))
    step, config, trees = checkpoints.restore_trees(abstract_trees)
  params = trees.pop("params")
  model = nnx.merge(nnx.graphdef(abstract_model(config)), params)
  if funnel is not None:
    model = model.with_funnel(funnel)
  given = config.get("data", config)["tokenizer"]
  own = [p for p in map(path.joinpath, TOKENIZERS) if p.exists()]
  return Run(
    model=model,
    config=ml_collections.ConfigDict(config),
    tokenizer_path=str(own[0]) if own else given or str(path / TOKENIZER),
    step=step,
    extra=trees,
  )


def load_model(
  path: str | os.PathLike,
  funnel: Funnel = None,
  dtype: str = "float32",
  mesh: jax.sharding.Mesh | None = None,
) -> Gemma:
  """The model of `load_run`."""
  return load_run(path, funnel, dtype, mesh).model
