"""Optimizers, their schedules, weight decay, freezing and rounding.

All arithmetic is float32, whatever the parameters are. So are second moments
and averages; `moment_dtype` is that of first moments.
"""

import math
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
from ml_collections import config_dict
import optax

from gemma_funnel import params as params_lib
from gemma_funnel.checks import is_number, require, require_choice, require_int
from gemma_funnel.params import by_path, path_of
from gemma_funnel.training.transforms import scale_by

# Options of each optimizer, and what they are where unset.
OPTIONS: dict[str, dict[str, Any]] = {
  "adamw": {"b1": 0.9, "b2": 0.95, "eps": 1e-8, "moment_dtype": None},
  # As in arXiv 2106.04560: b2 is the most that the decay rises to. Without b1
  # it keeps no first moment.
  "adafactor": {"b1": 0.0, "b2": 0.999, "eps": 1e-30, "moment_dtype": None},
  "lion": {"b1": 0.9, "b2": 0.99, "moment_dtype": None},
  # b1, b2 and eps are of Adam, for what is no matrix of a layer.
  "muon": {
    "momentum": 0.95,
    "b1": 0.9,
    "b2": 0.95,
    "eps": 1e-8,
    "moment_dtype": None,
  },
}
SCHEDULES = ("cosine", "linear", "wsd", "wsd_sqrt", "constant")
MOMENT_DTYPES = ("float32", "bfloat16")

# Without a value these are not left out.
_NEEDED = ("learning_rate", "final_fraction", "weight_decay")
# So that rounding is no other random choice's of the same key.
_SALT = 0x726F756E


def default_config(**changes: Any) -> dict[str, Any]:
  """The keys of a configuration's `optimizer`, every one with its default.

  Keys:
    name: "adamw", "adafactor", "lion" or "muon".
    learning_rate: the highest.
    schedule: after the warm-up "cosine", "linear", "constant", or "wsd" or
      "wsd_sqrt", which fall in the last `decay_fraction` of the steps only.
    warmup_steps: in which it rises; final_fraction, of the highest at the end.
    b1, b2, eps: unset is the optimizer's own (`OPTIONS`); momentum, of muon.
    moment_dtype: of first moments; unset is that of the parameters.
    weight_decay: times the learning rate.
    decay_exclude, freeze: regular expressions of parameter paths, such as
      "layers/attn/query": what does not decay (unset: norms, biases and the
      like), and what is not trained.
    clip_norm: of all gradients.
    ema_decay: of a moving average of the weights; unset is none.
    stochastic_rounding: of parameters that are bfloat16.

  Args:
    **changes: other values.
  """
  unset = config_dict.placeholder
  values = dict(
    name="adamw",
    learning_rate=1e-3,
    schedule="cosine",
    warmup_steps=10,
    final_fraction=0.0,
    decay_fraction=unset(float),
    b1=unset(float),
    b2=unset(float),
    eps=unset(float),
    momentum=unset(float),
    moment_dtype=unset(str),
    weight_decay=0.1,
    decay_exclude=unset(str),
    freeze=unset(str),
    clip_norm=1.0,
    ema_decay=unset(float),
    stochastic_rounding=False,
  )
  unknown = changes.keys() - values.keys()
  if unknown:
    raise ValueError(f"the optimizer has no keys {sorted(unknown)}")
  return {**values, **changes}


def schedule_of(
  config: ml_collections.ConfigDict, steps: int
) -> optax.Schedule:
  """Linear from 0 over `warmup_steps`, then as `schedule` says.

  "cosine" and "linear" fall to `final_fraction` of the learning rate. "wsd"
  falls linearly in the last `decay_fraction` of all steps, "wsd_sqrt" as
  1 - sqrt there (arXiv 2405.18392), and both are constant before.

  Raises:
    ValueError: a value out of range, named.
  """
  _check(config)
  peak, warmup = config.learning_rate, config.warmup_steps
  require_int("optimizer.warmup_steps", warmup)
  end = peak * config.final_fraction
  require(
    0 <= warmup < steps,
    f"optimizer.warmup_steps={warmup}: expected at least 0 "
    f"and below steps={steps}, such as --config.optimizer.warmup_steps="
    f"{steps // 10}; or more steps (--config.steps; --config.epochs of a task)",
  )
  decay = _decay_steps(config, steps)
  match config.schedule:
    case "cosine":
      return optax.warmup_cosine_decay_schedule(0.0, peak, warmup, steps, end)
    case "constant" | "linear":
      after = optax.linear_schedule(peak, end, steps - warmup)
    case "wsd":
      after = optax.linear_schedule(peak, end, decay, steps - decay - warmup)
    case "wsd_sqrt":

      def after(count):
        done = jnp.clip((count - (steps - decay - warmup)) / decay, 0.0, 1.0)
        return peak - (peak - end) * jnp.sqrt(done)

  if not warmup:
    return after
  rise = optax.linear_schedule(0.0, peak, warmup)
  return optax.join_schedules([rise, after], [warmup])


def _decay_steps(config: ml_collections.ConfigDict, steps: int) -> int | None:
  fraction, schedule = config.decay_fraction, config.schedule
  if not schedule.startswith("wsd"):
    require(
      fraction is None,
      f"optimizer.decay_fraction={fraction}: schedule={schedule!r} has none; "
      "leave it unset, or choose 'wsd'",
    )
    require(
      schedule != "constant" or config.final_fraction == 1,
      f"optimizer.final_fraction={config.final_fraction}: expected 1 with "
      "schedule='constant', which ends where it began",
    )
    return None
  require(
    fraction is not None and 0 < fraction <= 1,
    f"optimizer.decay_fraction={fraction}: expected a number above 0 and up "
    f"to 1, such as 0.2, with schedule={schedule!r}",
  )
  decay = max(1, round(fraction * steps))
  require(
    decay + config.warmup_steps <= steps,
    f"optimizer.decay_fraction={fraction} is {decay} steps and "
    f"optimizer.warmup_steps={config.warmup_steps}: more than steps={steps}",
  )
  return decay


def _check(config: ml_collections.ConfigDict) -> None:
  """Raises on values that cannot be, whatever the optimizer."""
  # Written so that a NaN fails; a key without a value passes.
  ranges = (
    ("learning_rate eps clip_norm", lambda x: 0 < x < math.inf, "> 0"),
    ("weight_decay final_fraction", lambda x: 0 <= x < math.inf, ">= 0"),
    ("b1 b2 momentum", lambda x: 0 <= x < 1, ">= 0 and < 1"),
    ("ema_decay", lambda x: 0 < x < 1, "> 0 and < 1"),
  )
  for names, fits, expected in ranges:
    for name in names.split():
      value = config[name]
      none = value is None and name not in _NEEDED
      require(
        none or (is_number(value) and fits(value)),
        f"optimizer.{name}={value!r}: expected {expected}",
      )
  require_choice("optimizer.name", config.name, OPTIONS)
  require_choice("optimizer.schedule", config.schedule, SCHEDULES)
  require_choice(
    "optimizer.moment_dtype", config.moment_dtype, (*MOMENT_DTYPES, None)
  )


def _options(config: ml_collections.ConfigDict) -> dict[str, Any]:
  """The values of the options that the optimizer has."""
  known = OPTIONS[config.name]
  for option in sorted({name for have in OPTIONS.values() for name in have}):
    require(
      option in known or config[option] is None,
      f"optimizer.{option}={config[option]!r}: {config.name} has none; "
      "leave it unset",
    )
  options = {
    name: default if config[name] is None else config[name]
    for name, default in known.items()
  }
  require(
    config.name != "adafactor"
    or options["b1"]
    or options["moment_dtype"] is None,
    f"optimizer.moment_dtype={options['moment_dtype']!r}: adafactor has "
    "no first moment unless b1 is set",
  )
  return options


def make_optimizer(
  config: ml_collections.ConfigDict, steps: int
) -> tuple[optax.GradientTransformation, optax.Schedule]:
  """The optimizer and its learning rate by step.

  Its updates are float32, for `apply_updates`; what is frozen has neither
  updates nor state. Paths in its state end in the parameters' own. Decay is
  times the learning rate, as in AdamW (arXiv 1711.05101), with all of them.

  Args:
    config: as `default_config` gives.
    steps: the step at which the schedule ends.

  Raises:
    ValueError: a value out of range, or an option that the optimizer has not,
      named. `init` raises it if an expression matches no parameter, or
      `freeze` all of them.
  """
  schedule, options = schedule_of(config, steps), _options(config)
  moment_dtype = options.pop("moment_dtype")
  undecayed = _expression(config, "decay_exclude")
  freeze = _expression(config, "freeze")
  require(
    undecayed is None or bool(config.weight_decay),
    f"optimizer.decay_exclude={config.decay_exclude!r}: nothing decays, "
    "optimizer.weight_decay=0",
  )

  def decays(path: str) -> bool:
    if undecayed is not None:
      return not undecayed.search(path)
    row = params_lib.row_of(path)
    return row is None or row.decays

  # optax.clip_by_global_norm chooses for each entry, which makes XLA store the
  # clipped gradients: that takes longer than Adam.
  def clip(updates, _):
    most = config.clip_norm
    factor = most / jnp.maximum(optax.tree.norm(updates), most)
    return jax.tree.map(lambda x: x * factor, updates)

  chain = optax.chain(
    optax.stateless(clip),
    optax.chain(
      scale_by(config.name, options),
      optax.add_decayed_weights(
        config.weight_decay, lambda tree: by_path(decays, tree)
      ),
      optax.scale_by_learning_rate(schedule),
    ),
    *([] if config.ema_decay is None else [_average(config.ema_decay)]),
  )
  chain = _in_float32(chain, moment_dtype)

  def init(params):
    trained = _without(freeze, params)
    _check_expression("freeze", freeze, params)
    _check_trained(config, trained)
    _check_expression("decay_exclude", undecayed, trained)
    return chain.init(trained)

  def update(grads, state, params):
    return chain.update(
      _without(freeze, grads), state, _without(freeze, params)
    )

  return optax.GradientTransformation(init, update), schedule


def _check_trained(config: ml_collections.ConfigDict, trained) -> None:
  """Raises where there is nothing to train, or not what an option is for."""
  leaves = jax.tree_util.tree_leaves_with_path(trained)
  require(
    bool(leaves),
    f"optimizer.freeze={config.freeze!r} matches every parameter: nothing is "
    "left to train",
  )
  require(
    config.name != "muon"
    or any(params_lib.layer_matrix(path_of(path)) for path, _ in leaves),
    "optimizer.name='muon': none of the trained parameters is a matrix of a "
    "layer; choose 'adamw'",
  )
  dtypes = sorted({str(x.dtype) for _, x in leaves})
  require(
    not config.stochastic_rounding or "bfloat16" in dtypes,
    "optimizer.stochastic_rounding=True: expected trained parameters of "
    f"bfloat16, found {', '.join(dtypes)}",
  )


def trained(config: Any, tree):
  """A tree like the weights, without what is frozen."""
  return _without(_expression(config, "freeze"), tree)


def grad_norm(config: Any, grads) -> jax.Array:
  """The global norm that `clip_norm` is of: float32, without what is frozen."""
  return optax.tree.norm(_cast(trained(config, grads), jnp.float32))


def apply_updates(weights, updates, key: jax.Array, stochastic: bool = False):
  """weights + updates, added in float32 and rounded to the weights' dtypes.

  What is frozen is returned as it is. `stochastic` rounds bfloat16 weights up
  or down at random, in proportion to how near each is, so that updates below
  half a unit in the last place are not lost (arXiv 2010.06192).
  """
  key = jax.random.fold_in(key, _SALT) if stochastic else key
  flat, tree = jax.tree.flatten(updates, is_leaf=_is_masked)

  def apply(number, update, weight):
    if _is_masked(update):
      return weight
    total = weight.astype(jnp.float32) + update.astype(jnp.float32)
    if stochastic and weight.dtype == jnp.bfloat16:
      return _round(total, jax.random.fold_in(key, number))
    return total.astype(weight.dtype)

  pairs = enumerate(zip(flat, tree.flatten_up_to(weights), strict=True))
  return tree.unflatten([apply(number, *pair) for number, pair in pairs])


def _round(x: jax.Array, key: jax.Array) -> jax.Array:
  """Float32 to bfloat16 at random, without bias."""
  bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
  # What bfloat16 cuts off carries into what it keeps as often as it is large;
  # where it is zero, never. Of magnitudes, so that signs make no difference.
  noise = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
  kept = (bits + noise) & jnp.uint32(0xFFFF0000)
  rounded = jax.lax.bitcast_convert_type(kept, jnp.float32)
  return jnp.where(jnp.isfinite(x), rounded, x).astype(jnp.bfloat16)


class AverageState(NamedTuple):
  """A moving average of the weights, float32; nothing of what is frozen."""

  average: Any


def averaged(opt_state, weights):
  """`weights` with moving averages of what is trained; None without any.

  Leaves may be shared, with the state too: copy what a step is to give away.
  """
  found = [part for part in opt_state if isinstance(part, AverageState)]
  if not found:
    return None
  return jax.tree.map(
    lambda a, w: w if _is_masked(a) else a.astype(w.dtype),
    found[0].average,
    weights,
    is_leaf=_is_masked,
  )


def _average(decay: float) -> optax.GradientTransformation:
  """Averages sums of weights and updates, before they are rounded."""

  def init(params):
    # A copy: both are given away by a step.
    return AverageState(jax.tree.map(jnp.copy, params))

  def update(updates, state, params):
    mix = lambda a, p, u: decay * a + (1 - decay) * (p + u)
    average = jax.tree.map(mix, state.average, params, updates)
    return updates, AverageState(average)

  return optax.GradientTransformation(init, update)


def _in_float32(
  inner: optax.GradientTransformation, moment_dtype: str | None
) -> optax.GradientTransformation:
  """`inner` on float32; first moments are kept in a dtype, None the params'."""

  def stored(state, params):
    dtypes = {
      path_of(path): moment_dtype or x.dtype
      for path, x in jax.tree_util.tree_leaves_with_path(params)
    }

    def cast(path, x):
      found = re.search(r"/(mu|ema)/(.*)", path_of(path))
      return x.astype(dtypes[found[2]]) if found else x

    return jax.tree_util.tree_map_with_path(cast, state)

  def init(params):
    return stored(inner.init(_cast(params, jnp.float32)), params)

  def update(grads, state, params):
    updates, state = inner.update(
      _cast(grads, jnp.float32), state, _cast(params, jnp.float32)
    )
    return updates, stored(state, params)

  return optax.GradientTransformation(init, update)


def _cast(tree, dtype):
  return jax.tree.map(lambda x: x.astype(dtype), tree)


def _is_masked(x) -> bool:
  return isinstance(x, optax.MaskedNode)


def _without(expression: re.Pattern | None, tree):
  """`tree` without the parameters that an expression is found in."""
  if expression is None:
    return tree
  return jax.tree_util.tree_map_with_path(
    lambda path, x: (
      optax.MaskedNode() if expression.search(path_of(path)) else x
    ),
    tree,
  )


def _expression(config, name: str) -> re.Pattern | None:
  given = getattr(config, name)
  if given is None:
    return None
  try:
    return re.compile(given)
  except re.error as error:
    raise ValueError(
      f"optimizer.{name}={given!r} is no regular expression: {error}"
    ) from error


def _check_expression(name: str, expression, params) -> None:
  leaves = jax.tree_util.tree_leaves_with_path(params)
  paths = [path_of(path) for path, _ in leaves]
  if expression is None or any(map(expression.search, paths)):
    return
  some = ", ".join(paths[:4]) + (", ..." if len(paths) > 4 else "")
  raise ValueError(
    f"optimizer.{name}={expression.pattern!r} matches none of the "
    f"{len(paths)} parameters: {some}"
  )
