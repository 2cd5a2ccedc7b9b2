"""Which funnel each step of training runs with."""

from collections.abc import Sequence
import dataclasses
import math
from typing import Any

import numpy as np

from gemma_funnel.config import (
  FunnelConfig,
  check_recovers,
  resolve_funnel,
  total_stride,
)

Stages = tuple[FunnelConfig, ...]
# So that a step's draw is no other random choice's of the same seed.
_SALT = 0x66756E6E


@dataclasses.dataclass(frozen=True)
class FunnelSchedule:
  """The funnel of each step: none, one, one from a step on, or drawn.

  Attributes:
    funnel: what the checkpoint is said to be trained with.
    from_step: the first step that is funnelled, counted from 0.
    sampled: what each step from `from_step` on draws one of; () is `funnel`.
    seed: of the draws.
  """

  funnel: Stages
  from_step: int = 0
  sampled: tuple[Stages, ...] = ()
  seed: int = 0

  @property
  def members(self) -> tuple[Stages, ...]:
    """Every funnel that a step may have, each once; `funnel` is the first."""
    before = ((),) if self.from_step else ()
    return tuple(dict.fromkeys((self.funnel, *before, *self.sampled)))

  @property
  def align(self) -> int:
    """What packed segments start at multiples of, to suit all members."""
    return math.lcm(*map(total_stride, self.members))

  def at(self, step: int) -> Stages:
    """The funnel of the step after `step` steps; the same on every host."""
    if step < self.from_step:
      return ()
    if not self.sampled:
      return self.funnel
    rng = np.random.default_rng((_SALT, self.seed, step))
    return self.sampled[rng.integers(len(self.sampled))]


def make_schedule(
  config: Any, num_layers: int, needs_all: str | None
) -> FunnelSchedule:
  """The schedule of a configuration.

  Args:
    config: with `funnel`, `funnel_from`, `funnel_sampled` and `seed`.
    num_layers: depth of the model.
    needs_all: what needs a state for every token; None if nothing does.

  Raises:
    ValueError: a funnel that does not fit, or leaves tokens without a state; a
      start that is negative.
  """
  start, sampled = config.funnel_from, config.funnel_sampled
  if start < 0:
    raise ValueError(f"funnel_from={start}: expected a step >= 0")
  if isinstance(sampled, str):
    raise ValueError(
      f"funnel_sampled={sampled!r}: expected a tuple of funnels, such as "
      "('off', 'start=2,stride=2')"
    )
  schedule = FunnelSchedule(
    resolve_funnel(config.funnel, num_layers),
    start,
    tuple(_resolved(sampled, num_layers)),
    config.seed,
  )
  for stages in schedule.members if needs_all else ():
    check_recovers(stages, needs_all)
  return schedule


def _resolved(funnels: Sequence[str], num_layers: int):
  for funnel in funnels:
    try:
      yield resolve_funnel(funnel, num_layers)
    except ValueError as error:
      raise ValueError(f"funnel_sampled: {funnel!r}: {error}") from error
