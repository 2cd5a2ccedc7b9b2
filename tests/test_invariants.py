"""What holds for a model with any funnel, over a grid of all options.

Every two values of two options meet in some case of the grid. The rows that a
case is tested with go through it as one batch.
"""

import dataclasses
import functools
import itertools

from flax import nnx
from funnel_grid import (
  CONFIG,
  LENGTH,
  OF_A_STAGE,
  OPTIONS,
  OTHERS,
  Case,
  covering,
  each_value,
  make_model,
)
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_funnel.config import POSITIONS, resolve_funnel
from gemma_funnel.model import Transformer
from gemma_funnel.reducers import Groups
from gemma_funnel.registry import REDUCERS
from gemma_funnel.stream import make_stream

PLAIN = [Case((), True), Case((), False)]
PAIRS = covering(OPTIONS, 2)
GRID = PLAIN + [Case.of(chosen) for chosen in PAIRS]
# For what takes long; and more cases, in which pairs meet in other company.
FEW = PLAIN + [Case.of(chosen) for chosen in each_value(PAIRS)]
slow = functools.partial(pytest.param, marks=pytest.mark.slow)
MORE = [slow(Case.of(c)) for c in covering(OPTIONS, 2, turn=5)[::12]]
# Of each other family the plain model, and one with a funnel of the grid.
OF_FAMILIES = [
  dataclasses.replace(case, family=family)
  for number, family in enumerate(OTHERS)
  for case in (PLAIN[number % 2], Case.of(PAIRS[5 * number + 2]))
]
over = functools.partial(pytest.mark.parametrize, "case", ids=str)


@pytest.mark.parametrize("size,cases", [(1, FEW), (2, GRID)])
def test_the_grid_covers_every_pair(size, cases):
  """Of the values that cases have in the end, whoever chose them."""
  met = set()
  for case in cases:
    have = [("causal", case.causal)]
    for n, stage in enumerate(case.stages):
      have += [((name, n), getattr(stage, name)) for name in OF_A_STAGE]
    met |= {frozenset(values) for values in itertools.combinations(have, size)}
  options = {"causal": (True, False)}
  options |= {(name, 0): OPTIONS[name] for name in OF_A_STAGE}
  options |= {(name, 1): OPTIONS[name + "2"] for name in OF_A_STAGE}
  missing = [
    values
    for names in itertools.combinations(options, size)
    for values in itertools.product(
      *([(name, value) for value in options[name]] for name in names)
    )
    if frozenset(values) not in met
  ]
  never = [  # Each stage of "strided" has the positions of its slots.
    ((("reduce", n), "strided"), (("position", n), position))
    for n in (0, 1)
    for position in POSITIONS[1:]
  ]
  assert missing == (never if size == 2 else [])


# --- Models and rows ------------------------------------------------------


def _tokens(*shape, seed=0):
  rng = np.random.default_rng(seed)
  return rng.integers(5, 97, shape or (LENGTH,)).astype(np.int32)


def _other(tokens):
  return (tokens + 40) % 92 + 5


def _rows(align: int, room: int) -> dict:
  """Rows by name: (tokens_T, segment_T). Padding is noise, never the same."""
  rows, whole = {}, np.ones(LENGTH, np.int32)

  def row(*documents):
    """`documents` are (start, tokens)."""
    tokens_T, segment_T = _tokens(seed=100 + len(rows)), whole * 0
    for number, (start, tokens) in enumerate(documents, 1):
      tokens_T[start : start + len(tokens)] = tokens
      segment_T[start : start + len(tokens)] = number
    return tokens_T, segment_T

  base = _tokens()
  rows["base"] = base, whole
  for s in range(LENGTH):
    rows["changed", s] = np.append(base[:s], _other(base[s:])), whole
  for start in (0, 1, 2, 3, 5, LENGTH - 14):
    rows["moved", start] = row((start, base[:14]))
  packed, at = [], 0
  for size in (10, 13, 1, 7, 4, 2):
    if at + size <= LENGTH:
      packed.append((at, _tokens(size, seed=size)))
      at += -(-size // align) * align + room
  assert len(packed) > 1
  rows["packed"] = row(*packed)
  for number, (_, tokens) in enumerate(packed, 1):
    rows["alone", number] = row((0, tokens))
  rows["empty"] = row()
  return rows


@dataclasses.dataclass(frozen=True)
class Row:
  """What leaves a model, with the segment and the last token of each slot."""

  hidden_RD: np.ndarray
  segment_R: np.ndarray
  last_R: np.ndarray

  def segment(self, number: int) -> np.ndarray:
    return self.hidden_RD[self.segment_R == number]


def _slots(segment_T, case: Case):
  """(segment_R, last_R) of what leaves the model; T is no token.

  By the definition of groups, of stages that never recover.
  """
  slots = list(zip(segment_T, range(LENGTH), strict=False))
  for stage in case.stages:
    if stage.recover != "none":
      continue
    groups, rank = [], 0
    for n, (segment, t) in enumerate(slots):
      rank = rank + 1 if n and slots[n - 1][0] == segment else 0
      apart = stage.keep_first and not case.causal
      begins = rank == 0 or (rank - apart) % stage.stride == 0
      if segment and begins:
        groups.append((segment, t))
    size = REDUCERS[stage.reduce](stage).length(len(slots), case.causal)
    slots = groups + [(0, LENGTH)] * (size - len(groups))
  return map(np.array, zip(*slots, strict=True))


def _run(case: Case, rows: dict) -> dict[str, Row]:
  """What the model makes of rows, by their names."""
  tokens, segments = map(np.stack, zip(*rows.values(), strict=True))
  hidden_BRD = make_model(case.stages, case.family).encode(
    tokens, segments, causal=case.causal
  )
  return {
    name: Row(hidden_RD, *_slots(segment_T, case))
    for name, hidden_RD, segment_T in zip(
      rows, np.asarray(hidden_BRD), segments, strict=True
    )
  }


@functools.cache
def _hidden(case: Case) -> dict[str, Row]:
  return _run(case, _rows(case.stride, case.room))


# --- Invariants -----------------------------------------------------------


@over(GRID + MORE + OF_FAMILIES)
def test_the_future_is_hidden_or_seen(case):
  """By perturbation: tokens from s on are others."""
  rows = _hidden(case)
  base = rows["base"]
  change_SR = np.stack(
    [
      np.abs(rows["changed", s].hidden_RD - base.hidden_RD).max(axis=1)
      for s in range(LENGTH)
    ]
  )
  before_SR = base.last_R[None] < np.arange(LENGTH)[:, None]
  assert change_SR[~before_SR].max() > 1e-2
  if case.causal:
    assert change_SR[before_SR].max() < 1e-5
  else:
    assert change_SR[before_SR].max() > 1e-2


@over(GRID + MORE + OF_FAMILIES)
def test_padding_changes_nothing(case):
  """Wherever a segment starts, and whatever the padding holds."""
  rows = _hidden(case)
  want = rows["moved", 0].segment(1)
  for name, row in rows.items():
    if name[0] == "moved":
      np.testing.assert_allclose(row.segment(1), want, atol=1e-5, err_msg=name)
    assert np.all(np.isfinite(row.hidden_RD))


@over(GRID + MORE + OF_FAMILIES)
def test_packed_equals_unpacked(case):
  """So no segment leaks into another either."""
  rows = _hidden(case)
  numbers = [name[1] for name in rows if name[0] == "alone"]
  assert set(rows["packed"].segment_R) - {0} == set(numbers)
  for number in numbers:
    np.testing.assert_allclose(
      rows["packed"].segment(number),
      rows["alone", number].segment(1),
      atol=1e-5,
      err_msg=f"segment {number}",
    )


@over(FEW + OF_FAMILIES)
def test_a_row_of_one_segment_need_not_say_so(case):
  """And may end early where no token looks ahead: a prefix of a causal row."""
  base = _hidden(case)["base"]
  length = case.stride + 1 if case.causal else LENGTH
  tokens = _tokens()[None, :length]
  got = make_model(case.stages, case.family).encode(tokens, causal=case.causal)[
    0
  ]
  want = base.hidden_RD[base.last_R < length] if case.causal else base.hidden_RD
  np.testing.assert_allclose(got[: len(want)], want, atol=1e-5)


ONES = {
  name: values
  for name, values in OPTIONS.items()
  if not name.startswith(("recover", "stride")) and not name.endswith("2")
} | dict(span=((0, None), (1, 4)), second=("no",), keys=("own", "first"))


@over(
  [Case.of(chosen, stride=1, recover="repeat") for chosen in covering(ONES, 2)]
  + [
    Case(resolve_funnel("start=1,stop=4,stride=1,recover=repeat", 5), True, f)
    for f in OTHERS
  ]
)
def test_stride_1_with_repeat_is_the_plain_model(case):
  want = _hidden(Case((), case.causal, case.family))
  got = _run(case, _rows(1, 0))
  for name, row in got.items():
    real_T = row.segment_R != 0
    np.testing.assert_allclose(
      row.hidden_RD[real_T], want[name].hidden_RD[real_T], atol=1e-5
    )


@over([case for case in GRID + OF_FAMILIES if case.stages])
def test_a_funnel_changes_the_output(case):
  plain = Case((), case.causal, case.family)
  got, want = _hidden(case)["base"], _hidden(plain)["base"]
  size = len(got.hidden_RD)
  assert np.abs(got.hidden_RD - want.hidden_RD[:size]).max() > 1e-2


def _jacobians(case: Case, length: int):
  """(|d slot / d input| [R, T], |d slot / d parameter| by name)."""
  graphdef, params = nnx.split(make_model(case.stages, case.family))
  tokens = _tokens(1, length)
  direction_D = np.random.default_rng(1).normal(size=CONFIG.embed_dim)

  def slots(params, moved_BTD):
    model = nnx.merge(graphdef, params)
    stream = make_stream(model.embed(tokens) + moved_BTD)
    deep = model.trunk(stream, causal=case.causal)
    return (model.final_norm(deep.hidden_BTD) @ direction_D)[0]

  moved_BTD = jnp.zeros((1, length, CONFIG.embed_dim))
  of_params, of_input = jax.jit(jax.jacrev(slots, argnums=(0, 1)))(
    params, moved_BTD
  )
  by_name = {
    jax.tree_util.keystr(path): np.abs(x).max(axis=0)
    for path, x in jax.tree_util.tree_leaves_with_path(of_params)
  }
  return np.abs(of_input).max(axis=(1, 3)), by_name


@over(FEW + OF_FAMILIES + [slow(case) for case in GRID[::4] if case not in FEW])
def test_by_jacobian(case):
  """No output depends on its future; some depends on every parameter.

  25 tokens are three groups of 12, the largest total stride, and neighbouring
  ones see each other through the window: with one visible key, queries and keys
  would get no gradient, and rightly so.
  """
  length = 25
  of_input_RT, of_params = _jacobians(case, length)
  _, last_R = _slots([1] * length, case)
  future_RT = last_R[:, None] < np.arange(length)[None]
  assert np.any(of_input_RT[future_RT] != 0) == (not case.causal)
  unused = _without_attention(case)
  for name, x in of_params.items():
    for layer, one in enumerate(x if "layers" in name else x[None]):
      attends = layer not in unused or "attn" not in name
      assert (one.max() > 1e-7) == attends, (name, layer)


def _without_attention(case) -> set[int]:
  """Layers whose innermost stage has keys=none."""
  found = set()
  for layer in range(CONFIG.num_layers):
    inner = [s for s in case.stages if s.start <= layer < s.stop]
    if inner and inner[-1].keys == "none":
      found.add(layer)
  return found


def test_rows_of_padding_alone_give_no_nan():
  model = make_model(resolve_funnel("start=1,stop=4,reduce=attention", 5))
  graphdef, params = nnx.split(model)
  segments = np.array([[1] * 6, [0] * 6])

  def loss(params):
    logits = nnx.merge(graphdef, params)(_tokens(2, 6), segments)
    return jnp.sum(logits**2)

  value, grads = jax.jit(jax.value_and_grad(loss))(params)
  assert np.isfinite(value)
  assert all(np.all(np.isfinite(g)) for g in jax.tree.leaves(grads))


# --- Faults that the above must see ---------------------------------------


def _future_leak(model: Transformer) -> float:
  """The largest change of a state by a change of later tokens.

  Traced anew each time: a fault may have been planted since.
  """
  length = 25
  tokens_T = _tokens(length)
  rows = [np.append(tokens_T[:s], _other(tokens_T[s:])) for s in range(length)]
  graphdef, params = nnx.split(model)

  @jax.jit
  def encode(params, tokens_BT):
    model = nnx.merge(graphdef, params)
    stream = make_stream(model.embed(tokens_BT))
    return model.trunk(stream, causal=True).hidden_BTD

  hidden_BTD = np.asarray(encode(params, np.stack([*rows, tokens_T])))
  change_ST = np.abs(hidden_BTD[:-1] - hidden_BTD[-1:]).max(axis=-1)
  return change_ST[np.tril(np.ones((length, length), bool), -1)].max()


def _aligned(reduce, reducer, stream):
  """Groups of tokens to come, read back by the first of them."""
  return reduce(reducer, stream, {}, False)


def _reads_ahead(reduce, reducer, stream):
  short, gather_index_BT = reduce(reducer, stream, {}, True)
  return short, gather_index_BT + 1


def _sees_its_block(reduce, reducer, stream):
  """Pooled queries that see keys to the end of the block they begin."""
  short, gather_index_BT = reduce(reducer, stream, {}, True)
  return short.replace(
    last_token_position_BT=short.last_token_position_BT
    + reducer.stage.stride
    - 1
  ), gather_index_BT


def _ends_early(reduce, reducer, stream):
  """Deep states that are seen from the first token of their group on."""
  short, gather_index_BT = reduce(reducer, stream, {}, True)
  return short.replace(
    last_token_position_BT=short.last_token_position_BT
    - reducer.stage.stride
    + 1
  ), gather_index_BT


@pytest.mark.parametrize(
  "funnel,fault",
  [
    ("start=1,stop=4,stride=3", _aligned),
    ("start=1,stop=4,stride=3,recover=repeat", _reads_ahead),
    ("start=2,stop=3,stride=3,keys=first", _sees_its_block),
    ("start=1,stop=4,stride=3,recover=attend", _ends_early),
  ],
)
def test_perturbation_sees_a_planted_leak(funnel, fault, monkeypatch):
  model = make_model(resolve_funnel(funnel, CONFIG.num_layers))
  assert _future_leak(model) < 1e-5
  reduce = Groups.reduce
  monkeypatch.setattr(
    Groups,
    "reduce",
    lambda reducer, stream, aux, causal: fault(reduce, reducer, stream),
  )
  assert _future_leak(model) > 1e-3
