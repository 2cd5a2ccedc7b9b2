"""Lists of funnels, as evaluations are given them."""

from collections.abc import Mapping, Sequence

from gemma_funnel.config import (
  Funnel,
  FunnelConfig,
  format_funnel,
  parse_funnel,
  resolve_funnel,
)

Stages = tuple[FunnelConfig, ...]


def parse(
  funnels: Sequence[Funnel], known: Mapping[str, Funnel] | None = None
) -> dict[str, Stages]:
  """Names funnels.

  Args:
    funnels: funnels or their strings, such as "start=2,stride=2" or "off".
    known: other names that may be used, with what they stand for.

  Returns:
    Stages by the names they were given, in that order; () is off.

  Raises:
    ValueError: no funnels, or one that is malformed.
  """
  if isinstance(funnels, str) or not funnels:
    raise ValueError(
      f"funnels={funnels!r}: expected a tuple such as ('start=2,stride=2',)"
    )
  named = {}
  for funnel in funnels:
    name = funnel.strip() if isinstance(funnel, str) else None
    try:
      stages = parse_funnel((known or {}).get(name, funnel))
    except ValueError as e:
      raise ValueError(f"funnels: {str(funnel)!r}: {e}") from e
    named[name or format_funnel(stages)] = stages
  return named


def resolve(
  funnels: Sequence[Funnel],
  num_layers: int,
  known: Mapping[str, Funnel] | None = None,
) -> dict[str, Stages]:
  """As `parse`, of a model of that depth, and with each funnel once.

  Returns:
    Resolved stages; what is the same as an earlier one is left out.

  Raises:
    ValueError: no funnels, or one that is malformed or does not fit.
  """
  named = {}
  for name, funnel in parse(funnels, known).items():
    try:
      stages = resolve_funnel(funnel, num_layers)
    except ValueError as e:
      raise ValueError(f"funnels: {name!r}: {e}") from e
    if stages not in named.values():
      named[name] = stages
  return named
