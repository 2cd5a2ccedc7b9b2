r"""Times whole training steps, with funnels and without, and their memory.

  python eval.py --config=configs/eval_training.py
  python eval.py --config=configs/eval_training.py:gemma2_2b \
    --config.pretrain.model.num_layers=8 --config.pretrain.length=4096

After the colon comes a preset. Expect the funnel to save nearly what it saves in
FLOPs, and a loss in chunks to take as long as a whole one, with less memory.
"""

import pathlib
import runpy

import ml_collections
from ml_collections import config_dict

from gemma_funnel.config import TransformerConfig


def get_config(preset: str = "bench") -> ml_collections.ConfigDict:
  """The configuration of a preset of GemmaConfig."""
  path = pathlib.Path(__file__).with_name("quickstart.py")
  pretrain = runpy.run_path(str(path))["get_config"]()
  pretrain.model.update(TransformerConfig.preset(preset).to_dict())
  pretrain.update(batch_size=4, length=512)
  return config_dict.create(
    evaluator="training",
    # What train.py would be given; its funnel, loss_chunk and remat are unused.
    pretrain=pretrain,
    funnels=("start=2,stride=2",),
    # Positions of a row that have logits at one time; 0 is all. The first of
    # these, and of remats, is what the others are compared with.
    loss_chunks=(128, 0),
    remats=("none",),
    # What would need more memory is not run; unset is what there is.
    memory_limit_gib=config_dict.placeholder(float),
    warmup=1,
    repeats=5,
    seed=0,
    out="runs/training",
  )
