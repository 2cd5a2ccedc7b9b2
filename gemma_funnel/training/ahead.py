"""What a training step takes on devices that are not at hand.

The real step is compiled ahead of time for a described slice of TPUs; the
compiler says what memory it needs and what is sent, `flops` what has to be
computed, and `hardware` what a chip can do at best.
"""

from collections.abc import Iterator, Sequence
import dataclasses
import math
import os
import re
import time

import jax
import jax.numpy as jnp
import ml_collections

from gemma_funnel import flops
from gemma_funnel.hardware import Chip, chip_of
from gemma_funnel.mesh import AXES
from gemma_funnel.training import collectives, pretrain, sharding, start
from gemma_funnel.training import step as step_lib

# XLA keeps some of a chip's memory for itself and for programs.
_USABLE = 0.95
# What the backward pass computes once more, as a share of a forward pass of
# the layers.
_RECOMPUTED = {"none": 0.0, "dots": 0.1, "offload": 0.1, "block": 1.0}


@dataclasses.dataclass(frozen=True)
class Plan:
  """A step on a mesh; bytes are a chip's, seconds a step's.

  Attributes:
    mesh: sizes of its axes.
    remat: what the backward pass recomputes.
    accumulate: parts of the batch, one after the other.
    parameters, optimizer: that are kept.
    activations: kept from the forward pass for the backward pass, about.
    temporaries: all else that the program needs at its peak.
    memory: of a chip.
    model_flops: of a step on all chips (`flops.train_step`).
    sent: by each chip, by axes of the mesh.
    compute_s, send_s, memory_s: least times of a step.
    compile_s: what compiling took here.
    error: why it does not compile; None if it does.
  """

  mesh: dict[str, int]
  remat: str
  accumulate: int
  parameters: float
  optimizer: float
  activations: float = math.nan
  temporaries: float = math.nan
  memory: int = 0
  model_flops: float = math.nan
  sent: dict[str, float] = dataclasses.field(default_factory=dict)
  compute_s: float = math.nan
  send_s: float = math.nan
  memory_s: float = math.nan
  model_s: float = math.nan
  compile_s: float = math.nan
  error: str | None = None

  @property
  def total(self) -> float:
    """Bytes of a chip at the peak."""
    kinds = (self.parameters, self.optimizer, self.activations)
    return sum(kinds) + self.temporaries

  @property
  def fits(self) -> bool:
    return self.error is None and self.total <= _USABLE * self.memory

  @property
  def step_s(self) -> float:
    """The roofline: all that overlaps perfectly."""
    return max(self.compute_s, self.send_s, self.memory_s)

  @property
  def mfu_bound(self) -> float:
    """Model FLOPs utilisation at the roofline."""
    return self.model_s / self.step_s


def slice_devices(topology: str, slices: int = 1) -> list[jax.Device]:
  """Devices of slices that are not there, to compile for.

  Args:
    topology: such as "v5p:4x4x4" or "v5e:4x4".
    slices: how many of them.

  Raises:
    ValueError: no such topology, or no libtpu.
  """
  from jax.experimental import topologies

  if not re.fullmatch(r"v\d+\w?:\d+(x\d+)*", topology):
    raise ValueError(
      f"topology {topology!r}: expected such as v5p:4x4x4, v5e:4x4 or v6e:8x8"
    )
  # Which lets one process at a time have chips: here none is had.
  os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
  more = {"num_slices": slices} if slices > 1 else {}
  try:
    found = topologies.get_topology_desc(
      platform="tpu", topology_name=topology, **more
    )
  except Exception as error:  # libtpu's own kinds.
    first_line = str(error).strip().splitlines()[0] if str(error) else ""
    raise ValueError(
      f"topology {topology!r} cannot be described: {first_line}. It needs the "
      "extra: pip install 'gemma-funnel[tpu]'"
    ) from error
  return list(found.devices)


def _bytes_of(tree) -> float:
  """Bytes of a device's own part of a tree of placed shapes."""
  return float(
    sum(
      math.prod(x.sharding.shard_shape(x.shape)) * jnp.dtype(x.dtype).itemsize
      for x in jax.tree.leaves(tree)
    )
  )


def plan(
  config: ml_collections.ConfigDict, devices: Sequence[jax.Device]
) -> Plan:
  """Compiles the step of a configuration for devices, and reads what it takes.

  Raises:
    ValueError: a mistake in the configuration.
  """
  setup = pretrain.make_setup(config, devices)
  _, abstract = start.make_init(setup)
  known = dict(
    mesh=dict(setup.mesh.shape),
    remat=setup.model_config.remat,
    accumulate=setup.config.accumulate,
    parameters=_bytes_of(abstract[0]),
    optimizer=_bytes_of(abstract[1]),
  )
  began = time.monotonic()
  try:
    compiled, residuals = _compile(setup, abstract)
  except (
    Exception
  ) as error:  # The compiler's; all that matters is what it says.
    return Plan(**known, error=_first_line(error), **_bounds(setup, {}))
  memory = compiled.memory_analysis()
  needed = memory.temp_size_in_bytes
  activations = min(residuals, needed)
  sent = collectives.bytes_by_axis(
    collectives.collectives(compiled.as_text(), setup.mesh)
  )
  return Plan(
    **known,
    activations=activations,
    temporaries=needed - activations + memory.generated_code_size_in_bytes,
    compile_s=time.monotonic() - began,
    **_bounds(setup, sent),
  )


def _first_line(error: Exception) -> str:
  lines = [line.strip() for line in str(error).splitlines() if line.strip()]
  used = [line for line in lines if "xceeded" in line or "Ran out" in line]
  return (used or lines or [type(error).__name__])[0][:300]


def _compile(setup: pretrain.Setup, abstract):
  """(the compiled step, bytes a chip keeps for the backward pass)."""
  config, mesh = setup.config, setup.mesh
  loss = pretrain.make_loss(setup)
  shape = (config.batch_size, config.length)
  placed = jax.sharding.NamedSharding(mesh, sharding.BATCH)
  ints = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=placed)
  batch = dict.fromkeys(("tokens", "segment", "position"), ints)
  key = jax.eval_shape(lambda: jax.random.key(0))
  with jax.set_mesh(mesh):
    step = step_lib.make_train_step(
      loss, setup.optimizer, abstract, mesh, config
    )
    args = (setup.stages, *abstract, start.frozen_shapes(setup), batch, key)
    compiled = step.lower(*args).compile()
    return compiled, _residuals(setup, loss, abstract[0], batch, key)


def _residuals(setup: pretrain.Setup, loss, weights, batch, key) -> float:
  """Bytes a chip keeps of a forward pass, but for the weights themselves."""

  def forward(weights, batch):
    of_weights = lambda w: loss(
      setup.stages, w, start.frozen_shapes(setup), batch, key
    )
    return jax.vjp(of_weights, weights, has_aux=True)[1]

  try:
    kept = jax.eval_shape(forward, weights, batch)
  except Exception:  # An estimate; the sum that matters is the compiler's.
    return 0.0
  own = {(x.shape, x.dtype) for x in jax.tree.leaves(weights)}
  size = sum(
    x.size * x.dtype.itemsize
    for x in jax.tree.leaves(kept)
    if (x.shape, x.dtype) not in own
  )
  ways = math.prod(sharding.parts(sharding.BATCH, setup.mesh))
  return size / ways / setup.config.accumulate


def _bounds(setup: pretrain.Setup, sent: dict[str, float]) -> dict[str, object]:
  """FLOPs, bytes, and the least times that they take."""
  config, mesh = setup.config, setup.mesh
  chip = chip_of(mesh.devices.flat[0])
  if chip is None:
    raise ValueError(
      f"the peaks of {mesh.devices.flat[0].device_kind!r} are not known"
    )
  model_flops = pretrain.step_flops(setup, setup.stages)
  layers = flops.forward(
    setup.model_config, setup.stages, config.batch_size, config.length,
    head=False, causal=setup.causal,
  )  # fmt: skip
  again = _RECOMPUTED[setup.model_config.remat] * layers
  peak = chip.flops * mesh.size
  return dict(
    memory=chip.memory,
    model_flops=float(model_flops),
    sent=sent,
    compute_s=(model_flops + again) / peak,
    model_s=model_flops / peak,
    send_s=sum(sent.values()) / chip.link,
    memory_s=_weight_traffic(setup) / chip.bandwidth,
  )


def _weight_traffic(setup: pretrain.Setup) -> float:
  """Least bytes a chip moves for weights: read in both passes, and updated."""
  size = jnp.dtype(setup.model_config.dtype).itemsize
  count = flops.parameters(setup.model_config, setup.stages).total
  gathered = count / setup.mesh.shape["tensor"]
  own = count / math.prod(
    setup.mesh.shape[axis] for axis in ("fsdp", "sequence", "tensor")
  )
  return 2 * size * gathered * setup.config.accumulate + 6 * 4 * own


def candidates(
  config: ml_collections.ConfigDict, count: int
) -> Iterator[dict[str, int]]:
  """Meshes of `count` devices that a configuration may run on.

  Powers of two on "data", "fsdp", "sequence" and "tensor".
  """
  slices = config.mesh.slice
  free = count // slices
  powers = [2**i for i in range(free.bit_length())]
  for tensor in powers:
    for sequence in powers:
      for fsdp in powers:
        data, rest = divmod(free, tensor * sequence * fsdp)
        if not data or rest:
          continue
        yield dict(
          zip(AXES, (slices, data, fsdp, sequence, tensor), strict=True)
        )


def search(
  config: ml_collections.ConfigDict,
  devices: Sequence[jax.Device],
  remats: Sequence[str] = ("none", "dots", "block"),
  most: int = 6,
) -> Iterator[Plan]:
  """Compiles the meshes, remats and accumulations that promise the fastest steps.

  What fits by a guess of its memory is ordered by a guess of what it sends and
  computes; the first ones are compiled, and the search ends early when one fits
  that no other is guessed to be faster than.

  Args:
    config: the rest of it.
    devices: to run on.
    remats: to choose from.
    most: compilations.
  """
  guessed, chip = [], chip_of(devices[0])
  for sizes in candidates(config, len(devices)):
    tried = config.copy_and_resolve_references()
    tried.mesh.update(sizes)
    while True:
      try:
        setup = pretrain.make_setup(tried, devices)
        _, abstract = start.make_init(setup)
      except ValueError:
        break  # It does not divide something.
      kept = _bytes_of(abstract) + (tried.accumulate > 1) * _bytes_of(
        abstract[0]
      )
      for remat in remats:
        memory = kept + _guess_activations(setup, remat)
        if memory <= _USABLE * chip.memory:
          changed = tried.copy_and_resolve_references()
          changed.model.remat = remat
          guessed.append((_guess(setup, remat, chip), changed))
      tried.accumulate *= 2
  guessed.sort(key=lambda pair: pair[0])
  best = math.inf
  for guess, changed in guessed[:most]:
    if guess > best:
      return
    found = plan(changed, devices)
    if found.fits:
      best = min(best, found.step_s)
    yield found


def _tokens(setup: pretrain.Setup) -> float:
  """Of a part of the batch, those of a chip."""
  config, ways = setup.config, sharding.parts(sharding.BATCH, setup.mesh)
  return config.batch_size * config.length / math.prod(ways) / config.accumulate


def _guess_activations(setup: pretrain.Setup, remat: str) -> float:
  """Bytes of a chip for the activations of a part of the batch."""
  config, model = setup.config, setup.model_config
  size, tensor = jnp.dtype(model.dtype).itemsize, setup.mesh.shape["tensor"]
  heads = (2 * model.num_heads + 2 * model.num_kv_heads) * model.head_dim
  inner = (heads + 3 * model.mlp_dim) / tensor
  # Of a token in a layer: its products, and with them norms and gates.
  dots, whole = 3 * model.embed_dim + inner, 8 * model.embed_dim + 2 * inner
  kept = {"none": whole, "dots": dots, "offload": 0, "block": model.embed_dim}
  count = lambda stages: flops.forward(
    model, stages, 1, config.length, head=False, causal=setup.causal
  )
  layers = model.num_layers * count(setup.stages) / count(())
  logits = 3 * 4 * model.vocab_size / tensor
  logits *= min(config.loss_chunk / config.length, 1)
  return _tokens(setup) * (size * (layers * kept[remat] + 2 * whole) + logits)


def _guess(setup: pretrain.Setup, remat: str, chip: Chip) -> float:
  """Seconds of a step, from sizes alone."""
  config, model, shape = setup.config, setup.model_config, setup.mesh.shape
  layers = flops.forward(
    model, setup.stages, config.batch_size, config.length, head=False
  )
  compute = pretrain.step_flops(setup, setup.stages)
  compute = (compute + _RECOMPUTED[remat] * layers) / chip.flops
  compute /= setup.mesh.size
  size = jnp.dtype(model.dtype).itemsize
  count = flops.parameters(model, setup.stages).total
  passes = 3 if remat == "block" else 2
  times, sent = config.accumulate, 0.0
  if (width := shape["fsdp"] * shape["sequence"]) > 1:
    # Gathered in each pass, and gradients scattered.
    part = (passes * size + 4) * count / shape["tensor"] * (1 - 1 / width)
    sent += times * part
  if (copies := shape["data"] * shape["slice"]) > 1:
    part = 8 * count / (width * shape["tensor"]) * (1 - 1 / copies)
    sent += times * part
  tokens = times * _tokens(setup)
  if shape["tensor"] > 1:
    # Two sums of activations a layer, forward and backward.
    sent += (
      2 * 2 * passes * model.num_layers * tokens * model.embed_dim * size
      * (1 - 1 / shape["tensor"])
    )  # fmt: skip
  if shape["sequence"] > 1:
    keys = 2 * model.num_kv_heads * model.head_dim * size
    keys *= tokens * shape["sequence"]
    sent += passes * model.num_layers * keys * (1 - 1 / shape["sequence"])
  return max(compute, sent / chip.link)


def as_row(found: Plan) -> dict[str, object]:
  """What a table shows of a plan; bytes in GiB."""
  gib = lambda x: x / 2**30
  axes = [f"{axis} {n}" for axis, n in found.mesh.items() if n > 1]
  return {
    "mesh": ", ".join(axes) or "1 device",
    "remat": found.remat,
    "accumulate": found.accumulate,
    "fits": "yes" if found.fits else "no",
    "parameters": gib(found.parameters),
    "optimizer": gib(found.optimizer),
    "activations": gib(found.activations),
    "temporaries": gib(found.temporaries),
    "total": gib(found.total),
    "of": gib(found.memory),
    "flops": found.model_flops,
    "sent": {axes: gib(x) for axes, x in found.sent.items()},
    "compute_s": found.compute_s,
    "send_s": found.send_s,
    "memory_s": found.memory_s,
    "step_s": found.step_s,
    "mfu_bound": found.mfu_bound,
    "compile_s": found.compile_s,
    "error": found.error,
  }
