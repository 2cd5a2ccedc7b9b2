"""Timing: exact statistics on a planted clock, interleaving, failures."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_funnel.evaluation import timing


class Machine:
  """Programs of known cost on a clock of their own; remembers each call."""

  def __init__(self):
    self.now = 0.0
    self.speed = 1.0
    self.calls = []

  def clock(self):
    return self.now

  def program(self, name, seconds, fails_at=None):
    def call():
      self.calls.append(name)
      if fails_at is not None and self.calls.count(name) > fails_at:
        raise RuntimeError("RESOURCE_EXHAUSTED:\n out of memory")
      self.now += seconds / self.speed
      return jnp.zeros(())

    return call

  def protocol(self, **kwargs):
    return timing.Protocol(clock=self.clock, log=lambda line: None, **kwargs)


def test_summary_of_known_quartiles():
  row = timing.summarize([1.0, 2.0, 3.0, 4.0, 5.0], [2.0, 4.0, 4.0, 4.0, 4.0])
  assert row["latency_s"] == 3
  assert row["spread"] == pytest.approx((4 - 2) / 3)
  # 1 - ratios: 0.5, 0.5, 0.25, 0, -0.25.
  assert row["reduction"] == 0.25
  assert row["reduction_quartiles"] == [0.0, 0.5]
  assert row["reduction_of_medians"] == pytest.approx(1 - 3 / 4)


def test_a_machine_that_slows_down_does_not_move_the_reduction():
  machine = Machine()

  def slowing(name, seconds):
    program = machine.program(name, seconds)

    def call():
      # Every round, of two calls, is slower than the one before.
      machine.speed = 0.8 ** (len(machine.calls) // 2)
      return program()

    return call

  calls = {"off": slowing("off", 2.0), "f": slowing("f", 1.0)}
  times, _ = timing.time_interleaved(
    calls, machine.protocol(repeats=8, warmup=0)
  )
  row = timing.summarize(times["f"], times["off"])
  assert row["reduction"] == pytest.approx(0.5)
  assert row["spread"] > 0.3


def test_every_round_runs_each_once_in_an_order_that_the_seed_decides():
  orders = []
  for seed in (0, 0, 1):
    machine = Machine()
    calls = {name: machine.program(name, 1.0) for name in "abcd"}
    times, _ = timing.time_interleaved(
      calls, machine.protocol(repeats=20, warmup=3, seed=seed)
    )
    assert all(len(t) == 20 for t in times.values())
    orders.append(np.reshape(machine.calls, (23, 4)).tolist())
  assert orders[0] == orders[1] != orders[2]
  rounds = orders[0]
  assert all(sorted(r) == list("abcd") for r in rounds)
  assert len({tuple(r) for r in rounds}) > 10
  # Each of the others goes right before "a" in some round.
  before = {r[r.index("a") - 1] for r in rounds if r.index("a")}
  assert before == {"b", "c", "d"}


def test_warm_up_is_not_counted():
  machine = Machine()
  first = machine.program("a", 1.0)
  slow_start = iter([100.0, 50.0])

  def call():
    machine.now += next(slow_start, 0.0)
    return first()

  times, _ = timing.time_interleaved(
    {"a": call}, machine.protocol(repeats=3, warmup=2)
  )
  assert times == {"a": [1.0, 1.0, 1.0]}


def test_a_failure_stops_one_program_only():
  machine = Machine()
  programs = {
    "off": machine.program("off", 2.0),
    "bad": machine.program("bad", 1.0, fails_at=2),
    "f": machine.program("f", 1.0),
  }

  def broken():
    raise MemoryError("while compiling")

  builders = {
    name: lambda call=call: timing.Program(call, 0.25, 10)
    for name, call in programs.items()
  }
  rows = timing.measure_together(
    builders | {"broken": broken},
    dict.fromkeys([*builders, "broken"], "off"),
    machine.protocol(repeats=5, warmup=1),
  )
  assert list(rows) == ["off", "bad", "f", "broken"]
  assert rows["f"]["error"] is None and rows["f"]["reduction"] == 0.5
  assert rows["f"]["peak_bytes"] == 10 and rows["f"]["compile_s"] == 0.25
  assert rows["bad"]["error"] == (
    "RuntimeError: RESOURCE_EXHAUSTED: out of memory"
  )
  assert "latency_s" not in rows["bad"]
  assert machine.calls.count("bad") == 3
  assert rows["broken"]["error"] == "MemoryError: while compiling"


def test_arguments_of_a_program_are_no_constants():
  weights = jax.random.normal(jax.random.key(0), (256, 256))
  program = timing.compile_program(lambda w, x: x @ w, weights, weights[:2])
  np.testing.assert_allclose(
    program.call(), weights[:2] @ weights, rtol=1e-4, atol=1e-4
  )
  assert program.compile_s > 0
  assert program.peak_bytes >= weights.nbytes + 2 * weights[:2].nbytes


def test_progress_says_how_long_it_takes():
  machine = Machine()
  lines = []
  protocol = timing.Protocol(clock=machine.clock, log=lines.append)
  work = {("a",): 1, ("b",): 2, ("c",): 1}
  for cell in timing.progress(work, "cell {}", protocol):
    machine.now += 10.0 * work[cell]
  assert lines == [
    "[1/3] cell a",
    "[2/3] cell b (about 30 s left)",
    "[3/3] cell c (about 10 s left)",
  ]


@pytest.mark.parametrize(
  "changes, message",
  [
    (dict(repeats=0), "repeats=0: expected an integer >= 1"),
    (dict(warmup=-1), "warmup=-1: expected an integer >= 0"),
    (dict(seed=1.5), "seed=1.5: expected an integer >= 0"),
  ],
)
def test_protocol_errors(changes, message):
  with pytest.raises(ValueError, match=message):
    timing.Protocol(**changes)
