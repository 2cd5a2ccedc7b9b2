"""Times of programs that are compared with each other.

All are compiled first. Then come rounds in which each program runs once, in a
new random order. A machine that slows down meanwhile slows down all of them, so
ratios of two times of one round do not change: the measured reduction is 1 minus
the median of these ratios.
"""

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
import dataclasses
import functools
import time
from typing import Any

import jax
import numpy as np

from gemma_funnel import cli
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
  log: Callable[[str], None] = cli.tell

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
  peak_bytes: int | None


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


def _one_line(error: Exception) -> str:
  text = " ".join(str(error).split())
  return f"{type(error).__name__}: {text[:200]}"


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
    for key in (keys[i] for i in rng.permutation(len(keys))):
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
  low, median, high = np.quantile(times, (0.25, 0.5, 0.75)).tolist()
  row = {"latency_s": median, "spread": (high - low) / median}
  names = "reduction", "reduction_quartiles", "reduction_of_medians"
  row |= dict.fromkeys(names) | {"times_s": list(times)}
  if baseline is not None:
    saved = 1 - np.asarray(times) / np.asarray(baseline)
    row["reduction"] = float(np.median(saved))
    row["reduction_quartiles"] = np.quantile(saved, (0.25, 0.75)).tolist()
    row["reduction_of_medians"] = 1 - median / float(np.median(baseline))
  return row


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
  rows = {key: {"error": errors.get(key)} for key in builders}
  for key, program in programs.items():
    about = {"compile_s": program.compile_s, "peak_bytes": program.peak_bytes}
    rows[key] |= about
  for key, own in times.items():
    rows[key] |= summarize(own, times.get(baselines[key]))
  return rows


def progress(
  work: Mapping[tuple[Any, ...], float], text: str, protocol: Protocol
) -> Iterator[tuple[Any, ...]]:
  """Goes through cells: says what is next, and how long the rest takes.

  Args:
    work: of each cell, in any unit, such as FLOPs.
    text: a format of a cell's members.
    protocol: its clock and log.
  """
  start, left = protocol.clock(), sum(work.values())
  for number, (cell, cost) in enumerate(work.items(), 1):
    line = f"[{number}/{len(work)}] {text.format(*cell)}"
    if number > 1:
      done = sum(work.values()) - left
      seconds = (protocol.clock() - start) * left / done
      line += f" (about {seconds:.0f} s left)"
    protocol.log(line)
    yield cell
    left -= cost


def with_rates(
  measured: Row, flops: float, baseline: float, tokens: int
) -> Row:
  """A row of `measure_together` with what follows from a pass's FLOPs.

  Adds `ideal_reduction`, against `baseline` FLOPs, `measured_over_ideal`,
  `flops`, `flops_per_s` and `tokens_per_s`; None where there is no time.
  """
  seconds, reduction = measured.get("latency_s"), measured.get("reduction")
  ideal = 1 - flops / baseline
  comparable = reduction is not None and ideal > 0
  return measured | {
    "ideal_reduction": ideal,
    "measured_over_ideal": reduction / ideal if comparable else None,
    "flops": flops,
    "flops_per_s": flops / seconds if seconds else None,
    "tokens_per_s": tokens / seconds if seconds else None,
  }
