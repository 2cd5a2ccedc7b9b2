"""Lists of funnels, as evaluations are given them."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from gemma_funnel import cli
from gemma_funnel.checks import require, require_int
from gemma_funnel.config import (
  OFF,
  Funnel,
  FunnelConfig,
  check_recovers,
  check_reducers,
  format_funnel,
  parse_funnel,
  resolve_funnel,
)
from gemma_funnel.model import Transformer

# The checkpoint's own funnel, in configurations and in tables.
TRAINED, AS_TRAINED = "trained", "as trained"

Row = dict[str, Any]
Stages = tuple[FunnelConfig, ...]


def resolve(
  funnels: Sequence[Funnel],
  num_layers: int | None = None,
  *,
  own: Funnel = None,
  recovers: str | None = None,
  trains: bool = False,
) -> dict[str, Stages]:
  """Names funnels, each of them once.

  Args:
    funnels: funnels or their strings, such as "start=2,stride=2" or "off".
    num_layers: of the model; None checks what needs none, and leaves the
      funnels unresolved.
    own: what "trained" stands for, () being off; None refuses that name.
    recovers: what needs a state for every token, if anything does.
    trains: whether that takes a loss at every token.

  Returns:
    Stages by name, in the order given; () is off. Of equal funnels the first.

  Raises:
    ValueError: no funnels, or one that cannot be.
  """
  require(
    not isinstance(funnels, str) and bool(funnels),
    f"funnels={funnels!r}: expected a tuple such as ('start=2,stride=2',)",
  )
  named = {}
  for funnel in funnels:
    name = funnel.strip() if isinstance(funnel, str) else None
    if own is not None and name == TRAINED:
      name, funnel = AS_TRAINED, own
    try:
      stages = parse_funnel(funnel)
      name = name or format_funnel(stages)
      if num_layers is not None:
        stages = resolve_funnel(stages, num_layers)
    except ValueError as error:
      raise ValueError(f"funnels: {name or str(funnel)!r}: {error}") from error
    if recovers:
      check_recovers(stages, recovers)
    if trains:
      check_reducers(stages, "trains", recovers)
    if stages not in named.values():
      named[name] = stages
  return named


def check_context(
  named: Mapping[str, Stages], key: str, context_length: int, longest: int
) -> None:
  """Checks the tokens after BOS that `reduce=context` drops: at most `longest`.

  Raises:
    ValueError: too many, or none with a funnel that drops them.
  """
  require_int(key, context_length, 0, longest)
  drops = any(s.reduce == "context" for x in named.values() for s in x)
  require(
    context_length > 0 or not drops,
    f"funnels: reduce=context drops no tokens with {key}=0: expected 1 to "
    f"{longest}",
  )


def resolve_for(
  model: Transformer, funnels: Sequence[Funnel], **needs: Any
) -> dict[str, Stages]:
  """`resolve` for a model, whose own funnel is the trained one."""
  depth = model.config.num_layers
  return resolve(funnels, depth, own=model.stages, **needs)


def with_off(named: Mapping[str, Stages]) -> dict[str, Stages]:
  """The funnels, after "off", which they are compared with."""
  return {OFF: ()} | {name: stages for name, stages in named.items() if stages}


def measure_each(
  what: str, named: Mapping[str, Stages], measure: Callable[[Stages], Row]
) -> list[Row]:
  """A row for each funnel: `funnel`, `resolved`, and what `measure` finds."""
  rows = []
  for name, stages in named.items():
    cli.tell(f"{what}: {name}")
    about = {"funnel": name, "resolved": format_funnel(stages)}
    rows.append(about | measure(stages))
  return rows
