"""Where things live: a mesh, and a table of (parameter path, spec) rules."""

from collections.abc import Sequence
import math
import re

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import ml_collections
import numpy as np

from gemma_funnel.training.optimizer import path_of

AXES = ("data", "fsdp", "tensor")

# Rows of a batch are split over both axes that hold no part of a layer.
BATCH = P(("data", "fsdp"))

# The first rule whose pattern is found in a path applies, to the parameter and
# to the optimizer's moments of it. Heads, the MLP's width and the vocabulary
# are split over "tensor"; the model width over "fsdp". The leading axis of
# layers is the depth; what a funnel learns has none.
RULES: tuple[tuple[str, P], ...] = (
  (r"funnel/\d+/attend/attn/(query|key|value)$", P("fsdp", "tensor", None)),
  (r"funnel/\d+/attend/attn/out$", P("tensor", None, "fsdp")),
  (r"funnel/\d+/(pool_query|gate)$", P()),
  (r"embedding$", P("tensor", "fsdp")),
  (r"attn/(query|key|value)$", P(None, "fsdp", "tensor", None)),
  (r"attn/out$", P(None, "tensor", None, "fsdp")),
  (r"mlp/(gate|up)$", P(None, "fsdp", "tensor")),
  (r"mlp/down$", P(None, "tensor", "fsdp")),
  (r"scale$", P()),
  # What is trained on top of a model is small.
  (r"head/\w+$", P()),
  (r"(count|step|value|waited)$", P()),
)


def make_mesh(
  config: ml_collections.ConfigDict,
  devices: Sequence[jax.Device] | None = None,
) -> jax.sharding.Mesh:
  """A mesh with the axes "data", "fsdp" and "tensor".

  Args:
    config: the size of each axis; one of them may be -1, for what is left.
    devices: what it is made of; None is all there are.

  Raises:
    ValueError: the sizes do not make up the number of devices.
  """
  devices = jax.devices() if devices is None else devices
  sizes = {axis: config[axis] for axis in AXES}
  free = [axis for axis, size in sizes.items() if size == -1]
  known = math.prod(size for size in sizes.values() if size != -1)
  if any(size < 1 and size != -1 for size in sizes.values()) or len(free) > 1:
    raise ValueError(
      f"mesh {sizes}: expected sizes >= 1, and -1 for one axis at most"
    )
  if free and len(devices) % known == 0:
    sizes[free[0]] = len(devices) // known
  if math.prod(sizes.values()) != len(devices):
    raise ValueError(f"mesh {sizes} does not divide {len(devices)} devices")
  return jax.make_mesh(
    tuple(sizes.values()),
    AXES,
    (jax.sharding.AxisType.Auto,) * len(AXES),
    devices=devices,
  )


def spec_of(path: str, shape: tuple[int, ...], mesh: jax.sharding.Mesh) -> P:
  """The spec of the parameter (or moment) at `path`.

  Key and value heads fewer than the "tensor" axis are kept whole (MQA).

  Raises:
    ValueError: no rule, or a dimension that the mesh does not divide.
  """
  spec = next((spec for rule, spec in RULES if re.search(rule, path)), None)
  if spec is None:
    raise ValueError(f"no sharding rule for parameter {path!r}")
  spec = P(*spec, *[None] * (len(shape) - len(spec)))
  if re.search(r"attn/(key|value)$", path) and shape[-2] % mesh.shape["tensor"]:
    spec = P(*spec[:-2], None, None)
  for size, axis in zip(shape, spec, strict=True):
    if axis is not None and size % mesh.shape[axis]:
      raise ValueError(
        f"mesh axis {axis}={mesh.shape[axis]} does not divide {size}, a "
        f"dimension of {path} {shape}"
      )
  return spec


def shardings_of(tree, mesh: jax.sharding.Mesh):
  """NamedShardings for a tree of parameters, or of an optimizer's state.

  Raises:
    ValueError: see `spec_of`.
  """
  return jax.tree_util.tree_map_with_path(
    lambda path, leaf: NamedSharding(
      mesh, spec_of(path_of(path), leaf.shape, mesh)
    ),
    tree,
  )


def cache_sharding(
  mesh: jax.sharding.Mesh, rows: int, kv_heads: int
) -> NamedSharding:
  """Of keys and values [rows, kv_heads, slots, width] that are kept.

  Rows and heads lie as in training, where the mesh divides them.
  """
  whole = rows % (mesh.shape["data"] * mesh.shape["fsdp"])
  heads = kv_heads % mesh.shape["tensor"]
  return NamedSharding(
    mesh, P(None if whole else BATCH[0], None if heads else "tensor")
  )


def put_batch(
  batch: dict[str, np.ndarray], mesh: jax.sharding.Mesh
) -> dict[str, jax.Array]:
  """Makes this process's rows its part of the global batch."""
  sharding = NamedSharding(mesh, BATCH)
  return {
    name: jax.make_array_from_process_local_data(sharding, rows)
    for name, rows in batch.items()
  }
