"""Funnels that cover all options, and tiny models to try them with.

The full product is too large, so each grid is a covering one: every two values
of two options meet in some case. Models are tiny and unrolled, which compiles
fast.
"""

import dataclasses
import functools
import itertools
import zlib

from flax import nnx
import jax

from gemma_funnel import config as config_lib
from gemma_funnel.config import (
  POSITIONS,
  FunnelConfig,
  RopeScaling,
  TransformerConfig,
  format_funnel,
  resolve_funnel,
  total_stride,
)
from gemma_funnel.model import Transformer
from gemma_funnel.reducers import Groups
from gemma_funnel.registry import RECOVERIES, REDUCERS

# Total strides are 2, 3, 4, 6, 8, 9 and 12: of 37 tokens, the last ends a group
# by nearly all. The window is shorter than the row, and longer than any stride:
# neighbouring groups see each other in local layers too.
LENGTH = 37
CONFIG = TransformerConfig.preset(
  "tiny", num_layers=5, window=14, scan_layers=False, kernel="reference"
)

# What else has a value of its own in the models of other families; the bases
# and the scalings bite at this length.
_OWN = dict(
  gemma3_text=dict(
    attn_softcap=None,
    final_softcap=None,
    rope_base=3000.0,
    local_rope_base=30.0,
    rope_scaling=RopeScaling("linear", 8.0),
  ),
  llama=dict(
    norm_eps=1e-5, rope_scaling=RopeScaling("llama3", 4.0, 1.0, 4.0, 16)
  ),
  mistral=dict(attention_pattern=("local",)),
  qwen2=dict(attention_pattern=("global", "local")),
)
FAMILIES = {
  name: dataclasses.replace(CONFIG, **fixed | _OWN.get(name, {}))
  for name, fixed in config_lib.FAMILIES.items()
}
GEMMA2 = "gemma2"  # CONFIG's.
OTHERS = tuple(name for name in FAMILIES if name != GEMMA2)

OF_A_STAGE = dict(
  reduce=tuple(n for n in REDUCERS if issubclass(REDUCERS[n], Groups)),
  # "affine" is "repeat", but for what bypasses.
  recover=tuple(n for n in RECOVERIES if n != "affine"),
  stride=(2, 3, 4),
  keys=("own", "first", "before", "none"),
  keep_first=(False, True),
  position=POSITIONS,
)
# Odd starts, and stops before the last layer. Options of a second stage, where
# there is one, end in 2.
OPTIONS = dict(
  causal=(True, False),
  span=((0, None), (1, 4), (2, 3), (3, None)),
  second=("no", "within", "after"),
  **OF_A_STAGE,
  **{f"{name}2": values for name, values in OF_A_STAGE.items()},
)
OPTIONS["stride2"] = (2, 3)
# Each way of keys and each kind of recovery; pairs of all would be many.
OPTIONS["keys2"] = ("own", "before")
OPTIONS["recover2"] = ("average", "delta", "attend", "none")
SECOND_SPANS = {
  ("within", (0, None)): (2, 4),
  ("within", (1, 4)): (2, 4),
  ("within", (3, None)): (4, None),
  ("after", (1, 4)): (4, None),
  ("after", (2, 3)): (4, None),
}


def _spans(span, second, recover, recover2):
  """The layers of each stage; None if it cannot be."""
  if recover == "none" and span[1] is not None:
    return None
  if second == "no":
    return (span,)
  inner = SECOND_SPANS.get((second, span))
  if inner is None:
    return None
  if recover2 == "none" and (inner[1] is not None):
    return None
  if recover2 == "none" and second == "within" and recover != "none":
    return None
  return span, inner


def _possible(case: dict) -> bool:
  """Whether what is chosen so far can be made a configuration."""
  for end in ("", "2"):
    if case.get(f"reduce{end}") == "strided":
      if case.get(f"position{end}", "last") != "last":
        return False
  values = {
    name: (case[name],) if name in case else OPTIONS[name]
    for name in ("span", "second", "recover", "recover2")
  }
  if any(name.endswith("2") for name in case):
    values["second"] = [v for v in values["second"] if v != "no"]
  return any(_spans(*choice) for choice in itertools.product(*values.values()))


def _meetings(case: dict, size: int):
  return set(itertools.combinations(sorted(case.items(), key=str), size))


def _all_meetings(options: dict, size: int):
  """All possible choices of `size` different options."""
  for names in itertools.combinations(options, size):
    for values in itertools.product(*(options[name] for name in names)):
      case = dict(zip(names, values, strict=True))
      if _possible(case):
        yield tuple(sorted(case.items(), key=str))


def covering(options: dict, size: int, turn: int = 0) -> list[dict]:
  """Cases in which all possible choices of `size` options occur.

  Greedy: a case starts from a choice that is still missing, and takes of each
  further option the value that brings most missing ones; `turn` rotates the
  options and gives other cases.
  """
  missing = dict.fromkeys(_all_meetings(options, size))
  cases = []
  while missing:
    case = dict(next(iter(missing)))
    names = list(options)[turn:] + list(options)[:turn]
    for name in sorted(names, key=lambda name: name.endswith("2")):
      if name in case or (name.endswith("2") and case["second"] == "no"):
        continue
      grown = [{**case, name: value} for value in options[name]]
      gain = lambda c: sum(m in missing for m in _meetings(c, size))  # noqa: B023
      case = max(filter(_possible, grown), key=gain)
    for meeting in _meetings(case, size):
      missing.pop(meeting, None)
    cases.append(case)
  return cases


@dataclasses.dataclass(frozen=True)
class Case:
  """A funnel, which way its model looks, and of which family it is."""

  stages: tuple[FunnelConfig, ...]
  causal: bool
  family: str = GEMMA2

  @classmethod
  def of(cls, chosen: dict, **fixed) -> "Case":
    """From choices of `OPTIONS`; what is `fixed` is so in every stage."""
    values = chosen | fixed
    values |= {f"{name}2": value for name, value in fixed.items()}
    spans = _spans(*map(values.get, ("span", "second", "recover", "recover2")))
    stages = [
      FunnelConfig(*span, **{name: values[name + end] for name in OF_A_STAGE})
      for span, end in zip(spans, ("", "2"), strict=False)
    ]
    return cls(resolve_funnel(stages, CONFIG.num_layers), chosen["causal"])

  @property
  def stride(self) -> int:
    return total_stride(self.stages)

  @property
  def room(self) -> int:
    """Padding that packing leaves after each segment."""
    apart = not self.causal and any(s.keep_first for s in self.stages)
    return self.stride if apart else 0

  def __str__(self):
    family = "" if self.family == GEMMA2 else f"{self.family}:"
    way = "causal" if self.causal else "both"
    return f"{family}{way}:{format_funnel(self.stages)}"


def each_value(cases: list[dict]) -> list[dict]:
  """A few of the cases, in which every value of every option occurs."""
  missing = set(_all_meetings(OPTIONS, 1))
  few = []
  while missing:
    few.append(max(cases, key=lambda c: len(missing & _meetings(c, 1))))
    missing -= _meetings(few[-1], 1)
  return few


@functools.cache
def base(family: str = GEMMA2) -> Transformer:
  return Transformer(FAMILIES[family], rngs=nnx.Rngs(0))


def stirred(model: Transformer) -> Transformer:
  """With norm scales, and what a funnel learns, away from where they start."""

  def stir(path, x):
    name = jax.tree_util.keystr(path)
    key = jax.random.fold_in(jax.random.key(1), zlib.crc32(name.encode()))
    moved = any(word in name for word in ("scale", "bias", "funnel"))
    size = 0.3 if moved else 0.0
    return x + size * jax.random.normal(key, x.shape)

  graphdef, params = nnx.split(model)
  return nnx.merge(graphdef, jax.tree_util.tree_map_with_path(stir, params))


@functools.cache
def make_model(stages=(), family: str = GEMMA2) -> Transformer:
  """Of these resolved stages; nothing in it is neutral."""
  return stirred(base(family).with_funnel(stages))


@functools.cache
def decodable() -> tuple[tuple[FunnelConfig, ...], ...]:
  """Funnels of a covering grid that a causal model can decode with."""
  cases = [Case.of(chosen) for chosen in covering(OPTIONS, 2)]
  found = [case.stages for case in cases if case.causal]
  recovers = lambda stages: all(s.recover != "none" for s in stages)
  return ((), *filter(recovers, dict.fromkeys(found)))
