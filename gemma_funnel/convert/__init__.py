"""Checkpoints of others, and of ours: loading them, and each to every other.

The way of a value: files (`safetensors_file`, `torch_file`, `orbax_tree`) offer
tensors by name, and slices of them; a format (`huggingface`, `google`,
`gemma_pytorch`, a `run`) says which of our parameters lie where in which
tensor, as `ParamView`s; a `CheckpointReader` reads any slice of any of our
parameters; `load` puts it on devices, `conversion` writes it to the files of
another format.
"""

from collections.abc import Callable
import dataclasses
import os
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from gemma_funnel.config import (
  Funnel,
  FunnelConfig,
  TransformerConfig,
  resolve_funnel,
)
from gemma_funnel.convert import detect
from gemma_funnel.convert.conversion import convert as convert
from gemma_funnel.convert.reader import CheckpointReader, open_checkpoint
from gemma_funnel.convert.run import FOLDER, path_of
from gemma_funnel.model import Transformer
from gemma_funnel.parallel import sharding


@dataclasses.dataclass(frozen=True)
class Description:
  """What a checkpoint is, by its configuration alone.

  Attributes:
    config: of the model; its dtypes are those of a training run.
    stages: of the funnel it was trained with, resolved; () is none.
    tokenizer_path: where its tokenizer is, or would be.
    is_run: whether it is a training run of ours.
    stop_ids: that end a generated text; () is the tokenizer's EOS.
  """

  config: TransformerConfig
  stages: tuple[FunnelConfig, ...]
  tokenizer_path: str
  is_run: bool
  stop_ids: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Run:
  """A finished or interrupted training run, read back.

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


def load(
  path: str | os.PathLike[str],
  funnel: Funnel = None,
  dtype: str | None = "float32",
  *,
  mesh: jax.sharding.Mesh | None = None,
  config: TransformerConfig | None = None,
) -> Transformer:
  """Loads a checkpoint, whatever its format.

  Args:
    path: of a Hugging Face folder (safetensors or `.bin`); of a tree of
      Google's, in any of its layouts; of gemma_pytorch's `.ckpt` file or
      sharded `.bin` folder; of a checkpoint converted by `gemma_funnel.convert`;
      or of a training run of ours.
    funnel: the funnel to run it with. None is the one that the checkpoint was
      trained with, if it says any; "off" is none. What it learns and the
      checkpoint has not is made afresh, and a line says so.
    dtype: what parameters are stored in and matrices are multiplied in:
      "float32", "bfloat16" or "float16"; None is as the configuration says.
    mesh: of `parallel.sharding.make_mesh`. Parameters are placed by its rules,
      and each process reads only what its own devices hold. None is the
      default device.
    config: what to take the weights for, instead of the configuration beside
      them or the published model whose shapes they have. No run needs it.

  Returns:
    The model.

  Raises:
    ValueError: nothing that is known at `path`, or two formats at once; an
      unsupported configuration, or one that contradicts the weights; a funnel
      that does not fit the depth; or a checkpoint that is damaged, has values
      that are not finite, or whose tensors are missing, unexpected or
      mis-shaped: all are named.
  """
  return _open_and_load(path, funnel, dtype, mesh, config)[0]


def load_run(
  path: str | os.PathLike[str],
  funnel: Funnel = None,
  dtype: str | None = None,
  mesh: jax.sharding.Mesh | None = None,
  extra: Callable[[TransformerConfig], dict[str, Any]] = lambda config: {},
) -> Run:
  """Reads the newest readable checkpoint of a training run.

  Args:
    path: the run's folder (its workdir).
    funnel: see `load`.
    dtype: of parameters and compute; None is as trained.
    mesh: see `load`.
    extra: shapes of further trees to read, by their names in the checkpoint.

  Raises:
    ValueError: no readable checkpoint there, or a funnel that does not fit.
  """
  if not (path_of(path) / FOLDER).is_dir():
    raise ValueError(f"{path} is no run: it has no folder {FOLDER}/")
  model, reader = _open_and_load(path, funnel, dtype, mesh)
  trees = _placed(extra(model.config), mesh)
  return Run(
    model=model,
    config=ml_collections.ConfigDict(reader.run.config),
    tokenizer_path=describe(path).tokenizer_path,
    step=reader.run.step,
    extra={
      name: _load_tree(reader.run.open_tree(name), shapes)
      for name, shapes in trees.items()
    },
  )


def describe(path: str | os.PathLike[str]) -> Description:
  """Says what `load` would load, without reading weights.

  Raises:
    ValueError: nothing that is known at `path`, or no configuration of ours.
  """
  weights = detect.find(path)
  config, stages = detect.read_config(weights)
  found = detect.tokenizer_of(detect.find_companions(weights))
  return Description(
    config,
    stages,
    os.fspath(found or weights.file or weights.folder / detect.TOKENIZERS[0]),
    weights.format == "run",
    detect.stop_ids(weights, config.vocab_size),
  )


def _open_and_load(
  path, funnel, dtype, mesh, config=None
) -> tuple[Transformer, CheckpointReader]:
  # A funnel or a dtype that does not fit is said before any weight is read.
  wanted = config or describe(path).config
  stages = resolve_funnel(funnel, wanted.num_layers)
  dtypes = {} if dtype is None else {"param_dtype": dtype, "dtype": dtype}
  wanted = dataclasses.replace(wanted, **dtypes)
  reader = open_checkpoint(path, config, learned=funnel is None)
  graphdef, state = nnx.split(Transformer.abstract(wanted, reader.stages))
  shapes = _placed(nnx.to_pure_dict(state), mesh)

  def read(path, index, dtype):
    return reader.read_slice(path, index, dtype)

  model = nnx.merge(graphdef, _read_tree(read, shapes))
  return (model if funnel is None else model.with_funnel(stages)), reader


def _placed(shapes, mesh: jax.sharding.Mesh | None):
  """A tree of shapes with shardings."""
  if mesh is not None:
    return sharding.place(shapes, mesh)
  # The default device of this process, not the first one of all.
  here = jax.sharding.SingleDeviceSharding(jnp.zeros(()).device)
  return sharding.with_shardings(shapes, jax.tree.map(lambda _: here, shapes))


def _load_tree(tensors, shapes):
  """A tree that was saved along with a run's parameters."""

  def read(path, index, dtype):
    return tensors.read(".".join(path), tuple(index)).astype(dtype)

  for path, leaf in nnx.to_flat_state(nnx.State(shapes)):
    name = ".".join(map(str, path))
    found = tensors.tensors.get(name)
    if found is None or found.shape != leaf.shape:
      raise ValueError(f"{tensors.where}: {name}: expected {leaf.shape}")
  return _read_tree(read, shapes)


def _read_tree(read: Callable[..., np.ndarray], shapes):
  """Reads a tree of ShapeDtypeStructs with shardings, a shard at a time."""
  from gemma_funnel import cli  # With absl, which `import` alone needs not.

  total = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(shapes))
  with cli.Progress("loading", total) as progress:

    def load(path, leaf):
      names = tuple(str(getattr(k, "key", getattr(k, "idx", k))) for k in path)
      value = _place(lambda index: read(names, index, leaf.dtype), leaf)
      progress.add(".".join(names), value.nbytes)
      return value

    return jax.tree_util.tree_map_with_path(load, shapes)


def _place(read: Callable[[list[slice]], np.ndarray], leaf) -> jax.Array:
  """One array; what several devices hold is read once."""
  holders: dict[tuple, list[jax.Device]] = {}
  places = leaf.sharding.addressable_devices_indices_map(leaf.shape)
  for device, index in places.items():
    ranges = tuple(
      item.indices(size)[:2]
      for item, size in zip(index, leaf.shape, strict=True)
    )
    holders.setdefault(ranges, []).append(device)
  shards = []
  for ranges, devices in holders.items():
    values = read([slice(*r) for r in ranges])
    shards += [jax.device_put(values, device) for device in devices]
  return jax.make_array_from_single_device_arrays(
    leaf.shape, leaf.sharding, shards
  )
