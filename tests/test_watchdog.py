"""What ends a run before its time, or sends it back."""

import os
import signal
import subprocess
import sys
import time

import tiny_run

from gemma_funnel.training import watchdog as watchdog_lib


def test_a_signal_is_seen_at_the_next_step():
  before = signal.getsignal(signal.SIGTERM)
  with watchdog_lib.Termination() as termination:
    assert not termination.by(1)
    os.kill(os.getpid(), signal.SIGTERM)
    assert termination.by(2)
  assert signal.getsignal(signal.SIGTERM) is before


HANG = """
import sys, time
from gemma_funnel.training import watchdog as watchdog_lib
def a_step_that_hangs():
  time.sleep(60)
with watchdog_lib.Watchdog(0.02) as watchdog:
  for step in range(3):
    watchdog.heard(f"step {step}")
    time.sleep(0.1)
  print("alive", flush=True)
  a_step_that_hangs()
"""


def test_a_hang_ends_with_stacks():
  start = time.monotonic()
  done = subprocess.run(
    [sys.executable, "-c", HANG],
    capture_output=True,
    text=True,
    cwd=tiny_run.ROOT,
    timeout=60,
    check=False,
  )
  assert done.returncode == watchdog_lib.HUNG == 75
  assert time.monotonic() - start < 40
  assert done.stdout == "alive\n"
  assert "error: step 2 has taken" in done.stderr
  assert "watchdog_minutes=0.02" in done.stderr
  assert "a_step_that_hangs" in done.stderr


def test_a_watchdog_of_no_time_never_ends_anything():
  with watchdog_lib.Watchdog(None) as watchdog:
    watchdog.heard("a step")
    time.sleep(0.01)


def test_a_spike_is_far_above_the_median():
  spikes = watchdog_lib.Spikes(2.0, 4)
  # Too few to say.
  assert not any(spikes.is_spike(x) for x in (9.0, 1.0, 1.2, 1.1))
  assert not spikes.is_spike(2.2)  # The median is 1.15.
  assert spikes.is_spike(3.0)
  assert spikes.is_spike(3.0)  # It has not become one of the last.
  never = watchdog_lib.Spikes(None, 1)
  assert not any(never.is_spike(x) for x in (1.0, 100.0))
