"""A training step compiled for TPUs that are not at hand: memory, bytes sent, time.

The compiler says what memory the step needs and what its chips send, `flops`
what has to be computed, and `hardware` what a chip can do at best.
"""

from collections.abc import Iterator, Sequence
import dataclasses
import functools
import itertools
import math
import os
import pathlib
import re
import tempfile
import time

import jax
import jax.numpy as jnp
import ml_collections

from gemma_funnel import flops
from gemma_funnel.parallel import sharding
from gemma_funnel.parallel.hardware import chip_of
from gemma_funnel.parallel.mesh import AXES, HEADS, ROWS, TOKENS
from gemma_funnel.training import collectives, init_state, pretrain
from gemma_funnel.training import step as step_lib
from gemma_funnel.training.spec import RunSpec

# XLA keeps some of a chip's memory for itself and for programs.
_USABLE = 0.95
# Share of the layers' forward pass that the backward pass computes again.
_RECOMPUTED = {"none": 0.0, "dots": 0.1, "offload": 0.1, "block": 1.0}
_GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Plan:
  """A step on a mesh; bytes are a chip's, seconds a step's least times."""

  mesh: dict[str, int]
  remat: str
  accumulate: int
  parameters: float  # Bytes, as the next four.
  optimizer: float
  activations: float = math.nan  # Kept for the backward pass, about.
  temporaries: float = math.nan  # All else, at the program's peak.
  memory: int = 0  # Of a chip.
  model_flops: float = math.nan  # On all chips (`flops.train_step`).
  sent: dict[str, float] = dataclasses.field(default_factory=dict)  # By axes.
  compute_s: float = math.nan
  send_s: float = math.nan
  memory_s: float = math.nan
  model_s: float = math.nan  # Of `model_flops`.
  compile_s: float = math.nan  # Compiling here.
  error: str | None = None  # Why it does not compile.

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
    """The roofline: all of it overlaps perfectly."""
    return max(self.compute_s, self.send_s, self.memory_s)

  @property
  def mfu_bound(self) -> float:
    """Model FLOPs utilisation at the roofline."""
    return self.model_s / self.step_s

  def as_row(self) -> dict[str, object]:
    """What a table shows; bytes in GiB."""
    axes = [f"{axis} {n}" for axis, n in self.mesh.items() if n > 1]
    kinds = ("parameters", "optimizer", "activations", "temporaries", "total")
    times = ("compute_s", "send_s", "memory_s", "step_s", "mfu_bound")
    return {
      "mesh": ", ".join(axes) or "1 device",
      "remat": self.remat,
      "accumulate": self.accumulate,
      "fits": "yes" if self.fits else "no",
      **{name: getattr(self, name) / _GIB for name in kinds},
      "of": self.memory / _GIB,
      "flops": self.model_flops,
      "sent": {axes: size / _GIB for axes, size in self.sent.items()},
      **{name: getattr(self, name) for name in times},
      "compile_s": self.compile_s,
      "error": self.error,
    }


def slice_devices(topology: str, slices: int = 1) -> list[jax.Device]:
  """Devices of slices that are not there, to compile for.

  Raises:
    ValueError: no such topology (as "v5p:4x4x4"), or no libtpu.
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
  spec = pretrain.resolve(config, devices)
  _, abstract = init_state.make_init(spec)
  known = dict(
    mesh=dict(spec.mesh.shape),
    remat=spec.model_config.remat,
    accumulate=spec.loop.accumulate,
    parameters=_bytes_of(abstract.params),
    optimizer=_bytes_of(abstract.opt_state),
  )
  began = time.monotonic()
  try:
    compiled, text, residuals = _compile(spec, abstract)
  except Exception as error:  # The compiler's own; it says what is wrong.
    return Plan(**known, error=_first_line(error), **_bounds(spec, {}))
  memory = compiled.memory_analysis()
  needed = memory.temp_size_in_bytes
  activations = min(residuals, needed)
  found = collectives.collectives(text, spec.mesh)
  sent = collectives.bytes_by_axis(found)
  return Plan(
    **known,
    activations=activations,
    temporaries=needed - activations + memory.generated_code_size_in_bytes,
    compile_s=time.monotonic() - began,
    **_bounds(spec, sent),
  )


def _first_line(error: Exception) -> str:
  lines = [line.strip() for line in str(error).splitlines() if line.strip()]
  used = [line for line in lines if "xceeded" in line or "Ran out" in line]
  return (used or lines or [type(error).__name__])[0][:300]


def _compile(spec: RunSpec, abstract):
  """(the compiled step, its text, bytes a chip keeps for the backward pass)."""
  mesh = spec.mesh
  loss = spec.task.make_loss(spec)
  shape = (spec.batch_size, spec.length)
  placed = jax.sharding.NamedSharding(mesh, sharding.BATCH)
  ints = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=placed)
  batch = dict.fromkeys(("tokens", "segment", "position"), ints)
  key = jax.eval_shape(lambda: jax.random.key(0))
  with jax.set_mesh(mesh):
    step = step_lib.make_train_step(spec, loss, abstract)
    args = (spec.stages, abstract, init_state.frozen_shapes(spec), batch, key)
    with tempfile.TemporaryDirectory() as folder:
      # As libtpu writes it itself: jaxlib cannot read all of its programs.
      compiled = step.lower(*args).compile({"xla_dump_to": folder})
      (text,) = pathlib.Path(folder).glob("*.after_optimizations.txt")
      text = text.read_text()
    return compiled, text, _residuals(spec, loss, abstract.params, batch, key)


def _residuals(spec: RunSpec, loss, weights, batch, key) -> float:
  """Bytes a chip keeps of a forward pass, but for the weights themselves."""

  def forward(weights, batch):
    of_weights = lambda w: loss(
      spec.stages, w, init_state.frozen_shapes(spec), batch, key
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
  ways = math.prod(sharding.parts(sharding.BATCH, spec.mesh))
  return size / ways / spec.loop.accumulate


def _bounds(spec: RunSpec, sent: dict[str, float]) -> dict[str, object]:
  """FLOPs, bytes, and the least times that they take."""
  mesh, work = spec.mesh, _Work(spec)
  peak = work.chip.flops * mesh.size
  # Weights are read in both passes, and updated.
  gathered = work.count / mesh.shape[HEADS]
  own = gathered / mesh.shape["fsdp"] / mesh.shape[TOKENS]
  traffic = 2 * work.itemsize * gathered * spec.loop.accumulate + 24 * own
  return dict(
    memory=work.chip.memory,
    model_flops=float(work.step),
    sent=sent,
    compute_s=work.flops(spec.model_config.remat) / peak,
    model_s=work.step / peak,
    send_s=sum(sent.values()) / work.chip.link,
    memory_s=traffic / work.chip.bandwidth,
  )


class _Work:
  """What a step has to do, by arithmetic alone, and guesses of what it takes."""

  def __init__(self, spec: RunSpec):
    device = spec.mesh.devices.flat[0]
    self.chip = chip_of(device)
    if self.chip is None:
      raise ValueError(f"the peaks of {device.device_kind!r} are not known")
    self.spec = spec
    self.model = spec.model_config
    self.itemsize = jnp.dtype(self.model.dtype).itemsize
    self.count = flops.parameters(self.model, spec.stages).total
    # FLOPs of a step, and of the layers' forward pass.
    self.step = spec.task.step_flops(spec, spec.stages)
    self.layers = self._forward(spec.stages)

  def _forward(self, stages) -> int:
    return flops.forward(
      self.model,
      stages,
      self.spec.batch_size,
      self.spec.length,
      head=False,
      causal=self.spec.task.causal,
    )

  def flops(self, remat: str) -> float:
    return self.step + _RECOMPUTED[remat] * self.layers

  @functools.cached_property
  def share(self) -> float:
    """Of the plain model's slots, those that the layers run on."""
    return self.layers / self._forward(())

  def activations(self, sizes, tokens: float, remat: str) -> float:
    """Bytes of a chip that has so many tokens at a time."""
    model, tensor = self.model, sizes[HEADS]
    heads = (2 * model.num_heads + 2 * model.num_kv_heads) * model.head_dim
    inner = (heads + 3 * model.mlp_dim) / tensor
    # Of a token in a layer: its products, and with them norms and gates.
    dots, whole = 3 * model.embed_dim + inner, 8 * model.embed_dim + 2 * inner
    kept = {"none": whole, "dots": dots, "offload": 0, "block": model.embed_dim}
    layers = model.num_layers * self.share
    logits = 3 * 4 * model.vocab_size / tensor
    logits *= min(self.spec.task.loss_chunk / self.spec.length, 1)
    return tokens * (
      self.itemsize * (layers * kept[remat] + 2 * whole) + logits
    )

  def seconds(self, sizes, tokens: float, parts: int, remat: str) -> float:
    """Of a step of `parts`, each of so many tokens a chip."""
    model, size = self.model, self.itemsize
    compute = self.flops(remat) / self.chip.flops / math.prod(sizes.values())
    head = model.vocab_size * model.embed_dim
    passes = 3 if remat == "block" else 2
    tensor, sequence, sent = sizes[HEADS], sizes[TOKENS], 0.0
    if (width := sizes["fsdp"] * sequence) > 1:
      # Gathered in each pass, and gradients scattered; the head's by chunk.
      chunks = math.ceil(self.spec.length / self.spec.task.loss_chunk)
      each = (passes * size + 4) * (self.count - head)
      each += (2 * size + 4) * head * chunks
      sent += parts * each / tensor * (1 - 1 / width)
    if (copies := sizes["data"] * sizes["slice"]) > 1:
      sent += parts * 8 * self.count / (width * tensor) * (1 - 1 / copies)
    by_layer = passes * model.num_layers * parts * tokens * size
    # Two sums of activations a layer, forward and backward.
    sent += 4 * by_layer * model.embed_dim * (1 - 1 / tensor)
    keys = 2 * model.num_kv_heads * model.head_dim * sequence
    sent += by_layer * keys * (1 - 1 / sequence)
    return compute + sent / self.chip.link


def candidates(
  config: ml_collections.ConfigDict, count: int
) -> Iterator[dict[str, int]]:
  """Meshes of `count` devices that a configuration may run on.

  Powers of two on "data", "fsdp", "sequence" and "tensor".
  """
  slices = config.mesh.slice
  free = count // slices
  powers = [2**i for i in range(free.bit_length())]
  for tensor, sequence, fsdp in itertools.product(powers, repeat=3):
    data, rest = divmod(free, tensor * sequence * fsdp)
    if data and not rest:
      sizes = (slices, data, fsdp, sequence, tensor)
      yield dict(zip(AXES, sizes, strict=True))


def search(
  config: ml_collections.ConfigDict,
  devices: Sequence[jax.Device],
  remats: Sequence[str] = ("none", "dots", "block"),
  most: int = 6,
) -> Iterator[Plan]:
  """Compiles the meshes, remats and accumulations that promise the fastest steps.

  What fits by a guess of its memory is ordered by a guess of the time for what
  it computes and sends, one after the other; the first that fits is the last.

  There are `most` compilations at most.
  """
  for parts, sizes, remat in _promising(config, devices, remats):
    changed = config.copy_and_resolve_references()
    changed.mesh.update(sizes)
    changed.accumulate, changed.model.remat = parts, remat
    try:
      found = plan(changed, devices)
    except ValueError:
      continue  # The mesh does not divide something.
    yield found
    most -= 1
    if found.fits or not most:
      return


def _promising(config, devices, remats) -> list[tuple[int, dict, str]]:
  """(parts, mesh, remat) that may fit, the fastest first."""
  alone = config.copy_and_resolve_references()
  alone.mesh.update(dict.fromkeys(AXES, 1))
  spec = pretrain.resolve(alone, devices[:1])
  weights, state = map(_bytes_of, init_state.make_init(spec)[1])
  work, guessed = _Work(spec), []
  for sizes in candidates(config, len(devices)):
    rows = math.prod(sizes[axis] for axis in ROWS)
    ways = sizes["fsdp"] * sizes[TOKENS] * sizes[HEADS]
    parts = 1
    while config.batch_size % (rows * parts) == 0:
      tokens = config.batch_size * config.length / rows / sizes[TOKENS] / parts
      # Of several parts, gradients are summed.
      kept = (weights * (1 + (parts > 1)) + state) / ways
      for remat in remats:
        needed = kept + work.activations(sizes, tokens, remat)
        if needed <= _USABLE * work.chip.memory:
          seconds = work.seconds(sizes, tokens, parts, remat)
          guessed.append((seconds, parts, sizes, remat))
      parts *= 2
  return [rest for _, *rest in sorted(guessed, key=lambda one: one[:2])]
