"""Checkpoints of a run: parameters, optimizer, data iterator, step and config.

A run is a folder:

  config.json      the configuration it was started with
  tokenizer.model  where the run trained its own
  checkpoints/N/   after N steps, one Orbax checkpoint of everything

The folder may be on a bucket (gs://..). Orbax writes asynchronously, each process
its own part, and makes a checkpoint visible when it is complete. Sums of its
files are written before that, and checked before it is read.
"""

from collections.abc import Callable
from concurrent import futures
import dataclasses
import json
import os
from typing import Any
import zlib

from etils import epath
from flax import nnx
import jax
import ml_collections

from gemma_funnel import lora as lora_lib
from gemma_funnel.config import Funnel, TransformerConfig, resolve_funnel
from gemma_funnel.model import Transformer
from gemma_funnel.parallel import processes, sharding
from gemma_funnel.training.workdir import (
  CONFIG,
  FOLDER,
  TOKENIZER,
  path_of,
  read_config,
)

# Of a run; a fine-tuned one has a copy of what it was given.
TOKENIZERS = (TOKENIZER, "tokenizer.json")
SUMS = "sums.json"

_THREADS = 8


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

  model: Transformer
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
    keep_best: int = 0,
    keep_period: int | None = None,
    read_only: bool = False,
  ):
    """Opens the run in `workdir`.

    Args:
      workdir: the run's folder.
      keep: how many checkpoints to keep, the newest; None is all.
      keep_best: how many more, those of the least held-out loss.
      keep_period: more still, each whose step is a multiple of it.
      read_only: for a run that may be another process's: nothing is changed.
    """
    import orbax.checkpoint as ocp

    self._ocp = ocp
    self._folder = path_of(workdir) / FOLDER
    self._read_only = read_only
    self._saving = None
    policies = ocp.checkpoint_managers
    kept = [policies.LatestN(keep)]
    if keep_best:
      kept.append(
        policies.BestN(
          get_metric_fn=lambda metrics: metrics["loss"],
          reverse=True,
          n=keep_best,
          keep_checkpoints_without_metrics=False,
        )
      )
    if keep_period:
      kept.append(policies.EveryNSteps(keep_period))
    writes = dict(
      preservation_policy=policies.AnyPreservationPolicy(kept),
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

  def save(
    self,
    step: int,
    trees: dict[str, Any],
    progress: dict[str, Any],
    config: ml_collections.ConfigDict,
    loss: float | None = None,
  ) -> None:
    """Starts writing a checkpoint, unless `step` has one; returns early.

    Args:
      step: how many steps have been taken.
      trees: of arrays, by name: "params" the model's parameters, "opt_state"
        the optimizer's state, and others.
      progress: where the run is, its data among it, as JSON can hold it; the
        same in all processes.
      config: the run's ConfigDict.
      loss: held out, if it has just been measured.
    """
    if step in self._steps():
      return
    self.wait()  # The sums of the one before are then written.
    self._saving = step
    args = self._ocp.args
    self._manager.save(
      step,
      args=args.Composite(
        **{name: args.StandardSave(tree) for name, tree in trees.items()},
        progress=args.JsonSave(progress),
        config=args.JsonSave(json.loads(config.to_json())),
      ),
      metrics=None if loss is None else {"loss": loss},
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

  def restore(self, trees: dict[str, Any]):
    """Reads the newest checkpoint whose files are as they were written.

    Newer ones are renamed, so that their steps can be saved again, and named
    in a line each.

    Args:
      trees: as for `save`, of ShapeDtypeStructs with shardings: on whatever
        mesh.

    Returns:
      (step, trees, progress).

    Raises:
      ValueError: all of them are damaged.
    """
    step, args = self._newest_intact(), self._ocp.args
    restored = self._manager.restore(
      step,
      args=args.Composite(
        **{name: args.StandardRestore(tree) for name, tree in trees.items()},
        progress=args.JsonRestore(),
      ),
    )
    found = {name: restored[name] for name in trees}
    return step, found, restored["progress"]

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
    # Process 0 looks, and all go by what it found.
    found = None
    if jax.process_index() == 0:
      found = processes.result_of(lambda: _find_intact(self._folder))
      if "value" in found and found["value"][1] and not self._read_only:
        for broken in found["value"][1]:
          _set_aside(self._folder / str(broken))
    step, damaged = processes.value_of(processes.broadcast_from_host0(found))
    if damaged and not self._read_only:
      self._manager.reload()
    return step


def newest_intact(workdir: str | os.PathLike) -> epath.Path:
  """The folder of a run's newest checkpoint whose files are as written.

  Raises:
    ValueError: there is none.
  """
  folder = path_of(workdir) / FOLDER
  return folder / str(_find_intact(folder)[0])


def _steps_in(folder: epath.Path) -> list[int]:
  # Orbax's own list leaves out what it finds incomplete, and tells no one.
  names = [path.name for path in folder.iterdir()]
  return sorted(int(name) for name in names if name.isdecimal())


def _find_intact(folder: epath.Path) -> tuple[int, list[int]]:
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
    print(
      f"checkpoint {broken} is damaged ({damage}); using {step} instead",
      flush=True,
    )
  return step, list(damages)


def _sums(folder: epath.Path) -> dict[str, list[int]]:
  """Size and CRC-32 of each file that Orbax will not touch again."""
  files = _files_below(folder)
  with futures.ThreadPoolExecutor(_THREADS) as pool:
    found = list(pool.map(_size_and_crc32, files))
  names = [path.relative_to(folder).as_posix() for path in files]
  return dict(zip(names, found, strict=True))


def _files_below(folder: epath.Path) -> list[epath.Path]:
  found = []
  for child in sorted(folder.iterdir()):
    if child.is_dir():
      found += _all_files(child)
  return found


def _all_files(folder: epath.Path) -> list[epath.Path]:
  found = []
  for child in sorted(folder.iterdir()):
    found += _all_files(child) if child.is_dir() else [child]
  return found


def _size_and_crc32(path: epath.Path) -> list[int]:
  size = crc = 0
  with path.open("rb") as f:
    while block := f.read(1 << 22):
      crc, size = zlib.crc32(block, crc), size + len(block)
  return [size, crc]


def _damage_of(folder: epath.Path) -> str | None:
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


def _set_aside(folder: epath.Path) -> None:
  name, number = f"{folder.name}.damaged", 0
  while (target := folder.parent / f"{name}{number or ''}").exists():
    number += 1
  folder.rename(target)


def load_run(
  path: str | os.PathLike,
  funnel: Funnel = None,
  dtype: str | None = None,
  mesh: jax.sharding.Mesh | None = None,
  extra: Callable[[TransformerConfig], dict[str, Any]] = lambda config: {},
) -> Run:
  """Reads the newest readable checkpoint of a run.

  Args:
    path: the run's folder (its workdir).
    funnel: a funnel to use instead of the one it was trained with, which None
      is; "off" is none. See `Transformer.with_funnel` for what it learns.
    dtype: of parameters and compute; None is as trained.
    mesh: where parameters are placed, by the rules of `sharding`; each process
      reads its own share. None is the default device.
    extra: shapes of further trees to read, by their names in the checkpoint.

  Raises:
    ValueError: no readable checkpoint there, or a funnel that does not fit.
  """
  path = path_of(path)
  if not (path / FOLDER).is_dir():
    raise ValueError(f"{path} is no run: it has no folder {FOLDER}/")
  dtypes = {} if dtype is None else {"param_dtype": dtype, "dtype": dtype}

  def abstract_model(config: dict) -> Transformer:
    model_config = TransformerConfig.from_dict({**config["model"], **dtypes})
    # A funnel that does not fit is said before anything is read.
    resolve_funnel(funnel, model_config.num_layers)
    return Transformer.abstract(model_config, config["funnel"])

  def abstract_trees(config: dict):
    model = abstract_model(config)
    params = nnx.to_pure_dict(nnx.state(model))
    trees = {"params": params, **extra(model.config)}
    if lora := lora_lib.of_run(config):
      init = lambda params: lora_lib.init(params, lora, jax.random.key(0))
      trees["lora"] = jax.eval_shape(init, trees.pop("params"))
    return sharding.place(trees, mesh)

  with Checkpoints(path, read_only=True) as checkpoints:
    abstract_model(read_config(path / CONFIG))
    step, config, trees = checkpoints.restore_trees(abstract_trees)
  params = trees.pop("params", None)
  if params is None:
    params = _merge_lora(
      config, abstract_model(config), trees.pop("lora"), mesh
    )
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


def _merge_lora(config: dict, model: Transformer, adapters, mesh):
  """The parameters of a run that trained factors beside a checkpoint's."""
  from gemma_funnel.training import start  # Which reads runs too.

  config = ml_collections.ConfigDict(config)
  lora = lora_lib.of_run(config)
  base = start.load_params(config, model.stages, mesh)
  base = start.load_base(base, lora, mesh)
  wanted = nnx.to_pure_dict(nnx.state(model))

  def merge(base, adapters):
    merged = lora_lib.merge(base, adapters, lora)
    return jax.tree.map(lambda x, like: x.astype(like.dtype), merged, wanted)

  placed = sharding.shardings_of(wanted, mesh)
  return jax.jit(merge, out_shardings=placed)(base, adapters)


def load_model(
  path: str | os.PathLike,
  funnel: Funnel = None,
  dtype: str = "float32",
  mesh: jax.sharding.Mesh | None = None,
) -> Transformer:
  """The model of `load_run`."""
  return load_run(path, funnel, dtype, mesh).model
