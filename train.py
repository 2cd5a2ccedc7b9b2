"""Trains a model: python train.py --config=configs/quickstart.py"""

from gemma_funnel import cli, experiment

if __name__ == "__main__":
  cli.main(experiment.run)
