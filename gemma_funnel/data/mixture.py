"""Mixtures: several sources, of which training takes given shares of tokens."""

from collections.abc import Mapping, Sequence
import dataclasses
import math
from typing import Any

import grain
from ml_collections import config_dict
import numpy as np

from gemma_funnel.data import sources
from gemma_funnel.data import tokenizer as tokenizer_lib
from gemma_funnel.data.documents import Document, Joined

_ENTRY_KEYS = ("source", "weight", "heldout", "text_key")


@dataclasses.dataclass(frozen=True)
class Part:
  """What a mixture has of one source.

  Attributes:
    name: its key in `data.mixture`.
    weight: its share of the tokens that are trained on; > 0, all sum to 1.
    documents: its documents to train on; not empty.
  """

  name: str
  weight: float
  documents: Sequence[Document]


class Mixture(Joined):
  """The training documents of all parts; training draws them by weight."""

  def __init__(self, mixed: Sequence[Part]):
    super().__init__([part.documents for part in mixed])
    self.mixed = tuple(mixed)


def _entry(name: str, entry: Any, cfg: Any) -> dict[str, Any]:
  """An entry with every key, checked by itself."""
  where = f"data.mixture.{name}"
  if not isinstance(entry, (Mapping, config_dict.ConfigDict)):
    raise ValueError(f"{where}={entry!r}: expected dict(source=.., weight=..)")
  entry = dict(entry)
  unknown = sorted(set(entry) - set(_ENTRY_KEYS))
  if unknown:
    raise ValueError(
      f"{where} has the keys {unknown}; expected some of {list(_ENTRY_KEYS)}"
    )
  for key in ("source", "weight"):
    if entry.get(key) in (None, ""):
      raise ValueError(f"{where} has no {key}; expected one of each entry")
  weight = entry["weight"]
  is_number = isinstance(weight, (int, float, np.number))
  if isinstance(weight, bool) or not is_number or not 0 <= weight < math.inf:
    raise ValueError(
      f"{where}.weight={weight!r}: expected a number >= 0, not infinite"
    )
  return {"heldout": None, "text_key": cfg.text_key, **entry}


def entries(cfg: Any) -> dict[str, dict[str, Any]]:
  """The entries of `data.mixture`, checked.

  Args:
    cfg: the data's configuration; see `pipeline.default_config`.

  Raises:
    ValueError: a key of an entry that is missing, unknown or has no valid
      value; weights that sum to zero; or `source` or `heldout` beside them.
  """
  # By name: a configuration that has been saved may have lost their order.
  named = sorted(cfg.mixture.items())
  found = {name: _entry(name, entry, cfg) for name, entry in named}
  for key, default in (("source", sources.STDLIB), ("heldout", None)):
    if getattr(cfg, key) != default:
      raise ValueError(
        f"data.{key}={getattr(cfg, key)!r} and data.mixture are both set; "
        f"expected {key} in the entries of the mixture"
      )
  if not sum(entry["weight"] for entry in found.values()) > 0:
    raise ValueError(
      f"data.mixture: the weights of {list(found)} sum to 0; expected one "
      "above 0"
    )
  return found


def load_split(cfg: Any) -> tuple[Mixture, Sequence[Document]]:
  """Finds the documents of all entries, each split as a single source is.

  Args:
    cfg: see `entries`; `heldout_fraction` is that of all entries.

  Returns:
    What is trained on, of entries with a weight above 0, and the held-out
    documents of all of them, one entry after the other.

  Raises:
    ValueError: see `entries` and `sources.load_split`; a file that one entry
      holds out and another trains on.
  """
  found = entries(cfg)
  for held in filter(None, (e["heldout"] for e in found.values())):
    for entry in found.values():
      if entry["weight"]:
        sources.check_disjoint(entry["source"], held)
  parts, heldout = [], []
  total = math.fsum(entry["weight"] for entry in found.values())
  for name, entry in found.items():
    try:
      train, held = sources.load_split(
        entry["source"],
        heldout=entry["heldout"],
        heldout_fraction=cfg.heldout_fraction,
        text_key=entry["text_key"],
      )
    except ValueError as e:
      raise ValueError(f"data.mixture.{name}: {e}") from e
    heldout.append(held)
    if entry["weight"]:
      parts.append(Part(name, entry["weight"] / total, train))
  return Mixture(parts), Joined(heldout)


class MixChunks(grain.IterDataset):
  """Chunks of several datasets, in given shares of their tokens.

  The next chunk is one of the dataset that has had the smallest part of its
  share, so that after any number of chunks each has its share up to the length
  of one. Nothing is drawn at random: chunks are shuffled later.
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
    self._drawn[which] += int(
      np.count_nonzero(element["tokens"] != tokenizer_lib.PAD_ID)
    )
    return element

  def get_state(self) -> dict[str, Any]:
    states = [iterator.get_state() for iterator in self._iterators]
    return {
      name: {"drawn": drawn, "state": state}
      for name, drawn, state in zip(
        self._names, self._drawn, states, strict=True
      )
    }

  def set_state(self, state: dict[str, Any]) -> None:
    if set(state) != set(self._names):
      raise ValueError(
        f"the state of the data is of the mixture {sorted(state)}; expected "
        f"data.mixture to be that, found {sorted(self._names)}"
      )
    for i, name in enumerate(self._names):
      self._drawn[i] = state[name]["drawn"]
      self._iterators[i].set_state(state[name]["state"])
