"""AdamW with clipping, and a warm-up to a cosine."""

import re

import jax
import ml_collections
import optax

# Parameters that weight decay leaves alone: norm scales are offsets from one,
# a funnel's and a head's vectors from a mean or from no preference.
_UNDECAYED = r"scale$|funnel/\d+/(pool_query|gate)$|head/(pool_query|bias)$"


def path_of(key_path: tuple) -> str:
  """A parameter's path as text, such as "layers/attn/query"."""
  return jax.tree_util.keystr(key_path, simple=True, separator="/")


def schedule_of(
  config: ml_collections.ConfigDict, steps: int
) -> optax.Schedule:
  """Linear from 0 over `warmup_steps`, then a cosine to `final_fraction`.

  Raises:
    ValueError: a value out of range, named.
  """
  # Written so that a NaN fails.
  for name in ("learning_rate", "eps", "clip_norm"):
    if not config[name] > 0:
      raise ValueError(f"optimizer.{name}={config[name]}: expected > 0")
  for name in ("weight_decay", "final_fraction"):
    if not config[name] >= 0:
      raise ValueError(f"optimizer.{name}={config[name]}: expected >= 0")
  for name in ("b1", "b2"):
    if not 0 <= config[name] < 1:
      raise ValueError(
        f"optimizer.{name}={config[name]}: expected >= 0 and < 1"
      )
  if not 0 <= config.warmup_steps < steps:
    raise ValueError(
      f"optimizer.warmup_steps={config.warmup_steps}: expected at least 0 "
      f"and below steps={steps}"
    )
  return optax.warmup_cosine_decay_schedule(
    init_value=0.0,
    peak_value=config.learning_rate,
    warmup_steps=config.warmup_steps,
    decay_steps=steps,
    end_value=config.learning_rate * config.final_fraction,
  )


def make_optimizer(
  config: ml_collections.ConfigDict, steps: int
) -> tuple[optax.GradientTransformation, optax.Schedule]:
  """The optimizer and its learning rate by step.

  Args:
    config: learning_rate, warmup_steps, final_fraction, b1, b2, eps,
      weight_decay and clip_norm (of the global gradient norm).
    steps: the step at which the cosine ends.

  Raises:
    ValueError: a value out of range, named.
  """
  schedule = schedule_of(config, steps)

  def decayed(params):
    return jax.tree_util.tree_map_with_path(
      lambda path, _: not re.search(_UNDECAYED, path_of(path)), params
    )

  return (
    optax.chain(
      optax.clip_by_global_norm(config.clip_norm),
      optax.adamw(
        schedule,
        b1=config.b1,
        b2=config.b2,
        eps=config.eps,
        weight_decay=config.weight_decay,
        mask=decayed,
      ),
    ),
    schedule,
  )
