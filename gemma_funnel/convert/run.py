"""A training run of ours, read as one more checkpoint.

A run is a folder, perhaps on a bucket:

  config.json      the configuration it was started with
  tokenizer.model  where the run trained its own
  checkpoints/N/   after N steps, one Orbax checkpoint of everything

Each checkpoint has `sums.json`, the size and CRC-32 of its files, which are
checked before it is read: Orbax reads some damaged files without a word.
"""

from collections.abc import Mapping
import functools
import os
import pathlib
from typing import Any

from etils import epath
import jax
import numpy as np

from gemma_funnel import buckets, cli, inputs, paths
from gemma_funnel import lora as lora_lib
from gemma_funnel.checks import require
from gemma_funnel.convert import param_mapping, sums
from gemma_funnel.convert.orbax_tree import OrbaxTree
from gemma_funnel.convert.sums import SUMS
from gemma_funnel.convert.tensor_io import (
  Header,
  Index,
  peek_json,
  read_json,
  to_path,
)
from gemma_funnel.data.tokenizer import CONFIGS
from gemma_funnel.inputs import MAX_TOKENIZER
from gemma_funnel.parallel import processes

FOLDER = "checkpoints"
CONFIG = "config.json"
TOKENIZER = "tokenizer.model"
# A fine-tuned run has a copy of what it was given.
TOKENIZERS = (TOKENIZER, "tokenizer.json")
# In a checkpoint's progress: fingerprints of what the run depends on.
INPUTS = "inputs"

# Merged ones that are kept: as many as threads ask for.
_MATRICES = 8


def path_of(path: str | os.PathLike) -> epath.Path:
  """A folder here, made absolute, or on a bucket."""
  text = paths.check(path)
  return epath.Path(text if buckets.is_remote(text) else os.path.abspath(text))


def find_tokenizer(
  folder: pathlib.Path | epath.Path,
) -> pathlib.Path | epath.Path | None:
  """The tokenizer that a run was given; None if its folder has one.

  Raises:
    ValueError: the run's configuration does not say, or names it by where the
      run was started, which is not known.
  """
  config = read_json(folder / CONFIG)
  data = config.get("data", config)  # A fine-tuned run says it at the top.
  require(
    isinstance(data, dict) and "tokenizer" in data,
    f"{folder / CONFIG} is no configuration of a training run: expected a "
    "data.tokenizer",
  )
  given = data["tokenizer"]
  if not given or any((folder / name).is_file() for name in TOKENIZERS):
    return None
  require(
    isinstance(given, str)
    and (buckets.is_remote(given) or os.path.isabs(given)),
    f"{folder} has no tokenizer, and names it by where the run was started: "
    f"tokenizer={given!r}. Expected the file in that folder, as "
    f"{' or '.join(TOKENIZERS)}",
  )
  return to_path(given)


def steps_in(folder: epath.Path) -> list[int]:
  """The steps of a `checkpoints` folder, whatever state they are in."""
  # Orbax's own list leaves out what it finds incomplete, and tells no one.
  if not folder.exists():  # A bucket has no empty folders.
    return []
  names = [path.name for path in folder.iterdir()]
  return sorted(int(name) for name in names if name.isdecimal())


def find_intact(workdir: str | os.PathLike) -> tuple[int, list[int]]:
  """The newest step whose files are as they were written, and the newer ones.

  A line tells each of the newer ones. Process 0 looks, and all go by what it
  found.

  Raises:
    ValueError: there is none.
  """
  return processes.on_host0(lambda: _find_intact(path_of(workdir) / FOLDER))


def _find_intact(folder: epath.Path) -> tuple[int, list[int]]:
  damages = {}
  for step in reversed(steps_in(folder)):
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
    cli.tell(f"checkpoint {broken} is damaged ({damage}); using {step} instead")
  return step, list(damages)


def write_sums(folder: epath.Path) -> None:
  """Writes the sums of a checkpoint's files, all of which are complete."""
  sums.write(folder, _files_of(folder))


def _files_of(folder: epath.Path) -> list[epath.Path]:
  """Those that Orbax will not touch again."""
  items = sorted(child for child in folder.iterdir() if child.is_dir())
  return [file for item in items for file in sums.files_in(item)]


def _damage_of(folder: epath.Path) -> str | None:
  """What is wrong with a checkpoint's files; None if nothing is."""
  try:
    expected = read_json(folder / SUMS)
    found = sums.of(folder, _files_of(folder))
  except (OSError, ValueError) as error:
    return f"{SUMS}: {error}"
  return sums.difference(expected, found)


def fingerprints_of(progress: Mapping[str, Any]) -> dict[str, str]:
  """What a checkpoint's run depended on; {} in those of version 0.1."""
  found = progress.get(INPUTS, {})
  return found if isinstance(found, dict) else {}


def tokenizer_fingerprint(folder: epath.Path) -> dict[str, str]:
  """That of the tokenizer in a run's folder, by its name; {} has none."""
  paths = (folder / name for name in (*TOKENIZERS, *CONFIGS[:1]))
  # By content on a bucket too: a run may be copied.
  return {
    f"tokenizer:{p.name}": inputs.digest(inputs.read_bytes(p, MAX_TOKENIZER))
    for p in paths
    if p.is_file()
  }


class RunTensors:
  """What the newest intact step of a run has trained; a `TensorReader`.

  Attributes:
    step: that is read.
    config: of the run, at that step.
    lora: how its factors are used; None if it trained whole parameters.
    inputs: fingerprints of what it depended on; {} in those of version 0.1.
  """

  def __init__(self, workdir: str | os.PathLike):
    """Finds the step and reads headers.

    Raises:
      ValueError: all checkpoints are damaged.
    """
    self.step, _ = find_intact(workdir)
    self._folder = path_of(workdir) / FOLDER / str(self.step)
    self.config: dict[str, Any] = read_json(
      self._folder / "config" / "metadata"
    )
    self.inputs = fingerprints_of(
      peek_json(self._folder / "progress" / "metadata")
    )
    kept = {k: v for k, v in self.inputs.items() if k.startswith("tokenizer:")}
    if kept:
      found = tokenizer_fingerprint(path_of(workdir))
      inputs.require_unchanged(f"the run in {workdir}", kept, found)
    self.lora = lora_lib.of_run(self.config)
    tree = self.open_tree("lora" if self.lora else "params")
    self.where, self.tensors, self.read = tree.where, tree.tensors, tree.read

  def open_tree(self, name: str) -> OrbaxTree:
    """Another tree that was saved along with the parameters."""
    return OrbaxTree(self._folder / name)


class LoraTensors:
  """A run's factors merged into their base, a layer's matrix at a time.

  A `TensorReader` of our own names. Values have the dtype and, where the base
  was quantised, the coarseness that the run trained with.
  """

  def __init__(self, run: RunTensors, base: Any):
    """Takes an open `CheckpointReader` of what the run started from."""
    self.where = run.where
    self._run, self._base = run, base
    self._dtype = np.dtype(run.config["model"]["param_dtype"])
    own = param_mapping.own_parameters(base.config, ())
    self.tensors = {
      ".".join(path): Header(shape, self._dtype) for path, shape in own.items()
    }
    self.tensors |= {
      name: header
      for name, header in run.tensors.items()
      if name.startswith("funnel.")
    }
    # Slices of a matrix follow each other: it is merged once.
    self._matrix = functools.lru_cache(maxsize=_MATRICES)(self._merge)

  def read(self, name: str, index: Index = ()) -> np.ndarray:
    if name.startswith("funnel."):
      return self._run.read(name, index)
    path = tuple(name.split("."))
    if path[0] == "layers":
      layer, *rest = index
      return self._matrix(path, layer)[tuple(rest)]
    shape = self.tensors[name].shape
    ranges = [
      slice(*item.indices(n)) for item, n in zip(index, shape, strict=True)
    ]
    return self._base.read_slice(path, ranges, self._dtype)

  def _merge(self, path: param_mapping.Path, layer: int) -> np.ndarray:
    axes = param_mapping.axes_of(path)
    whole = self._base.read(path, layer, axes, {}, self._dtype)
    name = ".".join(path)
    factors = {
      key: self._run.read(f"{name}.{key}", (slice(layer, layer + 1),))
      for key in ("a", "b")
      if f"{name}.{key}" in self._run.tensors
    }
    merged = _merge_matrix(path, self._run.lora, whole[None], factors)
    return np.asarray(merged[0])


@functools.partial(jax.jit, static_argnums=(0, 1))
def _merge_matrix(path, lora, matrix, factors) -> jax.Array:
  def tree_of(value):
    return functools.reduce(lambda tree, key: {key: tree}, path[::-1], value)

  base = lora_lib.freeze(tree_of(matrix), lora)
  merged = lora_lib.merge(base, tree_of(factors) if factors else {}, lora)
  return functools.reduce(lambda tree, key: tree[key], path, merged)
