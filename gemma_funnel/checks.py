"""What a value must be, said once: each raises a ValueError that names it."""

from collections.abc import Collection
import difflib
import numbers
import sys
from typing import Any

# Devices count in integers of 32 bits.
LARGEST = 2**31 - 1


def require(ok: bool, message: str) -> None:
  """Raises ValueError(message) unless `ok`."""
  if not ok:
    raise ValueError(message)


def require_int(
  name: str, value: Any, least: int = 0, most: int | None = None
) -> None:
  """Checks for an integer (no bool) of at least `least`, at most `most`."""
  is_int = isinstance(value, int) and not isinstance(value, bool)
  open_ = most is None and not (is_int and value > LARGEST)
  most = LARGEST if most is None else most
  bound = f">= {least}" if open_ else f"from {least} to {most}"
  require(
    is_int and least <= value <= most,
    f"{name}={value!r}: expected an integer {bound}",
  )


def require_positive(name: str, value: Any, also: str = "") -> None:
  """Checks for a finite number above 0; `also` says what else would do."""
  require(
    is_number(value) and 0 < value,
    f"{name}={value!r}: expected a number > 0{also}",
  )


def require_between(
  name: str, value: Any, low: float, high: float, *, open: bool = False
) -> None:
  """Checks for a number in [low, high], or within (low, high) if `open`."""
  fits = is_number(value) and (
    low < value < high if open else low <= value <= high
  )
  require(
    fits,
    f"{name}={value!r}: expected a number "
    + (f"between {low} and {high}" if open else f"from {low} to {high}"),
  )


def require_bool(name: str, value: Any) -> None:
  """Checks for a bool."""
  require(isinstance(value, bool), f"{name}={value!r}: expected a bool")


def require_choice(name: str, value: Any, choices: Collection[Any]) -> None:
  """Checks for one of `choices`."""
  require(
    value in choices, f"{name}={value!r}: expected one of {list(choices)}"
  )


def near(name: str, known: Collection[str]) -> str | None:
  """The one of `known` that `name` was likely meant to be.

  Misspelt, in other letters' case, cut short, by its initials ("lr") or by one
  of its words ("layers"); None if no name is like it.
  """
  plain = lambda text: text.lower().replace("-", "_").strip("_")
  for text in known:
    if plain(text) == plain(name):
      return text
  fuzzy = lambda cutoff: (
    difflib.get_close_matches(name, known, n=1, cutoff=cutoff)
    if len(name) > 3  # Two letters are like any two.
    else []
  )
  close = fuzzy(0.75)
  words = {text: plain(text).split("_") for text in known}
  initials = lambda text: "".join(word[:1] for word in words[text])
  close += [x for x in known if len(words[x]) > 1 and initials(x) == name]
  close += [x for x in known if plain(name) in words[x]]
  close += [x for x in known if plain(x).startswith(plain(name))]
  close += fuzzy(0.6)
  return close[0] if close else None


def is_number(value: Any) -> bool:
  """Whether it is a finite real number (no bool)."""
  return (
    isinstance(value, numbers.Real)
    and not isinstance(value, bool)
    and abs(value) <= sys.float_info.max
  )
