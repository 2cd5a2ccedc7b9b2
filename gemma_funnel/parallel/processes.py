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
  peer = coordinator if process_id else None
  give_up = threading.Timer(timeout_s, _give_up, (what, timeout_s, peer))
  give_up.daemon = True
  give_up.start()
  try:
    # Longer than ours: jax ends the process in its own words when it is over.
    jax.distributed.initialize(
      *explicit, initialization_timeout=round(timeout_s) + 60
    )
  except (ValueError, RuntimeError) as error:
    raise ValueError(f"cannot join {what}: {error}") from error
  finally:
    give_up.cancel()


def _address(coordinator: str) -> tuple[str, int]:
  host, _, port = coordinator.rpartition(":")
  require(
    bool(host) and port.isdecimal(),
    f"--coordinator={coordinator!r}: expected HOST:PORT",
  )
  return host, int(port)


def _give_up(what: str, timeout_s: float, coordinator: str | None) -> None:
  why = "some of them have not come"
  if coordinator:
    try:
      socket.create_connection(_address(coordinator), timeout=2).close()
      why = "it answers, so other processes have not come"
    except OSError as error:
      why = f"process 0 is not there: {error}"
  print(
    f"error: waited {timeout_s:.0f} s for {what}: {why}",
    file=sys.stderr,
    flush=True,
  )
  os._exit(1)


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


def result_of(function: Callable[[], Any]) -> dict[str, Any]:
  """A function's value, or its ValueError's text, to be sent elsewhere."""
  try:
    return {"value": function()}
  except ValueError as error:
    return {"error": str(error)}


def value_of(result: dict[str, Any]) -> Any:
  """The value in a `result_of`; raises its ValueError."""
  if "error" in result:
    raise ValueError(result["error"])
  return result["value"]


def assert_same_config(config: ml_collections.ConfigDict) -> None:
  """Checks that all processes have the same configuration.

  Raises:
    ValueError: configurations, versions of the code or of jax, numbers of
      devices or clocks that differ, named with the processes.
  """
  if jax.process_count() == 1:
    return
  own = {
    "time": time.time(),
    "host": socket.gethostname(),
    "code": _code_digest(),
    "jax": jax.__version__,
    "local devices": jax.local_device_count(),
    "config": flatten_dict(json.loads(config.to_json()), sep="."),
  }
  everyone = gather(own)
  lead = everyone[0]
  for number, other in enumerate(everyone[1:], 1):
    who = f"process {number} ({other['host']}) and process 0 ({lead['host']})"
    keys = sorted(lead["config"].keys() | other["config"].keys())
    for key in keys:
      a, b = other["config"].get(key), lead["config"].get(key)
      require(a == b, f"{who} differ in config.{key}: {a!r} and {b!r}")
    for name in ("code", "jax", "local devices"):
      a, b = other[name], lead[name]
      require(a == b, f"{who} differ in {name}: {a} and {b}")
    apart = other["time"] - lead["time"]
    require(
      abs(apart) <= _CLOCKS_APART,
      f"{who} have clocks that are {apart:+.0f} s apart: expected at most "
      f"{_CLOCKS_APART:.0f}",
    )


def _code_digest() -> str:
  digest = hashlib.sha256()
  for path in sorted(_PACKAGE.rglob("*.py")):
    digest.update(path.relative_to(_PACKAGE).as_posix().encode())
    digest.update(path.read_bytes())
  return digest.hexdigest()[:12]
