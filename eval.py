"""Evaluates: python eval.py --config=configs/eval_latency.py (or another)."""

from gemma_funnel import cli, evaluation

if __name__ == "__main__":
  cli.main(evaluation.run)
