"""Metrics of a run: lines, metrics.jsonl, TensorBoard, Weights & Biases."""

from collections.abc import Iterator, Mapping
import contextlib
import importlib
import json
import math
import os
import secrets
import tempfile
import time
import types
from typing import Any

from etils import epath
import jax

from gemma_funnel import atomic, buckets, cli, inputs
from gemma_funnel.parallel.hardware import chip_of
from gemma_funnel.training import workdir
from gemma_funnel.training.spec import RunSpec

# Of metrics.jsonl: ten million steps have 2 GB.
_MAX_BYTES = 8 << 30


def _wandb_id(folder: str, step: int) -> str:
  """The run's id in Weights & Biases, kept in its folder.

  A run that is begun again is another one there too.
  """
  path = workdir.path_of(folder) / "wandb_id"
  if not path.exists():
    id_ = secrets.token_hex(4)
    if step:  # Of version 0.1, whose ids were made of paths.
      id_ = folder.strip("/").replace("/", "-").replace(":", "")
    atomic.write_text(path, id_)
  return inputs.read_bytes(path, 200).decode()


def import_wandb(project: str) -> types.ModuleType:
  """The package that logs to a project; raises ValueError without it."""
  try:
    return importlib.import_module("wandb")
  except ImportError as error:
    raise ValueError(
      f"wandb={project!r} needs the package wandb; expected "
      "pip install 'gemma-funnel[wandb]'"
    ) from error


class MetricWriter:
  """Progress on the terminal; metrics as JSON lines and for dashboards.

  metrics.jsonl has a line for each step ("kind": "train"), one for each line of
  progress ("speed"), and one for each evaluation ("heldout").
  """

  def __init__(self, spec: RunSpec, step: int, clock: Mapping[str, float] = {}):
    """Opens the metrics of a run, and drops what is written of later steps."""
    self._spec, self._loop = spec, spec.loop
    self._last: tuple[int, float] | None = None
    self._slots, self._flops, self._away = 0, 0.0, 0.0
    # Seconds, all in all, of steps that are part of the run.
    self._productive = clock.get("productive_s", 0.0)
    self._started = clock.get("started", time.time())
    self._devices = list(spec.mesh.devices.flat)
    self._leads = jax.process_index() == 0
    self._board = self._wandb = None
    self._tracing = False
    if self._leads:
      self._lines = _Lines(workdir.path_of(spec.workdir), step)
      self._open_boards(step)

  def _open_boards(self, step: int) -> None:
    spec, project = self._spec, self._loop.wandb
    if self._loop.tensorboard:
      import tensorboardX

      self._board = tensorboardX.SummaryWriter(
        os.path.join(spec.workdir, "tensorboard"), purge_step=step + 1
      )
    if project:
      self._wandb = import_wandb(project).init(
        project=project,
        id=_wandb_id(spec.workdir, step),
        resume="allow",
        config=json.loads(spec.config.to_json()),
      )

  def __enter__(self) -> "MetricWriter":
    return self

  def __exit__(self, *_) -> None:
    if self._tracing:
      jax.profiler.stop_trace()
    if self._leads:
      self._lines.flush()
    if self._board:
      self._board.close()
    if self._wandb:
      self._wandb.finish()

  def clock(self) -> dict[str, float]:
    """Seconds to go on counting from in a later call."""
    if self._leads:
      self._lines.flush()
    return {"started": self._started, "productive_s": self._productive}

  def trace(self, step: int) -> None:
    """Begins or ends a trace of `profile_steps`, before `step` is taken."""
    traced = self._loop.profile_steps
    if not traced or not self._leads:
      return
    if step == traced[0]:
      folder = os.path.join(self._spec.workdir, "profile")
      jax.profiler.start_trace(folder)
      self._tracing = True
      self._print(step, f"tracing to step {traced[1]}, into {folder}")
    elif self._tracing and step > traced[1]:
      jax.profiler.stop_trace()
      self._tracing = False

  @contextlib.contextmanager
  def elsewhere(self) -> Iterator[None]:
    """Leaves the block's seconds out of rates: an evaluation, a checkpoint."""
    start = time.monotonic()
    yield
    self._away += time.monotonic() - start

  def trained(
    self,
    step: int,
    values: Mapping[str, float],
    slots: int,
    flops: float | None = None,
  ) -> None:
    """Writes the metrics of a step, and prints every `log_every`-th.

    `slots` counts padding too; `flops` are of all devices, None is not known.
    """
    self._write(step, "train", values)
    now = time.monotonic()
    if self._last is None:
      self._restart(step, now)  # A first step compiles.
    else:
      self._slots += slots
      self._flops += flops if flops is not None else math.nan
    if step % self._loop.log_every and step != self._spec.steps:
      return
    line = f"loss {values['loss']:.4f}  lr {values['learning_rate']:.2e}  "
    line += f"grad {values['grad_norm']:.2f}"
    if step > self._last[0]:
      line += self._speed(step, now)
    self._print(step, line)

  def _restart(self, step: int, now: float) -> None:
    self._last, self._slots, self._flops = (step, now), 0, 0.0
    self._away = 0.0

  def _speed(self, step: int, now: float) -> str:
    """Writes and formats the rates since the last line."""
    seconds = max(now - self._last[1] - self._away, 1e-9)
    self._productive += seconds
    values = {
      "tokens_per_s": self._slots / seconds,
      "step_s": seconds / (step - self._last[0]),
      "goodput": self._productive / max(time.time() - self._started, 1e-9),
    }
    line = f"  {values['tokens_per_s']:,.0f} tokens/s"
    chip = chip_of(self._devices[0])
    if chip and math.isfinite(self._flops):
      peak = chip.flops * len(self._devices)
      values["mfu"] = self._flops / seconds / peak
      line += f"  MFU {values['mfu']:.1%}"
    stats = self._devices[0].memory_stats() if chip else None
    if stats and "peak_bytes_in_use" in stats:
      values["peak_bytes"] = stats["peak_bytes_in_use"]
      line += f"  {values['peak_bytes'] / 2**30:.1f} GiB"
    self._write(step, "speed", values)
    left = (self._spec.steps - step) * values["step_s"]
    self._restart(step, now)
    return line + f"  ETA {duration(left)}"

  def rewind(self, step: int) -> None:
    """Drops what was written of steps after `step`."""
    if self._leads:
      self._lines.keep_until(step)
    self._restart(step, time.monotonic())

  def evaluated(self, step: int, values: Mapping[str, float]) -> None:
    """Writes and prints held-out metrics."""
    self._write(step, "heldout", values)
    metrics = "  ".join(
      f"{name.replace('_', ' ')} {value:.4f}"
      for name, value in values.items()
      if isinstance(value, float)
    )
    self._print(step, f"held out: {metrics}")

  def _print(self, step: int, text: str) -> None:
    if self._leads:
      cli.tell(f"step {step}/{self._spec.steps}  {text}")

  def _write(self, step: int, kind: str, values: Mapping[str, Any]) -> None:
    if not self._leads:
      return
    self._lines.add({"step": step, "kind": kind, **values})
    known = {name: x for name, x in values.items() if x is not None}
    if self._board:
      for name, value in known.items():
        self._board.add_scalar(f"{kind}/{name}", value, step)
    if self._wandb:
      named = {f"{kind}/{name}": value for name, value in known.items()}
      self._wandb.log(named, step=step)


class _Lines:
  """metrics.jsonl of a run's folder.

  A bucket's files cannot be added to: there the file is kept here, and copied
  whole when it is flushed.
  """

  def __init__(self, folder: epath.Path, step: int):
    self._path, self._remote = folder / "metrics.jsonl", None
    if buckets.is_remote(folder):
      self._remote = self._path
      temporary = tempfile.mkdtemp(prefix="gemma_funnel_")
      self._path = epath.Path(temporary) / "metrics.jsonl"
      if self._remote.exists():
        self._path.write_text(self._remote.read_text())
    self.keep_until(step)

  def add(self, entry: Mapping[str, Any]) -> None:
    # JSON has no numbers that are not finite.
    is_odd = lambda x: isinstance(x, float) and not math.isfinite(x)
    entry = {k: None if is_odd(x) else x for k, x in entry.items()}
    with self._path.open("a") as f:
      f.write(json.dumps(entry) + "\n")

  def flush(self) -> None:
    if self._remote is not None and self._path.exists():
      self._remote.write_text(self._path.read_text())

  def keep_until(self, step: int) -> None:
    """Drops the lines of later steps, and those that are none of ours."""
    if not self._path.exists():
      return

    def tell(number: int, fault: str) -> None:
      cli.say(f"{self._path}, line {number} is dropped: {fault}")

    def fault(entry: dict[str, Any]) -> str | None:
      found = entry.get("step")
      return None if type(found) is int else f"step={found!r}: expected an int"

    content = inputs.read_bytes(self._path, _MAX_BYTES)
    entries = inputs.parse_json_lines(content, tell, fault)
    kept = [json.dumps(x) + "\n" for x in entries if x["step"] <= step]
    atomic.write_text(self._path, "".join(kept))


def duration(seconds: float) -> str:
  """Such as "3m07s"."""
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{seconds:02}s"
