r"""The study of funnels on real tasks; they are read from a folder.

  GEMMA_FUNNEL_DATA=DATA \
    python -m gemma_funnel.study --config=configs/ablation.py

DATA holds lm/ (English text to pretrain on, and wikitext2/), ner/wnut17/,
ner/sec_filings/, cls/banking77/, cls/stsb_open/ and gen/blimp/; docs/study.md says
where each is from. It takes about two hours on two CPU cores. Expect what
docs/study.md says.
"""

import os
import pathlib
import runpy

import ml_collections

from gemma_funnel import tasks

_DATA = os.environ.get("GEMMA_FUNNEL_DATA", "data")


def _path(*names: str) -> str:
  return ",".join(os.path.join(_DATA, name) for name in names)


def _task(preset: str = "table", tune=None, **values):
  """A task, and what fine-tuning on it has otherwise than `finetune`."""
  task = tasks.preset(preset)
  task.update(values)
  return dict(task=task, tune=tune or {})


def get_config() -> ml_collections.ConfigDict:
  """The configuration of a study."""
  quick = pathlib.Path(__file__).with_name("ablation_quick.py")
  config = runpy.run_path(str(quick))["get_config"]()
  config.workdir = "runs/ablation"
  config.title = "What a funnel costs and saves"
  config.models.small.update(
    vocab_size=4096,
    embed_dim=128,
    mlp_dim=512,
    head_dim=32,
    query_pre_attn_scalar=32.0,
  )
  config.pretrain.update(steps=700, batch_size=16, length=128)
  config.pretrain.data.source = _path(
    "lm/middlemarch.txt",
    "lm/war_and_peace.txt",
    "lm/tiny_shakespeare.txt",
    "lm/wikitext2/test.txt",
  )
  config.pretrain.optimizer.update(learning_rate=4e-3, warmup_steps=50)
  config.latency.repeats = 21
  config.switch_step, config.distill_steps = 350, 90
  config.finetune.update(epochs=3.0, batch_size=16, length=48)
  config.finetune.optimizer.update(learning_rate=1.5e-3, warmup_steps=20)
  config.tasks = dict(
    wnut17=_task(
      "conll",
      train=_path("ner/wnut17/train.conll"),
      max_train=1200,
      dev=_path("ner/wnut17/dev.conll"),
      max_dev=200,
      test=_path("ner/wnut17/test.conll"),
      max_test=800,
    ),
    sec_filings=_task(
      "conll",
      train=_path("ner/sec_filings/train_FIN5.conll"),
      max_dev=100,
      test=_path("ner/sec_filings/test_FIN3.conll"),
      tag_column=3,
      tune=dict(epochs=4.0, length=64),
    ),
    banking77=_task(
      kind="classification",
      text="text",
      label="label",
      train=_path("cls/banking77/train.tsv"),
      max_train=1600,
      max_dev=200,
      test=_path("cls/banking77/test.tsv"),
      max_test=800,
      tune=dict(epochs=4.0),
    ),
    stsb=_task(
      kind="regression",
      text="sentence1",
      second="sentence2",
      label="score",
      train=_path("cls/stsb_open/train.tsv"),
      max_train=1200,
      dev=_path("cls/stsb_open/dev.tsv"),
      max_dev=200,
      test=_path("cls/stsb_open/test.tsv"),
    ),
    blimp=_task("blimp", test=_path("gen/blimp/blimp.jsonl"), max_test=1005),
    wikitext=_task(
      kind="perplexity",
      test=_path("lm/wikitext2/valid.txt"),
      documents="line",
      max_test=200,
    ),
  )
  config.axes.update(
    pretraining=("standard", "aware", "sampled", "distilled"),
    finetuning=("off", "on", "sampled"),
    start=(1, 3),
    task=tuple(config.tasks),
  )
  config.exclude = (
    # What is fine-tuned with a funnel is measured with it, or with any.
    "finetuning=on,inference=off",
    "pretraining=standard,finetuning=sampled",
    "pretraining=aware,finetuning=off",
    "pretraining=aware,finetuning=sampled",
    "pretraining=sampled,finetuning=on",
    "pretraining=sampled,finetuning=off",
    # Distillation is of next tokens: tasks of those alone.
    "pretraining=distilled,finetuning=off",
    "pretraining=distilled,finetuning=on",
    "pretraining=distilled,finetuning=sampled",
    # Recoveries are compared where most is at stake: early.
    "finetuning=on,start=3,recover=add",
    "finetuning=on,start=3,recover=repeat",
    "pretraining=aware,start=3,recover=add",
    "pretraining=aware,start=3,recover=repeat",
    "pretraining=distilled,start=3,recover=add",
    "pretraining=distilled,start=3,recover=repeat",
    # Hardly learnable at this size.
    "task=wnut17,seed=1",
  )
  return config
