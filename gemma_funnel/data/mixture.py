"""Mixtures: several sources, of which training takes given shares of tokens."""

from collections.abc import Mapping, Sequence
import dataclasses
import math
from typing import Any

import grain
from ml_collections import config_dict
import numpy as np

from gemma_funnel.checks import is_number, require
from gemma_funnel.data import sources
from gemma_funnel.data.documents import Document, Joined
from gemma_funnel.data.packing import PADDING

_ENTRY_KEYS = ("source", "weight", "heldout", "text_key")


@dataclasses.dataclass(frozen=True)
class Part:
  """The training documents of one source of a mixture."""

  name: str  # Its key in `data.mixture`.
  weight: float  # Its share of the training tokens; > 0, all sum to 1.
  documents: Sequence[Document]  # Not empty.


class Mixture(Joined):
  """The training documents of all parts; training draws them by weight."""

  def __init__(self, mixed: Sequence[Part]):
    super().__init__([part.documents for part in mixed])
    self.mixed = tuple(mixed)


def _entries(cfg: Any) -> dict[str, dict[str, Any]]:
  """The entries of `data.mixture`, checked, each with every key."""
  found = {}
  # By name: a configuration that has been saved may have lost their order.
  for name, entry in sorted(cfg.mixture.items()):
    where = f"data.mixture.{name}"
    require(
      isinstance(entry, (Mapping, config_dict.ConfigDict)),
      f"{where}={entry!r}: expected dict(source=.., weight=..)",
    )
    entry = dict(entry)
    unknown = sorted(set(entry) - set(_ENTRY_KEYS))
    require(
      not unknown,
      f"{where} has the keys {unknown}; expected some of {list(_ENTRY_KEYS)}",
    )
    for key in ("source", "weight"):
      require(
        entry.get(key) not in (None, ""),
        f"{where} has no {key}; expected one of each entry",
      )
    weight = entry["weight"]
    require(
      is_number(weight) and weight >= 0,
      f"{where}.weight={weight!r}: expected a number >= 0, not infinite",
    )
    found[name] = {"heldout": None, "text_key": cfg.text_key, **entry}
  for key, default in (("source", sources.STDLIB), ("heldout", None)):
    require(
      getattr(cfg, key) == default,
      f"data.{key}={getattr(cfg, key)!r} and data.mixture are both set; "
      f"expected {key} in the entries of the mixture",
    )
  require(
    any(entry["weight"] for entry in found.values()),
    f"data.mixture: the weights of {list(found)} sum to 0; expected one above "
    "0",
  )
  return found


def load_split(cfg: Any) -> tuple[Mixture, Sequence[Document]]:
  """Finds the documents of all entries, each split as a single source is.

  Args:
    cfg: see `pipeline.default_config`.

  Returns:
    The training documents of the entries with a weight above 0, and the
    held-out documents of all, one entry after the other.

  Raises:
    ValueError: a key of an entry is missing, unknown or has no valid value,
      weights sum to zero, `source` or `heldout` is set beside them, or one
      entry holds out a file that another trains on; see `sources.load_split`.
  """
  found = _entries(cfg)
  for held in filter(None, (e["heldout"] for e in found.values())):
    for entry in found.values():
      if entry["weight"]:
        sources.check_disjoint(entry["source"], held)
  parts, heldout = [], []
  total = math.fsum(entry["weight"] for entry in found.values())
  for name, entry in found.items():
    weight = entry.pop("weight")
    try:
      train, held = sources.load_split(
        heldout_fraction=cfg.heldout_fraction, **entry
      )
    except ValueError as e:
      raise ValueError(f"data.mixture.{name}: {e}") from e
    heldout.append(held)
    if weight:
      parts.append(Part(name, weight / total, train))
  return Mixture(parts), Joined(heldout)


class MixChunks(grain.IterDataset):
  """Chunks of several datasets, in given shares of their tokens.

  The next chunk is from the dataset with the fewest tokens drawn per weight, so
  that after any number of chunks each has its share up to the length of one.
  Nothing is drawn at random: chunks are shuffled later.
  """

  def __init__(
    self, chunks: Mapping[str, grain.IterDataset], weights: Sequence[float]
  ):
    super().__init__(list(chunks.values()))
    self._names, self._weights = tuple(chunks), tuple(weights)

  def __iter__(self) -> grain.DatasetIterator:
    iterators = [iter(parent) for parent in self.parents]
    return _MixedChunks(iterators, self._names, self._weights)


class _MixedChunks(grain.DatasetIterator):
  """Its state is each dataset's, and the tokens drawn of it."""

  def __init__(self, iterators, names: tuple[str, ...], weights):
    super().__init__(iterators)
    self._iterators, self._names, self._weights = iterators, names, weights
    self._drawn = [0] * len(names)

  def __next__(self) -> dict[str, np.ndarray]:
    had = [d / w for d, w in zip(self._drawn, self._weights, strict=True)]
    which = had.index(min(had))
    element = next(self._iterators[which])
    self._drawn[which] += int(np.count_nonzero(element["tokens"] != PADDING))
    return element

  def get_state(self) -> dict[str, Any]:
    parts = zip(self._names, self._drawn, self._iterators, strict=True)
    return {
      name: {"drawn": drawn, "state": iterator.get_state()}
      for name, drawn, iterator in parts
    }

  def set_state(self, state: dict[str, Any]) -> None:
    require(
      set(state) == set(self._names),
      f"the state of the data is of the mixture {sorted(state)}; expected "
      f"data.mixture to be that, found {sorted(self._names)}",
    )
    for i, name in enumerate(self._names):
      self._drawn[i] = state[name]["drawn"]
      self._iterators[i].set_state(state[name]["state"])
