"""The study: what funnels cost and save, as one grid of trainings.

  python -m gemma_funnel.study --config=configs/ablation_quick.py

The same command resumes a study that was interrupted; --dry-run prints the
grid and how long it will take, and ends there. A key of the configuration is
overridden by --config.KEY=VALUE. Axes of the grid, such as
--config.axes.stride='(2, 4)'; every combination of their values is a cell:

  model        names of models in the configuration
  pretraining  standard, aware, switched, sampled, distilled
  finetuning   off, on, sampled: the funnel then
  inference    off, on: the funnel then
  start, stop  the first layer of the stage, and the first after it (None: the
               model's depth)
  stride       slots a group, where the reducer has groups
  reduce       any registered reducer that can train; below
  recover      any registered recovery; below
  task         names of tasks in the configuration
  seed         of the fine-tuning
"""

import sys

from gemma_funnel import cli


def _run(config):
  from gemma_funnel.study import runner  # It imports jax.

  runner.run(config)


if __name__ == "__main__":
  sys.argv = ["--config.dry_run" if x == "--dry-run" else x for x in sys.argv]
  cli.main(_run, "-m gemma_funnel.study")
