r"""The study of funnels, small: what they cost and save, and what helps.

  python -m gemma_funnel.study --config=configs/ablation_quick.py
  python -m gemma_funnel.study --config=configs/ablation_quick.py \
    --dry-run

On two CPU cores it takes under 20 minutes, offline, and ends with tables, plots
and report.html in its folder. Interrupted, the same command goes on. Expect
every recovery to lose little on the task of whole texts, more on the one of
tokens, and "repeat" to lose most there.
"""

import pathlib
import runpy

import ml_collections
from ml_collections import config_dict

from gemma_funnel import tasks
from gemma_funnel.study import grid


def sibling(name: str) -> ml_collections.ConfigDict:
  """The configuration of another file of this folder."""
  path = pathlib.Path(__file__).with_name(f"{name}.py")
  return runpy.run_path(str(path))["get_config"]()


def get_config() -> ml_collections.ConfigDict:
  """The configuration of a study."""
  pretrain = sibling("quickstart")
  model = pretrain.model
  model.update(
    vocab_size=1024,
    num_layers=6,
    embed_dim=64,
    mlp_dim=256,
    head_dim=16,
    query_pre_attn_scalar=16.0,
    window=64,
    max_length=512,
    # A third less time for a step of so small a model.
    scan_layers=False,
  )
  pretrain.update(steps=50, batch_size=16, length=128, tensorboard=False)
  pretrain.optimizer.update(learning_rate=6e-3, warmup_steps=10)
  pretrain.update(log_every=50, eval_every=10_000, checkpoint_every=10_000)
  finetune = sibling("finetune")
  finetune.update(epochs=3.0, batch_size=32, length=64, tensorboard=False)
  finetune.optimizer.update(learning_rate=2e-3, warmup_steps=5)
  finetune.log_every = 1000
  studied = {}
  for name in ("code_tags", "code_packages"):
    task = tasks.preset(name)
    task.update(max_train=320, max_dev=64, max_test=300)
    # What fine-tuning on this task has otherwise than `finetune`.
    studied[name] = dict(task=task, tune=dict())
  return config_dict.create(
    workdir="runs/ablation_quick",
    title="What a funnel costs and saves (quick study)",
    # Every combination is a cell. "standard" pretraining has no funnel; "aware"
    # has the cell's, "switched" from switch_step on; "sampled" draws one of all
    # of them (and none) each step; "distilled" goes on from "standard" for
    # distill_steps, into the cell's. A stop of None is the depth; there, "add"
    # would be "average" but for a factor, which the final norm removes.
    axes=dict(
      model=("small",),
      pretraining=("standard", "aware"),
      finetuning=("off", "on"),
      inference=("off", "on"),
      start=(1, 2, 3),
      stop=(5,),
      stride=(2,),
      reduce=("mean",),
      recover=("average", "add", "repeat"),
      task=("code_tags", "code_packages"),
      seed=(0, 1),
    ),
    # Combinations to leave out.
    exclude=("pretraining=aware,finetuning=off", "finetuning=on,inference=off"),
    models=dict(small=model.to_dict()),
    tasks=studied,
    pretrain=grid.training_keys(pretrain, "pretrain"),
    switch_step=25,
    distill_steps=20,
    finetune=grid.training_keys(finetune, "finetune"),
    # How tasks that a language model answers by itself are put.
    generative=dict(split="test", batch_size=16, few_shot=0, max_new_tokens=64),
    # What each funnel saves here; 0 repeats is none.
    latency=dict(batch_size=8, length=256, repeats=5),
    # Held-out rows that show how states move by depth; 0 is none.
    similarity=dict(rows=8, length=128),
    # Whether fine-tuned runs are kept when they have been measured.
    keep_finetuned=False,
    # Whether cells that failed before are run again.
    retry=False,
    # Whether to print the grid and end there.
    dry_run=False,
  )
