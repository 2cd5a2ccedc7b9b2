"""What a funnel costs and saves: `python eval.py --config=configs/eval_*.py`.

Evaluators: `latency`, times against the same code with the funnel off;
`training`, those of whole training steps; `accuracy`, the loss on held-out text;
`task`, answers to a task; `damage`, untrained funnels beside layers left out. Each writes a table, JSON and a plot.
"""

import importlib
from typing import Any

from gemma_funnel.checks import require, require_choice

# An evaluator is imported when it is asked for: latency needs no grain.
_MODULES = {
  "accuracy": "accuracy",
  "damage": "damage",
  "latency": "latency",
  "task": "generative",
  "training": "training",
}


def run(config: Any) -> list[dict[str, Any]]:
  """Runs the evaluator that a configuration names, as configs/eval_*.py do.

  Returns:
    The rows of the evaluator's table.

  Raises:
    ValueError: no such evaluator, a missing key, or a value out of range.
  """
  name = config.get("evaluator")
  require_choice("evaluator", name, list(_MODULES))
  evaluator = importlib.import_module(f"{__name__}.{_MODULES[name]}")
  missing = [key for key in evaluator.KEYS if key not in config]
  require(not missing, f"the configuration lacks {missing}")
  return evaluator.run(config)
