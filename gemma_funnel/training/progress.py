"""What a run tells while it goes: lines, metrics.jsonl, TensorBoard."""

from collections.abc import Mapping
import json
import os
import pathlib
import time

import jax
import ml_collections


class Metrics:
  """Progress on the terminal; metrics as JSON lines and for TensorBoard."""

  def __init__(
    self, config: ml_collections.ConfigDict, step: int, num_steps: int
  ):
    """Opens the metrics of a run.

    Args:
      config: `workdir`, `log_every` and `tensorboard` of the run.
      step: steps taken so far; what is written of later ones is dropped.
      num_steps: steps the run has in all.
    """
    self._config, self._num_steps = config, num_steps
    self._first = self._last = (step, time.monotonic())
    self._slots = 0
    self._path = pathlib.Path(config.workdir) / "metrics.jsonl"
    self._board = None
    if jax.process_index() == 0:
      _keep_until(self._path, step)
      if config.tensorboard:
        import tensorboardX

        self._board = tensorboardX.SummaryWriter(
          os.path.join(config.workdir, "tensorboard"), purge_step=step + 1
        )

  def __enter__(self) -> "Metrics":
    return self

  def __exit__(self, *_) -> None:
    if self._board:
      self._board.close()

  def trained(self, step: int, values: Mapping[str, float], slots: int) -> None:
    """Takes the metrics of a step; tells of every `log_every`-th.

    Args:
      step: its number, from 1.
      values: "loss", "learning_rate" and "grad_norm", and any others.
      slots: tokens of its batch, padding included.
    """
    self._write(step, "train", values)
    self._slots += slots
    if step % self._config.log_every and step != self._num_steps:
      return
    now = time.monotonic()
    seconds, slots = now - self._last[1], self._slots
    self._last, self._slots = (step, now), 0
    left = self._num_steps - step
    mean_seconds = (now - self._first[1]) / (step - self._first[0])
    self._say(
      step,
      f"loss {values['loss']:.4f}  lr {values['learning_rate']:.2e}  "
      f"grad {values['grad_norm']:.2f}  "
      f"{slots / max(seconds, 1e-9):,.0f} tokens/s  "
      f"ETA {duration(left * mean_seconds)}",
    )

  def evaluated(self, step: int, values: Mapping[str, float]) -> None:
    """Takes held-out metrics, and tells of them."""
    self._write(step, "heldout", values)
    told = "  ".join(
      f"{name.replace('_', ' ')} {value:.4f}"
      for name, value in values.items()
      if isinstance(value, float)
    )
    self._say(step, f"held out: {told}")

  def _say(self, step: int, text: str) -> None:
    if jax.process_index() == 0:
      print(f"step {step}/{self._num_steps}  {text}", flush=True)

  def _write(self, step: int, kind: str, values: Mapping[str, float]) -> None:
    if jax.process_index() != 0:
      return
    with self._path.open("a") as f:
      f.write(json.dumps({"step": step, "kind": kind, **values}) + "\n")
    if self._board:
      for name, value in values.items():
        if value is not None:
          self._board.add_scalar(f"{kind}/{name}", value, step)


def _keep_until(path: pathlib.Path, step: int) -> None:
  """Drops the lines of steps that are about to be taken again."""
  if not path.exists():
    return
  kept = []
  for line in path.read_text().splitlines():
    try:
      if json.loads(line)["step"] <= step:
        kept.append(line + "\n")
    except json.JSONDecodeError:
      continue  # A line cut short by a kill.
  temporary = path.with_suffix(".tmp")
  temporary.write_text("".join(kept))
  os.replace(temporary, path)


def duration(seconds: float) -> str:
  """Such as "3m07s"."""
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{seconds:02}s"
