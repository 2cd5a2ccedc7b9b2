"""Times of programs that are compared with each other.

All are compiled first. Then come rounds in which each program runs once, in a
new random order. A machine that slows down meanwhile slows down all of them, so
ratios of two times of one round do not change: the measured reduction is 1 minus
the median of these ratios.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
import dataclasses
import functools
import time
from typing import Any

import jax
import numpy as np

from gemma_funnel.checks import require, require_int

Row = dict[str, Any]
Clock = Callable[[], float]


def require_ints(name: str, values: Any, least: int) -> None:
  """Checks each of `values`, a sequence that is not empty."""
  require(
    isinstance(values, (tuple, list)) and bool(values),
    f"{name}={values!r}: expected one value at least",
  )
  for value in values:
    require_int(name, value, least)


@dataclasses.dataclass(frozen=True)
class Protocol:
  """How times are taken."""

  repeats: int = 9  # Rounds that count.
  warmup: int = 2  # Rounds before them that do not.
  seed: int = 0  # Of the order within rounds, and of random inputs.
  clock: Clock = time.perf_counter
  log: Callable[[str], None] = functools.partial(print, flush=True)

  def __post_init__(self):
    require_int("repeats", self.repeats, 1)
    require_int("warmup", self.warmup)
    require_int("seed", self.seed)


DEFAULT_PROTOCOL = Protocol()


@dataclasses.dataclass(frozen=True)
class Program:
  """A compiled program with its arguments."""

  call: Callable[[], Any]
  compile_s: float
  peak_bytes: int | None  # See `peak_bytes`.


def compile_program(
  function: Callable[..., Any], *args: Any, clock: Clock = time.perf_counter
) -> Program:
  """Compiles `function` for `args`, of which none becomes a constant."""
  start = clock()
  compiled = jax.jit(function).lower(*args).compile()
  call = functools.partial(compiled, *args)
  return Program(call, clock() - start, peak_bytes(compiled))


def peak_bytes(compiled: jax.stages.Compiled) -> int | None:
  """Bytes of arguments, results and temporaries; None where not known."""
  memory = compiled.memory_analysis()
  if memory is None:
    return None
  return (
    memory.argument_size_in_bytes
    + memory.output_size_in_bytes
    + memory.temp_size_in_bytes
    - memory.alias_size_in_bytes
  )


def time_interleaved(
  calls: Mapping[Hashable, Callable[[], Any]], protocol: Protocol
) -> tuple[dict[Hashable, list[float]], dict[Hashable, str]]:
  """Times calls in rounds, each call once a round, in a random order.

  Returns:
    Seconds of each call, entry i of the i-th round that counts; and errors of
    calls that failed, which are not run again and have no times.
  """
  rng = np.random.default_rng(protocol.seed)
  times = {key: [] for key in calls}
  errors = {}
  for number in range(protocol.warmup + protocol.repeats):
    keys = list(times)
    for index in rng.permutation(len(keys)):
      key = keys[index]
      start = protocol.clock()
      try:
        jax.block_until_ready(calls[key]())
      except Exception as e:  # Such as out of memory: the others go on.
        errors[key] = _one_line(e)
        del times[key]
        continue
      elapsed = protocol.clock() - start
      if number >= protocol.warmup:
        times[key].append(elapsed)
  return times, errors


def summarize(times: Sequence[float], baseline: Sequence[float] | None) -> Row:
  """Statistics of times, beside a baseline's of the same rounds if there is one.

  Returns:
    `latency_s`, the median; `spread`, the interquartile range over it;
    `reduction`, 1 - median of the rounds' time / baseline;
    `reduction_quartiles` of 1 - these ratios, low and high; and
    `reduction_of_medians`, which has the drift between rounds in it.
  """
  low, median, high = (float(q) for q in np.quantile(times, (0.25, 0.5, 0.75)))
  row = {
    "latency_s": median,
    "spread": (high - low) / median,
    "reduction": None,
    "reduction_quartiles": None,
    "reduction_of_medians": None,
    "times_s": list(times),
  }
  if baseline is not None:
    saved = 1 - np.asarray(times) / np.asarray(baseline)
    quartiles = np.quantile(saved, (0.25, 0.75))
    row["reduction"] = float(np.median(saved))
    row["reduction_quartiles"] = [float(q) for q in quartiles]
    row["reduction_of_medians"] = 1 - median / float(np.median(baseline))
  return row


def _one_line(error: Exception) -> str:
  text = " ".join(str(error).split())
  return f"{type(error).__name__}: {text[:200]}"


def measure_together(
  builders: Mapping[Hashable, Callable[[], Program]],
  baselines: Mapping[Hashable, Hashable],
  protocol: Protocol,
) -> dict[Hashable, Row]:
  """Builds programs, and times each beside the one that `baselines` names.

  Returns:
    Of each: what `summarize` gives, `compile_s`, `peak_bytes` and `error`. A
    failure is the error of its row, and the others' times are not affected.
  """
  programs, errors = {}, {}
  for key, build in builders.items():
    try:
      programs[key] = build()
    except Exception as e:  # Such as out of memory: the others go on.
      errors[key] = _one_line(e)
  times, failed = time_interleaved(
    {key: program.call for key, program in programs.items()}, protocol
  )
  errors.update(failed)
  for key, error in errors.items():
    protocol.log(f"  {key} failed: {error}")
  rows = {}
  for key in builders:
    row = {"error": errors.get(key)}
    if key in programs:
      row["compile_s"] = programs[key].compile_s
      row["peak_bytes"] = programs[key].peak_bytes
    if key in times:
      row |= summarize(times[key], times.get(baselines[key]))
    rows[key] = row
  return rows


class Progress:
  """Says what is next, and how long the rest takes, judged by its FLOPs."""

  def __init__(self, work: Mapping[Hashable, float], protocol: Protocol):
    self._work, self._protocol = work, protocol
    self._start, self._done, self._count = protocol.clock(), 0.0, 0

  def cell(self, key: Hashable, text: str) -> None:
    line = f"[{self._count + 1}/{len(self._work)}] {text}"
    if self._done:
      elapsed = self._protocol.clock() - self._start
      rest = sum(self._work.values()) - self._done
      line += f" (about {elapsed * rest / self._done:.0f} s left)"
    self._protocol.log(line)
    self._done += self._work[key]
    self._count += 1
