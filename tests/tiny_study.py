"""A study small enough for tests: tasks, configuration, and made-up results."""

import itertools
import json
import pathlib
import random

import tiny_run

from gemma_funnel.evaluation.report import Column

WORDS = ("apple", "house", "river", "stone", "cloud", "tiger", "chair", "paper")
ONE = "start=1,stop=2,stride=2,reduce=mean,recover="


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


# A table of each kind of column.
COLUMNS = (
  Column("name", "na<me"),
  Column("value", "value (%)", ".1f", 100),
  Column("spread", "drop", ">"),
  Column("none", "nobody has it"),
)
ROWS = (
  {"name": "a|b <i>", "value": 0.5, "spread": "-1.20 ± 0.30"},
  {"name": "2nd", "value": None, "spread": "10.00 (n=1)"},
)
# Of the made-up results: what a recovery, a start and a task add to a drop, or
# multiply it by, and a pretraining. The null pretraining is worth nothing.
RECOVERIES = {"average": 0.0, "add": 0.012, "repeat": 0.03}
STARTS = {2: 0.06, 4: 0.03, 6: 0.01}
TASKS = {"grammar": 1.6, "topic": 0.5}
PRETRAININGS = {"standard": 1.0, "aware": 0.5, "sampled": 1.0}


def make_row(kind, task, seed, **changes):
  """A line of results.jsonl: the baseline's, but for `changes`."""
  row = dict(kind=kind, hash="h", model="study", task=task, seed=seed)
  row |= dict(pretraining="standard", finetuning="off", inference="off")
  row |= dict.fromkeys(("start", "stop", "stride", "reduce", "recover"))
  row |= dict(funnel="off", task_kind="tagging", num_test=500)
  row |= dict(metric="accuracy", higher_is_better=True, ideal_reduction=0.0)
  row |= dict(latency_s=None, reduction=None, git="59d0d6d", device="cpu x1")
  if task == "prose":
    row |= dict(task_kind="perplexity", finetuning=None)
    row |= dict(metric="bits_per_byte", higher_is_better=False)
  return row | changes


def with_funnel(start, recover):
  """What a row of a cell with that funnel at inference has otherwise."""
  axes = dict(start=start, stop=8, stride=2, reduce="mean", recover=recover)
  funnel = ",".join(f"{key}={value}" for key, value in axes.items())
  saved = 0.5 * (8 - start) / 8
  return dict(axes, funnel=funnel, inference="on", ideal_reduction=saved)


def make_rows(noise=0.002, seeds=(0, 1), pretrainings=("standard", "aware")):
  """A study of 3 recoveries x 3 starts, and a failure."""
  chance, rows = random.Random(0), []
  for task, seed in itertools.product((*TASKS, "prose"), seeds):
    base = 0.8 + 0.02 * seed
    rows.append(make_row("cell", task, seed, value=base))
    finetunings = (None,) if task == "prose" else ("off", "on")
    for start, recover, pretraining, finetuning in itertools.product(
      STARTS, RECOVERIES, pretrainings, finetunings
    ):
      lost = (STARTS[start] + RECOVERIES[recover]) * TASKS.get(task, 1)
      lost *= PRETRAININGS[pretraining] * (0.5 if finetuning == "on" else 1)
      lost += chance.gauss(0, noise)
      value = base * (1 + lost) if task == "prose" else base - lost
      axes = with_funnel(start, recover) | dict(pretraining=pretraining)
      axes |= dict(finetuning=finetuning, value=value)
      rows.append(make_row("cell", task, seed, **axes))
  error = dict(with_funnel(2, "add"), error="out of <memory>")
  rows.append(make_row("failure", "topic", 5, **error))
  for recover, pretraining in itertools.product(RECOVERIES, pretrainings):
    each = (0.05 + RECOVERIES[recover]) * PRETRAININGS[pretraining]
    layers = [
      dict(layer=n, at="layer", short=n > 1, cosine=1 - max(0, n - 1) * each)
      for n in range(8)
    ]
    layers.append(dict(layer=7, at="recovery", short=False, cosine=0.8))
    axes = dict(with_funnel(2, recover), pretraining=pretraining)
    rows.append(make_row("similarity", None, 0, layers=layers, **axes))
  return rows
