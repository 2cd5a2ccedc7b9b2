"""What a run starts from: parameters that it trains, and those it only reads.

Trees of parameters go by the names that a checkpoint stores them under. Trained
are "params", all of the model's, or "lora", factors beside frozen matrices; and
"head", on the model. Frozen are "teacher" and "base", what factors are beside.
"""

from collections.abc import Iterable
import functools
from typing import Any, NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp

from gemma_funnel import convert
from gemma_funnel import lora as lora_lib
from gemma_funnel.config import format_funnel
from gemma_funnel.model import Transformer
from gemma_funnel.parallel import sharding
from gemma_funnel.training.schedules import Stages
from gemma_funnel.training.spec import RunSpec

Params = dict[str, Any]


class TrainState(NamedTuple):
  """What a step changes: trees of parameters by name, and the optimizer's."""

  params: Params
  opt_state: Any


def make_init(spec: RunSpec):
  """(init, state_shapes): makes a `TrainState`, and its shapes.

  `init(frozen_params)` takes what `load_frozen` gives. `state_shapes` holds
  ShapeDtypeStructs with shardings; nothing is ever whole on one device.
  """
  optimizer, lora = spec.optimizer.transform, spec.lora

  def fresh(seed) -> Params:
    rngs = nnx.Rngs(jax.random.key(seed))
    model = Transformer(spec.model_config, spec.stages, rngs=rngs)
    params = nnx.to_pure_dict(nnx.state(model))
    if lora is None:
      return {"params": params, **spec.task.init_head(spec, rngs)}
    adapters = lora_lib.init(params, lora, rngs.params())
    return {"lora": adapters, **spec.task.init_head(spec, rngs)}

  def whole(seed) -> TrainState:
    params = fresh(seed)
    return TrainState(params, optimizer.init(params))

  state_shapes = sharding.place(jax.eval_shape(whole, 0), spec.mesh)
  placed = jax.tree.map(lambda x: x.sharding, state_shapes)
  if spec.base is None:
    made = jax.jit(whole, out_shardings=placed)
    return lambda frozen_params=None: made(spec.seed), state_shapes

  def loaded(frozen_params=None) -> TrainState:
    # Values that the checkpoint has are not made: a jit leaves them out.
    kept = {k: dict(v) for k, v in placed.params.items() if k != "params"}
    if "funnel" in kept.get("lora", {}):
      del kept["lora"]["funnel"]

    def made(seed):
      params = fresh(seed)
      return {k: {n: params[k][n] for n in v} for k, v in kept.items()}

    params = jax.jit(made, out_shardings=kept)(spec.seed)
    if lora is None:
      params["params"] = load_params(spec, spec.stages)
    elif "funnel" in frozen_params["base"]:
      # A copy: steps give parameters away.
      copy = jax.jit(lambda x: jax.tree.map(jnp.copy, x))
      params["lora"]["funnel"] = copy(frozen_params["base"]["funnel"])
    begin = jax.jit(optimizer.init, out_shardings=placed.opt_state)
    return TrainState(params, begin(params))

  return loaded, state_shapes


def load_params(spec: RunSpec, stages: Stages) -> Params:
  """The base checkpoint's parameters under a funnel, on the run's mesh."""
  dtype = spec.model_config.param_dtype
  model = convert.load(
    spec.base.path, format_funnel(stages), dtype, mesh=spec.mesh
  )
  return nnx.to_pure_dict(nnx.state(model))


def load_frozen(spec: RunSpec) -> dict[str, Params]:
  """Parameters that a step reads and does not train; {} is none."""
  frozen_params = {}
  if spec.task.distills:
    frozen_params["teacher"] = load_params(spec, ())
  if spec.lora:
    params = load_params(spec, spec.stages)
    frozen_params["base"] = lora_lib.freeze_placed(params, spec.lora, spec.mesh)
  return frozen_params


def frozen_shapes(spec: RunSpec) -> dict[str, Params]:
  """As `load_frozen`, of ShapeDtypeStructs with shardings."""
  shapes = lambda stages: nnx.to_pure_dict(
    nnx.state(Transformer.abstract(spec.model_config, stages))
  )
  frozen_params = {}
  if spec.task.distills:
    frozen_params["teacher"] = sharding.place(shapes(()), spec.mesh)
  if spec.lora:
    freeze = functools.partial(lora_lib.freeze, lora=spec.lora)
    base = jax.eval_shape(freeze, shapes(spec.stages))
    frozen_params["base"] = sharding.with_shardings(
      base, lora_lib.shardings(base, spec.mesh)
    )
  return frozen_params


def model_params(spec: RunSpec, params: Params, frozen_params) -> Params:
  """The model's parameters to run with; gradients are those of `params`."""
  if spec.lora is None:
    return params["params"]
  return lora_lib.attach(frozen_params["base"], params["lora"], spec.lora)


def variant_models(
  spec: RunSpec, others: Iterable[Stages] = ()
) -> dict[Stages, Transformer]:
  """Abstract models of all variants, checked by `select_params`, and others."""
  models = {
    stages: Transformer.abstract(spec.model_config, stages)
    for stages in (*spec.funnels.variants, *others)
  }
  own = nnx.to_pure_dict(nnx.state(models[spec.stages]))
  for stages in spec.funnels.variants:
    select_params(own, models[stages])
  return models


def select_params(params: Params, model: nnx.Module) -> nnx.Module:
  """`model` with the parameters it has among `params`; unused ones are left.

  A variant may learn less than the run's own funnel.

  Raises:
    ValueError: a parameter that `params` has not.
  """
  graphdef, state = nnx.split(model)
  have = dict(nnx.to_flat_state(nnx.State(params)))
  flat = {}
  for path, _ in nnx.to_flat_state(state):
    if path not in have:
      raise ValueError(
        f"funnel {format_funnel(model.stages)} learns "
        f"{'/'.join(map(str, path))}, which the run's own funnel has not: name "
        "a funnel that has it, or sample funnels that learn nothing"
      )
    flat[path] = have[path]
  return nnx.merge(graphdef, nnx.to_pure_dict(nnx.from_flat_state(flat)))
