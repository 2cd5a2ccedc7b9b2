"""A study small enough for tests: its tasks and configuration."""

import json
import pathlib
import random

import tiny_run

WORDS = ("apple", "house", "river", "stone", "cloud", "tiger", "chair", "paper")
ONE = "start=1,stop=2,stride=2,pool=mean,recover="


def write_tasks(folder: pathlib.Path) -> dict[str, dict]:
  """Files of a classification and of minimal pairs; keys of their configs."""
  draw = random.Random(0)
  for split, count in (("train", 24), ("dev", 8), ("test", 8)):
    lines = ["text\tlabel"]
    for i in range(count):
      words = [WORDS[i % 2], *draw.choices(WORDS[2:], k=3)]
      lines.append(f"{' '.join(words)}\t{'no' if i % 2 else 'yes'}")
    (folder / f"{split}.tsv").write_text("\n".join(lines) + "\n")
  pairs = [
    {"sentence_good": f"the {w}", "sentence_bad": f"{w} the", "UID": "order"}
    for w in WORDS
  ]
  path = folder / "pairs.jsonl"
  path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
  files = {s: str(folder / f"{s}.tsv") for s in ("train", "dev", "test")}
  return {
    "words": dict(kind="classification", text="text", label="label", **files),
    "pairs": dict(
      kind="choice",
      choices="sentence_good,sentence_bad",
      group="UID",
      test=str(path),
    ),
  }


def make_study(workdir, source, files, **axes):
  """A study's configuration; `files` is from `write_tasks`."""
  from gemma_funnel import tasks

  study = tiny_run.load_config("ablation_quick")
  study.workdir = str(workdir)
  small = study.models.small
  small.update(
    vocab_size=320,
    num_layers=2,
    embed_dim=16,
    mlp_dim=32,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    window=8,
    max_length=64,
    kernel="reference",
    attention_pattern=("global",),
  )
  study.pretrain.update(steps=8, batch_size=8, length=32, log_every=100)
  study.pretrain.update(loss_chunk=32, checkpoint_every=100, eval_every=100)
  study.pretrain.data.source = str(source)
  study.finetune.update(epochs=1.0, batch_size=8, length=32)
  study.pretrain.optimizer.warmup_steps = 2
  study.finetune.optimizer.warmup_steps = 1
  study.switch_step, study.distill_steps = 4, 3
  study.latency.repeats = study.similarity.rows = 0
  study.generative.batch_size = 8
  with study.unlocked(), study.ignore_type():
    study.tasks = {}
    for name, keys in files.items():
      task = tasks.default_config()
      task.update(keys)
      study.tasks[name] = dict(task=task, tune=dict())
    study.axes.update(
      start=(1,),
      stop=(None,),
      recover=("average", "repeat"),
      task=tuple(files),
      seed=(0,),
    )
    study.axes.update(axes)
  return study
