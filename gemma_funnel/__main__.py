"""Commands of gemma-funnel; each tells more with --help.

From the folder of the repository:
  python train.py       trains on text, or fine-tunes on a task
  python eval.py        measures: loss, latency, training time, a task
  python tpu/plan.py    memory and time of a training step on TPUs

From anywhere:
  python -m gemma_funnel.generate            continues prompts
  python -m gemma_funnel.convert             converts checkpoints
  python -m gemma_funnel.data.tokenize       tokenizes a corpus for many runs
  python -m gemma_funnel.study               a grid of trainings, compared
  python -m gemma_funnel.study.calibrate     fits recover=affine on a text
  python -m gemma_funnel.evaluation.harness  tasks of lm-evaluation-harness
"""

import sys

from gemma_funnel import cli


def _run() -> int:
  parser = cli.Parser(prog="python -m gemma_funnel", description=__doc__)
  parser.parse_args()
  parser.print_help()
  return 0


if __name__ == "__main__":
  sys.exit(cli.guard(_run))
