"""What a run starts from: weights that it trains, and those that it only reads.

What is trained is "params", all of a model's, or "lora", factors beside
matrices that are frozen; and what is put on the model.
"""

from collections.abc import Callable
import functools
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp

from gemma_funnel import convert
from gemma_funnel import lora as lora_lib
from gemma_funnel.config import format_funnel
from gemma_funnel.model import Transformer
from gemma_funnel.parallel import sharding


def make_init(
  setup: Any, more: Callable[[nnx.Rngs], dict[str, Any]] = lambda rngs: {}
):
  """(init, abstract): makes (weights, opt_state), and their shapes.

  `init(seed, frozen)` takes what `load_frozen` gives. `abstract` holds
  ShapeDtypeStructs with shardings; nothing is ever whole on one device.

  Args:
    setup: of `pretrain` or `finetune`.
    more: further weights by name, made from keys.
  """
  config, optimizer, lora = setup.config, setup.optimizer, setup.lora
  stages = setup.funnels.funnel

  def fresh(seed):
    rngs = nnx.Rngs(jax.random.key(seed))
    model = Transformer(setup.model_config, stages, rngs=rngs)
    params = nnx.to_pure_dict(nnx.state(model))
    if lora is None:
      return {"params": params, **more(rngs)}
    adapters = lora_lib.init(params, lora, rngs.params())
    return {"lora": adapters, **more(rngs)}

  def whole(seed):
    weights = fresh(seed)
    return weights, optimizer.init(weights)

  abstract = sharding.place(jax.eval_shape(whole, 0), setup.mesh)
  shardings = jax.tree.map(lambda x: x.sharding, abstract)
  if config.init_from is None:
    made = jax.jit(whole, out_shardings=shardings)
    return lambda seed, frozen=None: made(seed), abstract

  def loaded(seed, frozen=None):
    # What the checkpoint has need not be made: a jit leaves it out.
    kept = {k: dict(v) for k, v in shardings[0].items() if k != "params"}
    if "funnel" in kept.get("lora", {}):
      del kept["lora"]["funnel"]

    def made(seed):
      weights = fresh(seed)
      return {k: {n: weights[k][n] for n in v} for k, v in kept.items()}

    weights = jax.jit(made, out_shardings=kept)(seed)
    if lora is None:
      weights["params"] = load_params(config, stages, setup.mesh)
    elif "funnel" in frozen["base"]:
      # A copy: steps give weights away.
      copy = jax.jit(lambda x: jax.tree.map(jnp.copy, x))
      weights["lora"]["funnel"] = copy(frozen["base"]["funnel"])
    begin = jax.jit(optimizer.init, out_shardings=shardings[1])
    return weights, begin(weights)

  return loaded, abstract


def load_params(config: Any, stages, mesh: jax.sharding.Mesh | None):
  """The parameters of `config.init_from` under a funnel, on a mesh."""
  model = convert.load(
    config.init_from, format_funnel(stages), config.model.param_dtype, mesh=mesh
  )
  return nnx.to_pure_dict(nnx.state(model))


def load_frozen(setup: Any) -> dict[str, Any]:
  """What a step reads and does not train; {} is nothing.

  "teacher" are parameters to distil from, "base" those that factors are beside.
  """
  config, frozen = setup.config, {}
  if _is_distilled(setup):
    frozen["teacher"] = load_params(config, (), setup.mesh)
  if setup.lora:
    params = load_params(config, setup.funnels.funnel, setup.mesh)
    frozen["base"] = load_base(params, setup.lora, setup.mesh)
  return frozen


def load_base(params, lora: lora_lib.LoraConfig, mesh):
  """Parameters, given away, as they are kept beside factors."""
  freeze = functools.partial(lora_lib.freeze, lora=lora)
  shapes = jax.eval_shape(freeze, params)
  placed = mesh and lora_lib.shardings(shapes, mesh)
  return jax.jit(freeze, donate_argnums=0, out_shardings=placed)(params)


def frozen_shapes(setup: Any) -> dict[str, Any]:
  """As `load_frozen`, of ShapeDtypeStructs with shardings."""
  shapes = lambda stages: nnx.to_pure_dict(
    nnx.state(Transformer.abstract(setup.model_config, stages))
  )
  frozen = {}
  if _is_distilled(setup):
    frozen["teacher"] = sharding.place(shapes(()), setup.mesh)
  if setup.lora:
    base = jax.eval_shape(
      lambda x: lora_lib.freeze(x, setup.lora), shapes(setup.funnels.funnel)
    )
    frozen["base"] = sharding.with_shardings(
      base, lora_lib.shardings(base, setup.mesh)
    )
  return frozen


def params_of(setup: Any, weights: dict[str, Any], frozen: dict[str, Any]):
  """A model's parameters, to be run with; gradients are those of `weights`."""
  if setup.lora is None:
    return weights["params"]
  return lora_lib.attach(frozen["base"], weights["lora"], setup.lora)


def _is_distilled(setup: Any) -> bool:
  return setup.config.get("objective") == "distill"
