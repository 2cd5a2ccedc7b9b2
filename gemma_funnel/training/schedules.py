"""Which funnel each step of training runs with."""

import dataclasses
import math
from typing import Any

import numpy as np

from gemma_funnel import checks
from gemma_funnel.config import (
  FunnelConfig,
  check_recovers,
  check_reducers,
  resolve_funnel,
  total_stride,
)

Stages = tuple[FunnelConfig, ...]
# Separates these draws from other random choices of the same seed.
_SALT = 0x66756E6E


@dataclasses.dataclass(frozen=True)
class FunnelSchedule:
  """The funnel of each step: none, one, one from a step on, or drawn."""

  funnel: Stages  # What the checkpoint is said to be trained with.
  from_step: int = 0  # The first that is funnelled, counted from 0.
  sampled: tuple[Stages, ...] = ()  # What steps draw from; () is `funnel`.
  seed: int = 0

  @property
  def variants(self) -> tuple[Stages, ...]:
    """Every funnel that a step may have, each once; `funnel` is the first."""
    before = ((),) if self.from_step else ()
    return tuple(dict.fromkeys((self.funnel, *before, *self.sampled)))

  @property
  def segment_alignment(self) -> int:
    """Packed segments start at its multiples, to suit all variants."""
    return math.lcm(*map(total_stride, self.variants))

  def segment_padding(self, causal: bool) -> int:
    """Padding after packed segments: a first token kept apart takes a group."""
    kept = any(stage.keep_first for v in self.variants for stage in v)
    return self.segment_alignment if kept and not causal else 0

  def at(self, step: int) -> Stages:
    """The funnel of the step after `step` steps; the same on every host."""
    if step < self.from_step:
      return ()
    if not self.sampled:
      return self.funnel
    rng = np.random.default_rng((_SALT, self.seed, step))
    return self.sampled[rng.integers(len(self.sampled))]


def make_schedule(
  config: Any,
  num_layers: int,
  needs_all: str | None,
  *,
  causal: bool = True,
  packs: bool = False,
) -> FunnelSchedule:
  """The schedule of a configuration.

  Args:
    config: with `funnel`, `funnel_from`, `funnel_sampled` and `seed`.
    num_layers: depth of the model.
    needs_all: what takes a loss at every token; None if nothing does.
    causal: whether tokens see only those before them.
    packs: whether rows hold several segments.

  Raises:
    ValueError: a funnel that does not fit, leaves tokens without a state, or
      has a reducer that cannot be trained so; a negative `funnel_from`.
  """
  checks.require_int("funnel_from", config.funnel_from)
  if isinstance(config.funnel_sampled, str):
    raise ValueError(
      f"funnel_sampled={config.funnel_sampled!r}: expected a tuple of funnels, "
      "such as ('off', 'start=2,stride=2')"
    )
  sampled = []
  for funnel in config.funnel_sampled:
    try:
      sampled.append(resolve_funnel(funnel, num_layers))
    except ValueError as error:
      raise ValueError(f"funnel_sampled: {funnel!r}: {error}") from error
  schedule = FunnelSchedule(
    resolve_funnel(config.funnel, num_layers),
    config.funnel_from,
    tuple(sampled),
    config.seed,
  )
  for stages in schedule.variants:
    if needs_all:
      check_recovers(stages, needs_all)
      check_reducers(stages, "trains", needs_all)
    if packs:
      check_reducers(stages, "packs", "packed rows")
    if not causal:
      check_reducers(stages, "bidirectional", "causal=False")
  return schedule
