"""Saving a run's checkpoints, removing old ones, and restoring one whole.

A checkpoint holds parameters, optimizer, data iterator, step and config; see
`convert.run` for the folder. Orbax writes asynchronously, each process its own
part, and makes a checkpoint visible when it is complete. Before that the headers
of all arrays are read back, and sums of its files are written, which are checked
before it is read.
"""

import json
import os
from typing import Any

import jax
import ml_collections
import numpy as np

from gemma_funnel.convert.orbax_tree import OrbaxTree
from gemma_funnel.convert.run import (
  FOLDER,
  find_intact,
  path_of,
  steps_in,
  write_sums,
)
from gemma_funnel.convert.tensor_io import Header
from gemma_funnel.parallel import processes


def _headers(tree: Any) -> dict[str, Header]:
  """The arrays of a tree, as `OrbaxTree` names them."""
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {
    ".".join(jax.tree_util.keystr((key,), simple=True) for key in path): Header(
      tuple(leaf.shape), np.dtype(leaf.dtype)
    )
    for path, leaf in leaves
  }


class Checkpoints:
  """The checkpoints of one run, written asynchronously."""

  def __init__(
    self,
    workdir: str | os.PathLike,
    keep: int | None = None,
    keep_best: int = 0,
    keep_period: int | None = None,
  ):
    """Opens the run in `workdir`; `keep` is as in `LoopSpec`, None is all."""
    import orbax.checkpoint as ocp

    self._ocp = ocp
    self._workdir = workdir
    self._folder = path_of(workdir) / FOLDER
    self._saving, self._expected = None, {}
    policies = ocp.checkpoint_managers
    kept = [policies.LatestN(keep)]
    if keep_best:
      kept.append(
        policies.BestN(
          get_metric_fn=lambda metrics: metrics["loss"],
          reverse=True,
          n=keep_best,
          keep_checkpoints_without_metrics=False,
        )
      )
    if keep_period:
      kept.append(policies.EveryNSteps(keep_period))
    self._manager = ocp.CheckpointManager(
      self._folder,
      options=ocp.CheckpointManagerOptions(
        preservation_policy=policies.AnyPreservationPolicy(kept),
        cleanup_tmp_directories=True,  # Of a save that was killed.
        enable_async_checkpointing=True,
        # Called when the files are complete and not yet renamed.
        async_options=ocp.AsyncOptions(post_finalization_callback=self._finish),
      ),
    )

  def __enter__(self) -> "Checkpoints":
    return self

  def __exit__(self, *_) -> None:
    self._manager.close()

  def latest(self) -> int | None:
    """The newest checkpoint's step; None if there is none."""
    return max(steps_in(self._folder), default=None)

  def save(
    self,
    step: int,
    trees: dict[str, Any],
    progress: dict[str, Any],
    config: ml_collections.ConfigDict,
    loss: float | None = None,
  ) -> None:
    """Starts writing a checkpoint, unless `step` has one; returns early.

    Args:
      step: how many steps have been taken.
      trees: of arrays, by name: "params", "opt_state" and others.
      progress: where the run and its data are; JSON, the same in all processes.
      config: the run's.
      loss: held out, if it has just been measured.
    """
    if step in steps_in(self._folder):
      return
    self.wait()  # The sums of the one before are then written.
    self._saving = step
    self._expected = {name: _headers(tree) for name, tree in trees.items()}
    args = self._ocp.args
    self._manager.save(
      step,
      args=args.Composite(
        **{name: args.StandardSave(tree) for name, tree in trees.items()},
        progress=args.JsonSave(progress),
        config=args.JsonSave(json.loads(config.to_json())),
      ),
      metrics=None if loss is None else {"loss": loss},
    )

  def wait(self) -> None:
    """Returns when all that was saved is complete on disk."""
    self._manager.wait_until_finished()

  def _finish(self) -> None:
    """Says that a checkpoint is whole, when it can be read."""
    (folder,) = (
      path
      for path in self._folder.iterdir()
      if path.name.split(".orbax-checkpoint-tmp")[0] == str(self._saving)
    )
    for name, expected in self._expected.items():
      found = OrbaxTree(folder / name).tensors
      wrong = sorted(
        key
        for key in found.keys() | expected.keys()
        if found.get(key) != expected.get(key)
      )
      if wrong:
        raise ValueError(
          f"{folder / name} is not what was saved: {wrong[0]} is there as "
          f"{found.get(wrong[0])}, expected {expected.get(wrong[0])}"
        )
    write_sums(folder)

  def restore(self, trees: dict[str, Any]):
    """Reads the newest checkpoint whose files are as they were written.

    Newer ones are renamed, so that their steps can be saved again, and named
    in a line each.

    Args:
      trees: as for `save`, of ShapeDtypeStructs with shardings, of any mesh.

    Returns:
      (step, trees, progress). ValueError where all of them are damaged.
    """
    step, damaged = find_intact(self._workdir)
    if damaged:
      if jax.process_index() == 0:
        for broken in damaged:
          number, name = 0, f"{broken}.damaged"
          while (target := self._folder / f"{name}{number or ''}").exists():
            number += 1
          (self._folder / str(broken)).rename(target)
      processes.broadcast_from_host0(None)  # All wait for process 0.
      self._manager.reload()
    args = self._ocp.args
    restored = self._manager.restore(
      step,
      args=args.Composite(
        **{name: args.StandardRestore(tree) for name, tree in trees.items()},
        progress=args.JsonRestore(),
      ),
    )
    found = {name: restored[name] for name in trees}
    return step, found, restored["progress"]
