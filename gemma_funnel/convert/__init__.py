"""Checkpoints of others, and of ours: loading them, and each to every other.

The way of a value: files (`safetensors_file`, `torch_file`, `orbax_tree`) offer
tensors by name, and slices of them; a format (`huggingface`, `google`,
`gemma_pytorch`) says which of our parameters lie where in which tensor, as
`layout.Part`s; a `source.Source` reads any part of any of our parameters;
`load` puts it on devices, `transfer` writes it to the files of another format.
"""

import dataclasses
import os

from flax import nnx
import jax
import jax.numpy as jnp

from gemma_funnel.config import (
  Funnel,
  FunnelConfig,
  TransformerConfig,
  resolve_funnel,
)
from gemma_funnel.convert import discover
from gemma_funnel.convert.layout import Path
from gemma_funnel.convert.source import Source, open_checkpoint
from gemma_funnel.convert.transfer import convert as convert
from gemma_funnel.model import Transformer


@dataclasses.dataclass(frozen=True)
class Description:
  """What a checkpoint is, by its configuration alone.

  Attributes:
    config: of the model; its dtypes are those of a training run.
    stages: of the funnel it was trained with, resolved; () is none.
    tokenizer_path: where its tokenizer is, or would be.
    is_run: whether it is a training run of ours.
  """

  config: TransformerConfig
  stages: tuple[FunnelConfig, ...]
  tokenizer_path: str
  is_run: bool


def load(
  path: str | os.PathLike[str],
  funnel: Funnel = None,
  dtype: str = "float32",
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
      "float32", "bfloat16" or "float16".
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
  found = describe(path) if config is None else None
  if found and found.is_run:
    from gemma_funnel.training import checkpoint

    return checkpoint.load_model(path, funnel, dtype, mesh)
  # A funnel that does not fit is said before any weight is read.
  depth = (config or found.config).num_layers
  stages = resolve_funnel(funnel, depth)
  source = open_checkpoint(path, config)
  model = _assemble(source, dtype, mesh)
  return model if funnel is None else model.with_funnel(stages)


def describe(path: str | os.PathLike[str]) -> Description:
  """Says what `load` would load, without reading weights.

  Raises:
    ValueError: nothing that is known at `path`, or no configuration of ours.
  """
  weights = discover.find(path)
  config, stages = discover.read_config(weights)
  files = discover.find_companions(weights)
  tokenizers = (files[n] for n in discover.TOKENIZERS if n in files)
  usual = weights.folder / discover.TOKENIZERS[0]
  return Description(
    config, stages, str(next(tokenizers, usual)), weights.format == "run"
  )


def _assemble(
  source: Source, dtype: str, mesh: jax.sharding.Mesh | None
) -> Transformer:
  """A model of the source's own funnel, with its values."""
  from gemma_funnel import cli  # With absl, which `import` alone needs not.

  config = dataclasses.replace(source.config, param_dtype=dtype, dtype=dtype)
  graphdef, state = nnx.split(Transformer.abstract(config, source.stages))
  params = dict(nnx.to_flat_state(state))
  total = sum(p.size * p.dtype.itemsize for p in params.values())
  with cli.Progress("loading", total) as progress:
    for path, param in params.items():
      names = tuple(map(str, path))
      sharding = _sharding_of(names, param.shape, mesh)
      value = _place(source, names, param.shape, param.dtype, sharding)
      progress.add(".".join(names), value.nbytes)
      params[path] = param.replace(value)
  return nnx.merge(graphdef, nnx.from_flat_state(params))


def _sharding_of(path: Path, shape, mesh) -> jax.sharding.Sharding:
  if mesh is None:
    return jax.sharding.SingleDeviceSharding(jnp.zeros(()).device)
  from gemma_funnel.parallel import sharding

  spec = sharding.spec_of("/".join(path), shape, mesh)
  return jax.sharding.NamedSharding(mesh, spec)


def _place(
  source: Source, path: Path, shape, dtype, sharding: jax.sharding.Sharding
) -> jax.Array:
  """One parameter; a shard is read once, when it is its turn."""
  holders: dict[tuple, list[jax.Device]] = {}
  for device, index in sharding.addressable_devices_indices_map(shape).items():
    ranges = tuple(
      part.indices(size)[:2] for part, size in zip(index, shape, strict=True)
    )
    holders.setdefault(ranges, []).append(device)
  shards = []
  for ranges, devices in holders.items():
    values = source.read_slice(path, [slice(*r) for r in ranges], dtype)
    shards += [jax.device_put(values, device) for device in devices]
  return jax.make_array_from_single_device_arrays(shape, sharding, shards)
