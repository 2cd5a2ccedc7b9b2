"""Trains a model: python train.py --config=configs/quickstart.py"""

from gemma_funnel import cli


def _run(config):
  from gemma_funnel import experiment  # It imports jax.

  experiment.run(config)


if __name__ == "__main__":
  cli.main(_run, "train.py")
