"""One holder at a time, named; a killed one leaves its notes and no lock."""

import os
import signal
import subprocess
import sys

import pytest

from gemma_funnel.locks import Lock

_HOLD = """
import sys, time
from gemma_funnel.locks import Lock
with Lock(sys.argv[1], "the folder") as lock:
  lock.note(partial="x")
  print("held", flush=True)
  time.sleep(60)
"""


def test_second_is_refused_until_the_first_ends(tmp_path):
  path = tmp_path / ".lock"
  first = subprocess.Popen(
    [sys.executable, "-c", _HOLD, path], stdout=subprocess.PIPE
  )
  assert first.stdout.readline() == b"held\n"
  with pytest.raises(ValueError, match=rf"in use by process {first.pid} on"):
    with Lock(path, "the folder"):
      pass
  first.send_signal(signal.SIGKILL)
  first.communicate()
  with Lock(path, "the folder") as lock:
    assert lock.previous["partial"] == "x"
  assert not path.exists()
  with Lock(path, "the folder") as lock:
    assert lock.previous == {}


def test_folder_that_cannot_be_written_is_named(tmp_path):
  with pytest.raises(ValueError, match="the folder cannot be written"):
    with Lock(tmp_path / "none" / ".lock", "the folder"):
      pass


def test_nothing_is_held_on_a_bucket():
  with Lock("gs://bucket/run/.lock", "the folder") as lock:
    lock.note(a=1)
  assert not os.path.exists("gs:")
