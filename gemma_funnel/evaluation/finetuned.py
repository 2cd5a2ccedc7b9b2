"""Fine-tuning over several seeds, measured with several funnels."""

from collections.abc import Sequence
import os
import statistics
from typing import Any

import jax
import ml_collections

from gemma_funnel import flops, tasks
from gemma_funnel.config import format_funnel
from gemma_funnel.evaluation import funnels as funnels_lib
from gemma_funnel.evaluation import plots, report
from gemma_funnel.tasks.task import Task
from gemma_funnel.training import finetune

TRAINED = "trained"
Row = dict[str, Any]


def run(config: ml_collections.ConfigDict) -> list[Row] | None:
  """Fine-tunes each seed of `config` and measures them on the test split.

  Writes task.json, .md and .png to `config.workdir`, whose folders seed_N are
  the runs. The same call goes on where it was interrupted.

  Args:
    config: as in configs/finetune.py.

  Returns:
    A row for each funnel: means over seeds by the metrics' names, with `spread`
    (standard deviation of the main one), `value`, its mean, and `seeds`. None
    if a SIGTERM ended it early.

  Raises:
    ValueError, FloatingPointError: see `finetune.make_setup` and `train`.
  """
  if not config.seeds or isinstance(config.seeds, int):
    raise ValueError(f"seeds={config.seeds!r}: expected such as (0, 1, 2)")
  task = tasks.load(config.task)
  # All that can be wrong of a seed is found before the first is trained.
  setups = [finetune.make_setup(of_seed(config, s), task) for s in config.seeds]
  measured = []
  for setup in setups:
    result = finetune.train(setup)
    if not result.finished:
      return None
    measured.append(measure(setup, result.encoder, config.eval_funnels))
  rows = [_over_seeds(same) for same in zip(*measured, strict=True)]
  if jax.process_index() == 0:
    _report(config, setups[0], task, rows)
  return rows


def of_seed(config: ml_collections.ConfigDict, seed: int):
  """The configuration of the run of one seed."""
  config = config.copy_and_resolve_references()
  with config.unlocked():
    config.seed = seed
    config.workdir = os.path.join(config.workdir, f"seed_{seed}")
    del config.seeds, config.eval_funnels
  return config


def measure(
  setup: finetune.Setup, encoder, funnels: Sequence[str]
) -> list[Row]:
  """Test metrics of an encoder with its own funnel, and with others."""
  own = setup.funnels.funnel
  named = funnels_lib.resolve(
    (TRAINED, *funnels), setup.model_config.num_layers, {TRAINED: own}
  )
  config, rows = setup.config, []
  for name, stages in named.items():
    found = finetune.measure(
      encoder.with_funnel(stages), setup.task, "test", setup.rows["test"],
      batch_size=config.batch_size, length=config.length,
    )  # fmt: skip
    rows.append(
      {
        "funnel": name,
        "resolved": format_funnel(stages),
        **found,
        "ideal_reduction": flops.ideal_reduction(
          setup.model_config, stages, 1, config.length, head=False,
          causal=config.causal,
        ),
      }
    )  # fmt: skip
  return rows


def _over_seeds(rows: Sequence[Row]) -> Row:
  first = rows[0]
  mean = dict(first)
  for name, value in first.items():
    if isinstance(value, float):
      values = [row[name] for row in rows]
      defined = [v for v in values if v is not None]
      mean[name] = statistics.fmean(defined) if defined else None
  return mean | {"seeds": len(rows), "of_seeds": list(rows)}


def _report(config, setup: finetune.Setup, task: Task, rows) -> None:
  main = task.metrics[0]
  for row in rows:
    values = [r[main] for r in row["of_seeds"] if r[main] is not None]
    row["value"], row["metric"] = row[main], main
    if len(values) > 1:
      row["spread"] = statistics.stdev(values)
  columns = [
    report.Column("funnel", "funnel"),
    report.Column("resolved", "in full"),
    *(report.Column(name, f"{name} %", ".2f", 100) for name in task.metrics),
    report.Column("spread", f"deviation of {main} %", ".2f", 100),
    report.Column("seeds", "seeds", "d"),
    report.Column("ideal_reduction", "FLOPs saved %", ".1f", 100),
  ]
  counts = ", ".join(f"{len(task.splits[s])} {s}" for s in task.splits)
  skipped = sum(task.skipped.values())
  report.write(
      config.workdir, "task", rows, columns, f"{task.name}: test split",
      plots.task, settings={"config": config.to_dict()},
      notes=[
          f"{counts} examples, {skipped} malformed rows left out. FLOPs of the "
          f"trunk at {setup.config.length} tokens."
      ],
  )  # fmt: skip
