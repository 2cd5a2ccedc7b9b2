"""Schedules: which funnel a step has, and who may be a member."""

import collections

import ml_collections
import pytest
import tiny_run

from gemma_funnel.config import format_funnel
from gemma_funnel.reducers import Reducer
from gemma_funnel.registry import REDUCERS
from gemma_funnel.training import pretrain, schedules

DEPTH = 4


def _config(**changes):
  values = dict(funnel="start=1,stride=2", funnel_from=0, funnel_sampled=())
  return ml_collections.ConfigDict({**values, "seed": 0, **changes})


def _make(needs_all=None, where=(), **changes):
  return schedules.make_schedule(
    _config(**changes), DEPTH, needs_all, **dict(where)
  )


def _strides(schedule, steps):
  return [[s.stride for s in schedule.at(step)] for step in steps]


def test_one_funnel_at_every_step():
  schedule = _make()
  assert _strides(schedule, (0, 1, 1000)) == [[2]] * 3
  assert (
    schedule.variants == (schedule.funnel,) and schedule.segment_alignment == 2
  )
  assert schedule.funnel[0].stop == DEPTH  # Resolved.


@pytest.mark.parametrize("funnel", ["off", "", None])
def test_no_funnel_at_any_step(funnel):
  schedule = _make(funnel=funnel)
  assert schedule.at(0) == () and schedule.variants == ((),)
  assert schedule.segment_alignment == 1


def test_a_funnel_from_a_step_on():
  schedule = _make(funnel_from=3)
  assert _strides(schedule, range(5)) == [[], [], [], [2], [2]]
  assert schedule.variants == (schedule.funnel, ())


SAMPLED = ("off", "start=1,stride=2", "start=2,stride=3")


def test_draws_are_of_the_seed_and_the_step():
  schedule = _make(funnel_sampled=SAMPLED)
  draws = [schedule.at(step) for step in range(600)]
  assert draws == [_make(funnel_sampled=SAMPLED).at(s) for s in range(600)]
  # Not of what was drawn before.
  assert draws[599] == _make(funnel_sampled=SAMPLED).at(599)
  counts = collections.Counter(map(format_funnel, draws))
  assert len(counts) == 3 and min(counts.values()) > 160
  # Neighbours do not follow from each other.
  pairs = collections.Counter(zip(draws, draws[1:], strict=False))
  assert len(pairs) == 9 and min(pairs.values()) > 40
  other = _make(funnel_sampled=SAMPLED, seed=1)
  same = sum(a == other.at(step) for step, a in enumerate(draws))
  assert 150 < same < 250


def test_draws_begin_where_the_funnel_does():
  schedule = _make(funnel="off", funnel_from=20, funnel_sampled=SAMPLED[1:])
  assert all(schedule.at(step) == () for step in range(20))
  assert all(schedule.at(step) for step in range(20, 60))


def test_members_are_each_funnel_once():
  schedule = _make(funnel_sampled=("start=1,stride=2", *SAMPLED), funnel_from=5)
  assert list(map(format_funnel, schedule.variants)) == [
    "start=1,stop=4,stride=2,reduce=mean,recover=average",
    "off",
    "start=2,stop=4,stride=3,reduce=mean,recover=average",
  ]
  for step in range(200):
    assert schedule.at(step) in schedule.variants


def test_segments_suit_all_members():
  assert _make(funnel_sampled=SAMPLED).segment_alignment == 6
  nested = "start=0,stride=2+start=1,stride=2"
  assert (
    _make(funnel_sampled=(nested, "start=1,stride=3")).segment_alignment == 12
  )
  assert (
    _make(funnel="off", funnel_sampled=("start=1,stride=5",)).segment_alignment
    == 5
  )


@pytest.mark.parametrize(
  "changes, text",
  [
    ({"funnel_from": -1}, "funnel_from=-1: expected an integer >= 0"),
    ({"funnel": "start=9"}, "funnel.start=9"),
    ({"funnel_sampled": "off"}, "funnel_sampled='off': expected a tuple"),
    (
      {"funnel_sampled": ("off", "start=9")},
      "funnel_sampled: 'start=9': .*4 layers",
    ),
    ({"funnel_sampled": ("start=1,strid=2",)}, "funnel_sampled: .*strid"),
  ],
  ids=str,
)
def test_a_schedule_that_cannot_be(changes, text):
  with pytest.raises(ValueError, match=text):
    _make(**changes)


def test_every_member_has_to_recover_where_tokens_need_states():
  short = "start=1,recover=none"
  for changes in ({"funnel": short}, {"funnel_sampled": ("off", short)}):
    assert len(_make(**changes).variants) >= 1
    with pytest.raises(ValueError, match="recover='none'.*but this test needs"):
      _make("this test", **changes)


@REDUCERS.register("untrainable")
class Untrainable(Reducer):
  """Cannot be trained in any way that can be asked for."""

  options = ("stride",)
  trains = packs = bidirectional = False


@pytest.mark.parametrize(
  "can, needs_all, where",
  [
    ("trains", "this test", {}),
    ("packs", None, {"packs": True}),
    ("bidirectional", None, {"causal": False}),
  ],
)
def test_what_a_reducer_cannot_do_is_refused_by_name(can, needs_all, where):
  funnel = "start=1,reduce=untrainable"
  for changes in ({"funnel": funnel}, {"funnel_sampled": ("off", funnel)}):
    assert _make(**changes)
    with pytest.raises(ValueError, match=f"reduce='untrainable'.*{can}=False"):
      _make(needs_all, where, **changes)


@pytest.mark.parametrize("objective", ["next_token", "masked"])
@pytest.mark.parametrize("can", ["trains", "packs"])
def test_no_objective_takes_such_a_reducer(objective, can, monkeypatch):
  for name in ("trains", "packs", "bidirectional"):
    monkeypatch.setattr(Untrainable, name, name != can)
  config = tiny_run.make_config(
    "unused", "unused", funnel="start=1,reduce=untrainable", objective=objective
  )
  with pytest.raises(ValueError, match=f"'untrainable'.*{can}=False"):
    pretrain.resolve(config)
