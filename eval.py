"""Evaluates: python eval.py --config=configs/eval_latency.py (or another)."""

from gemma_funnel import cli


def _run(config):
  from gemma_funnel import evaluation  # It imports jax.

  evaluation.run(config)


if __name__ == "__main__":
  cli.main(_run, "eval.py")
