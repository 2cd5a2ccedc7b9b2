"""Lists of funnels, as evaluations are given them."""

from collections.abc import Mapping, Sequence

from gemma_funnel.config import FunnelConfig

OFF = "off"


def resolve(
  funnels: Sequence[FunnelConfig | str],
  num_layers: int,
  known: Mapping[str, FunnelConfig | None] | None = None,
) -> dict[str, FunnelConfig | None]:
  """Names funnels and checks that they fit.

  Args:
    funnels: funnels or their strings, such as "start=2,stride=2" or "off".
    num_layers: the model's depth.
    known: other names that may be used, with what they stand for.

  Returns:
    Resolved funnels by the names they were given, in that order; None is off.
    One that does the same as an earlier one is left out.

  Raises:
    ValueError: no funnels, or one that is malformed or does not fit.
  """
  if isinstance(funnels, str) or not funnels:
    raise ValueError(
      f"funnels={funnels!r}: expected a tuple such as ('start=2,stride=2',)"
    )
  named = {}
  for funnel in funnels:
    name = str(funnel).strip()
    try:
      resolved = _resolve(funnel, num_layers, known or {})
    except ValueError as e:
      raise ValueError(f"funnels: {name!r}: {e}") from e
    if resolved not in named.values():
      named[name] = resolved
  return named


def _resolve(funnel, num_layers, known) -> FunnelConfig | None:
  if isinstance(funnel, str):
    name = funnel.strip()
    funnel = known[name] if name in known else FunnelConfig.parse(name)
  return None if funnel is None else funnel.resolve(num_layers)


def label(funnel: FunnelConfig | None) -> str:
  """The string form of a funnel or of none."""
  return OFF if funnel is None else str(funnel)
