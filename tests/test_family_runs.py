"""A model of each family, a step of each: on a mesh, distilled, fine-tuned."""

import dataclasses
import json
import pathlib

from flax import nnx
import funnel_grid
import jax
import numpy as np
import pytest
import tiny_run

from gemma_funnel import convert, flops
from gemma_funnel.config import RUNTIME, resolve_funnel
from gemma_funnel.tasks.task import Task, TextExample
from gemma_funnel.training import finetune, trainer

FUNNEL = "start=1,stride=2"
STEP = dict(steps=1, checkpoint_every=1, optimizer__warmup_steps=0)


def _metrics(workdir):
  lines = (pathlib.Path(workdir) / "metrics.jsonl").read_text().splitlines()
  return [x for x in map(json.loads, lines) if x["kind"] == "train"]


def _task():
  examples = [TextExample(f"abc {n}", None, n % 2) for n in range(8)]
  splits = dict.fromkeys(("train", "dev", "test"), examples)
  return Task("made", "classification", ("a", "b"), ("accuracy",), splits)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
  return tiny_run.write_corpus(tmp_path_factory.mktemp("text"))


# Those that add nothing to the parameters are as Gemma 2 and Llama.
SLOW = ("gemma", "mistral")


@pytest.mark.parametrize(
  "family",
  [
    pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else [])
    for name in funnel_grid.OTHERS
  ],
)
def test_a_step_of_each(family, source, tmp_path):
  tied = family not in ("llama", "qwen2")
  of_family = dataclasses.replace(funnel_grid.FAMILIES[family], tied=tied)
  tiny = {k.split(".")[1] for k in tiny_run.CHANGES if k.startswith("model.")}

  def train(name, **changes):
    workdir = str(tmp_path / name)
    config = tiny_run.make_config(workdir, source, **STEP | changes)
    for key, value in of_family.to_dict().items():
      if key not in (*tiny, *RUNTIME, "query_pre_attn_scalar"):
        config.model[key] = value
    result = tiny_run.train(config)
    (line,) = _metrics(workdir)
    assert np.isfinite(line["loss"])
    return workdir, result.model

  base, model = train(
    "base", funnel="off", mesh__data=2, mesh__fsdp=2, mesh__tensor=2
  )
  for name in ("qk_norm", "attention_bias", "tied", "rope_scaling"):
    assert getattr(model.config, name) == getattr(of_family, name)
  count = sum(x.size for x in jax.tree.leaves(nnx.state(model)))
  assert flops.parameters(model.config).total == count
  with pytest.MonkeyPatch.context() as patch:
    tiny_run.use_one_device(patch)
    student, _ = train(
      "student",
      init_from=base,
      funnel=FUNNEL,
      objective="distill",
      lora__rank=2,
    )
    merged = convert.load(student)
    assert merged.config.attention_kinds == model.config.attention_kinds
    assert merged.stages == resolve_funnel(FUNNEL, model.config.num_layers)
    config = tiny_run.load_config("finetune")
    config.update(
      workdir=str(tmp_path / "tuned"),
      init_from=student,
      length=16,
      batch_size=8,
      epochs=1.0,
      tensorboard=False,
    )
    with config.unlocked():
      config.seed = 0
      config.optimizer.warmup_steps = 0
    result = trainer.train(finetune.resolve(config, _task()))
    assert result.finished and result.steps == 1
