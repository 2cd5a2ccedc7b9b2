"""Where arrays live: a mesh, and the shardings of parameters and batches."""

from collections.abc import Mapping, Sequence
import functools
import math
import re

import jax
from jax.experimental import mesh_utils
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import ml_collections
import numpy as np

from gemma_funnel import params
from gemma_funnel.checks import require, require_int
from gemma_funnel.parallel.mesh import AXES, HEADS, ROWS, TOKENS

# Of rows of tokens, and all else that a batch has for each token.
BATCH = P(ROWS, TOKENS)
# Arrays of an optimizer's state that are of no parameter.
_WHOLE = re.compile(r"(^|/)ns_coeffs$")


def default_config() -> ml_collections.ConfigDict:
  """One device an axis, and "data" of as many as are left."""
  return ml_collections.ConfigDict({**dict.fromkeys(AXES, 1), "data": -1})


def make_mesh(
  config: ml_collections.ConfigDict, devices: Sequence[jax.Device] | None = None
) -> jax.sharding.Mesh:
  """A mesh with the axes `mesh.AXES`, of all devices if none are given.

  Neighbours along an axis are neighbours in the network of a slice as far as
  jax knows it; only "slice" crosses from one slice of TPUs to another.

  Args:
    config: the size of each axis, 1 where it has none; one of them may be -1,
      for what is left.

  Raises:
    ValueError: the sizes do not make up the number of devices, or an axis
      would cross slices.
  """
  devices = jax.devices() if devices is None else devices
  require(
    set(config) <= set(AXES),
    f"mesh has the axes {list(config)}: expected {list(AXES)}",
  )
  sizes = {axis: config.get(axis, 1) for axis in AXES}
  for axis, size in sizes.items():
    require_int(f"mesh.{axis}", size, -1)
  free = [axis for axis, size in sizes.items() if size == -1]
  known = math.prod(size for size in sizes.values() if size != -1)
  require(
    all(size >= 1 or size == -1 for size in sizes.values()) and len(free) <= 1,
    f"mesh {sizes}: expected sizes >= 1, and -1 for one axis at most",
  )
  if free and len(devices) % known == 0:
    sizes[free[0]] = len(devices) // known
  require(
    math.prod(sizes.values()) == len(devices),
    f"{_flags(sizes)} does not divide {len(devices)} devices: expected axes "
    f"whose product is {len(devices)}, such as "
    + _flags(_fitting(sizes, len(devices))),
  )
  slices = len({getattr(d, "slice_index", 0) for d in devices})
  require(
    slices == 1 or sizes["slice"] == slices,
    f"mesh.slice={sizes['slice']}: the {len(devices)} devices are of "
    f"{slices} slices; expected slice={slices}",
  )
  if slices > 1:
    within = (1, *list(sizes.values())[1:])
    across = (slices, *[1] * (len(AXES) - 1))
    grid = mesh_utils.create_hybrid_device_mesh(within, across, devices)
  else:
    grid = mesh_utils.create_device_mesh(
      tuple(sizes.values()), devices, allow_split_physical_axes=True
    )
  types = (jax.sharding.AxisType.Auto,) * len(AXES)
  return jax.sharding.Mesh(grid, AXES, types)


def _flags(sizes: Mapping[str, int]) -> str:
  given = [f"mesh.{axis}={n}" for axis, n in sizes.items() if n not in (1, -1)]
  return " ".join(given) or "mesh.data=1"


def _fitting(sizes: Mapping[str, int], devices: int) -> dict[str, int]:
  """What divides the devices of each axis, and what is left as "data"."""
  left, fitting = devices, {}
  for axis, size in sizes.items():
    fitting[axis] = 1 if size == -1 else math.gcd(size, left)
    left //= fitting[axis]
  return fitting | {"data": fitting["data"] * left}


def describe(mesh: jax.sharding.Mesh) -> str:
  """Such as "8 devices (data 4, tensor 2)"."""
  axes = [f"{axis} {size}" for axis, size in mesh.shape.items() if size > 1]
  return f"{mesh.size} devices ({', '.join(axes)})" if axes else "1 device"


def check_host_memory(mesh: jax.sharding.Mesh) -> None:
  """Raises ValueError unless devices can keep arrays in their host's memory."""
  device = mesh.devices.flat[0]
  kinds = [memory.kind for memory in device.addressable_memories()]
  require(
    "pinned_host" in kinds,
    f"model.remat='offload': {device.platform} has the memories {kinds}; "
    "expected pinned_host. Choose 'dots' or 'block'",
  )


def parts(spec: P, mesh: jax.sharding.Mesh) -> list[int]:
  """How many parts each dimension of a spec is split into."""
  axes = ((a,) if isinstance(a, str) else a or () for a in spec)
  return [math.prod(mesh.shape[axis] for axis in group) for group in axes]


def spec_of(path: str, shape: tuple[int, ...], mesh: jax.sharding.Mesh) -> P:
  """The spec of the parameter at `path`, or of a moment of it.

  Key and value heads fewer than the "tensor" axis are kept whole (MQA), and so
  is a dimension of size 1, such as that of a mean over it (Adafactor's).

  Raises:
    ValueError: no such parameter, or a dimension that the mesh does not divide.
  """
  if not shape or _WHOLE.search(path):
    return P(*[None] * len(shape))
  row = params.row_of(path)
  if row is None:
    raise ValueError(f"no sharding rule for parameter {path!r}")
  axes = [
    None if n == 1 or (letter == "K" and n % mesh.shape[HEADS]) else axis
    for n, letter, axis in zip(
      shape, row.dims.split(), row.mesh_axes, strict=True
    )
  ]
  spec = P(*axes)
  for size, names, count in zip(shape, axes, parts(spec, mesh), strict=True):
    if size % count:
      names = (names,) if isinstance(names, str) else names
      along = [f"{a}={mesh.shape[a]}" for a in names if mesh.shape[a] > 1]
      raise ValueError(
        f"mesh axis {' x '.join(along)} does not divide {size}, a dimension of "
        f"{path} {shape}"
      )
  return spec


def shardings_of(tree, mesh: jax.sharding.Mesh | None):
  """Shardings for a tree of parameters, or of an optimizer's state.

  Without a mesh it is the default device. Raises what `spec_of` does.
  """

  def of(path, leaf):
    if mesh is None:
      return jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return NamedSharding(mesh, spec_of(params.path_of(path), leaf.shape, mesh))

  return jax.tree_util.tree_map_with_path(of, tree)


def place(tree, mesh: jax.sharding.Mesh | None):
  """A tree of shapes, with the shardings of `shardings_of`."""
  return with_shardings(tree, shardings_of(tree, mesh))


def with_shardings(tree, shardings):
  """A tree of arrays or shapes as ShapeDtypeStructs with their shardings."""
  give = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)
  return jax.tree.map(give, tree, shardings)


def cache_sharding(
  mesh: jax.sharding.Mesh, rows: int, kv_heads: int
) -> NamedSharding:
  """Of cached keys and values [rows, kv_heads, slots, width], as in training.

  Rows or heads that the mesh does not divide are kept whole.
  """
  by_row, by_head = parts(P(ROWS, HEADS), mesh)
  heads = None if kv_heads % by_head else HEADS
  return NamedSharding(mesh, P(None if rows % by_row else ROWS, heads))


@functools.lru_cache(maxsize=8)
def row_share(mesh: jax.sharding.Mesh) -> tuple[int, int]:
  """(index, count): this process's of the equal parts of a batch.

  Processes whose devices differ in other axes alone have the same rows.

  Raises:
    ValueError: the mesh gives processes overlapping parts of the rows.
  """
  count = parts(BATCH, mesh)[0]
  rows = NamedSharding(mesh, P(ROWS)).devices_indices_map((count,))
  shares: dict[int, set[int]] = {}
  for device, (part,) in rows.items():
    start = part.start or 0
    shares.setdefault(device.process_index, set()).add(start)
  different = sorted({tuple(sorted(share)) for share in shares.values()})
  require(
    sum(map(len, different)) == count and len({*map(len, different)}) == 1,
    f"mesh {dict(mesh.shape)} gives the {len(shares)} processes rows that "
    "overlap: expected the axes that split rows "
    f"({', '.join(ROWS)}), or the others, to make up whole processes",
  )
  own = tuple(sorted(shares[jax.process_index()]))
  return different.index(own), len(different)


def put_batch(
  batch: dict[str, np.ndarray], mesh: jax.sharding.Mesh
) -> dict[str, jax.Array]:
  """The global batch on a mesh, of each process's share of the rows.

  Arrays are [rows, ..] of `row_share(mesh)`; [rows, T, ..] are split over
  tokens too.
  """
  index, count = row_share(mesh)

  def put(x: np.ndarray) -> jax.Array:
    shape = (len(x) * count, *x.shape[1:])
    sharding = NamedSharding(mesh, P(*BATCH[: x.ndim]))
    first = index * len(x)

    def part(at):
      start, stop, _ = at[0].indices(shape[0])
      return x[(slice(start - first, stop - first), *at[1:])]

    return jax.make_array_from_callback(shape, sharding, part)

  return jax.tree.map(put, batch)
