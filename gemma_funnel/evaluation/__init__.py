"""What a funnel costs and saves: `python eval.py --config=configs/eval_*.py`.

`latency` measures time against the same code with the funnel off, `training`
that of whole training steps, `accuracy` the loss on held-out text, `task` what
the model answers, by itself or by its head, and `report` writes each as a table,
JSON and a plot.
"""

from typing import Any

_EVALUATORS = ("accuracy", "latency", "task", "training")


def run(config: Any) -> list[dict[str, Any]]:
  """Runs the evaluator that a configuration names.

  Args:
    config: a ConfigDict with a key `evaluator`, and that evaluator's other
      keys: see configs/eval_*.py.

  Returns:
    The rows of the evaluator's table.

  Raises:
    ValueError: no evaluator of that name, or a value that it cannot work with.
  """
  # An evaluator is imported when it is wanted: latency needs no grain.
  match config.get("evaluator"):
    case "accuracy":
      from gemma_funnel.evaluation import accuracy as evaluator
    case "latency":
      from gemma_funnel.evaluation import latency as evaluator
    case "task":
      from gemma_funnel.evaluation import generative as evaluator
    case "training":
      from gemma_funnel.evaluation import training as evaluator
    case other:
      raise ValueError(
        f"evaluator={other!r}: expected one of {list(_EVALUATORS)}"
      )
  return evaluator.run(config)
