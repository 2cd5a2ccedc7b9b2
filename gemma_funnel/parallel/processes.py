"""Several processes as one run: joining, gathering values, the same config."""

from collections.abc import Callable
import hashlib
import json
import os
import pathlib
import socket
import sys
import threading
import time
from typing import Any

from flax.traverse_util import flatten_dict
import jax
from jax.experimental import multihost_utils
import ml_collections
import numpy as np

from gemma_funnel.checks import require, require_choice

# Seconds that the hosts' clocks may differ by: times in metrics, and of
# checkpoints, are theirs.
_CLOCKS_APART = 60.0
_PACKAGE = pathlib.Path(__file__).parents[1]


def join(
  how: str = "off",
  coordinator: str | None = None,
  num_processes: int | None = None,
  process_id: int | None = None,
  timeout_s: float = 50.0,
) -> None:
  """Joins the other processes of a run, before jax is used.

  The process exits with a line that names what it waited for if it does not
  meet all others in time; jax itself would abort.

  Args:
    how: "off", one process; or "auto", the cluster that jax detects (Cloud TPU,
      GKE, SLURM, Open MPI).
    coordinator: HOST:PORT of process 0, where jax cannot detect it.
    num_processes, process_id: their number and this one's, with `coordinator`.
    timeout_s: for all of them to meet.

  Raises:
    ValueError: options that do not go together.
  """
  explicit = (coordinator, num_processes, process_id)
  require_choice("--distributed", how, ("off", "auto"))
  if any(x is not None for x in explicit):
    require(
      None not in explicit,
      "--coordinator, --num_processes and --process_id go together; found "
      f"{coordinator!r}, {num_processes}, {process_id}",
    )
    require(
      0 <= process_id < num_processes,
      f"--process_id={process_id}: expected 0 to {num_processes - 1}",
    )
    _address(coordinator)
  elif how == "off":
    return
  what = "all processes that jax finds of this cluster"
  if coordinator:
    what = f"{num_processes} processes at {coordinator}"

  def give_up():
    why = "some of them have not come"
    if process_id:
      try:
        socket.create_connection(_address(coordinator), timeout=2).close()
        why = "it answers, so other processes have not come"
      except OSError as error:
        why = f"process 0 is not there: {error}"
    text = f"error: waited {timeout_s:.0f} s for {what}: {why}"
    print(text, file=sys.stderr, flush=True)
    os._exit(1)

  timer = threading.Timer(timeout_s, give_up)
  timer.daemon = True
  timer.start()
  try:
    # Longer than ours: jax ends the process in its own words when it is over.
    longer = round(timeout_s) + 60
    jax.distributed.initialize(*explicit, initialization_timeout=longer)
  except (ValueError, RuntimeError) as error:
    raise ValueError(f"cannot join {what}: {error}") from error
  finally:
    timer.cancel()


def _address(coordinator: str) -> tuple[str, int]:
  host, _, port = coordinator.rpartition(":")
  require(
    bool(host) and port.isdecimal(),
    f"--coordinator={coordinator!r}: expected HOST:PORT",
  )
  return host, int(port)


def gather(value: Any) -> list[Any]:
  """Every process's JSON value, in their order; all of them call it."""
  if jax.process_count() == 1:
    return [value]
  own = np.frombuffer(json.dumps(value).encode(), np.uint8)
  sizes = multihost_utils.process_allgather(np.asarray([own.size])).ravel()
  padded = np.pad(own, (0, int(sizes.max()) - own.size))
  rows = np.asarray(multihost_utils.process_allgather(padded))
  return [
    json.loads(row[:size].tobytes())
    for row, size in zip(rows, sizes, strict=True)
  ]


def broadcast_from_host0(value: Any) -> Any:
  """Process 0's JSON value; all processes call it."""
  return gather(value if jax.process_index() == 0 else None)[0]


def on_host0(function: Callable[[], Any]) -> Any:
  """Process 0's value of a function, a JSON one; all processes call it.

  All of them raise the ValueError that it raises.
  """
  result = raised = None
  if jax.process_index() == 0:
    try:
      result = {"value": function()}
    except ValueError as error:
      result, raised = {"error": str(error)}, error
  result = broadcast_from_host0(result)
  if "error" in result:
    raise raised or ValueError(result["error"])
  return result["value"]


def assert_same_config(config: ml_collections.ConfigDict) -> None:
  """Checks that all processes have the same configuration.

  Raises:
    ValueError: configurations, versions of the code or of jax, numbers of
      devices or clocks that differ, named with the processes.
  """
  if jax.process_count() == 1:
    return
  digest = hashlib.sha256()
  for path in sorted(_PACKAGE.rglob("*.py")):
    digest.update(path.relative_to(_PACKAGE).as_posix().encode())
    digest.update(path.read_bytes())
  values = flatten_dict(json.loads(config.to_json()), sep=".")
  same = {f"config.{key}": value for key, value in values.items()}
  same["code"], same["jax"] = digest.hexdigest()[:12], jax.__version__
  same["local devices"] = jax.local_device_count()
  own = {"time": time.time(), "host": socket.gethostname(), "same": same}
  lead, *others = gather(own)
  for number, other in enumerate(others, 1):
    who = f"process {number} ({other['host']}) and process 0 ({lead['host']})"
    for name in sorted(lead["same"].keys() | other["same"].keys()):
      a, b = other["same"].get(name), lead["same"].get(name)
      require(a == b, f"{who} differ in {name}: {a!r} and {b!r}")
    apart = other["time"] - lead["time"]
    require(
      abs(apart) <= _CLOCKS_APART,
      f"{who} have clocks that are {apart:+.0f} s apart: expected at most "
      f"{_CLOCKS_APART:.0f}",
    )
