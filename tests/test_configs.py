"""Every file of configs/ can be built, and what it says can be done."""

import math
import os
import pathlib

import jax
import pytest
import tiny_run

from gemma_funnel import evaluation, tasks
from gemma_funnel.config import TransformerConfig, format_funnel, parse_funnel
from gemma_funnel.data import sources
from gemma_funnel.data import tokenizer as tokenizer_lib
from gemma_funnel.evaluation import finetuned
from gemma_funnel.study import grid
from gemma_funnel.tasks.task import SPLITS, Task, TextExample
from gemma_funnel.training import finetune, init_state, pretrain

NAMES = sorted(p.stem for p in (tiny_run.ROOT / "configs").glob("*.py"))
EVALUATION = [name for name in NAMES if name.startswith("eval_")]
# Those train.py fine-tunes with have a task; a study has axes.
TUNING = [
  n for n in NAMES if "task" in tiny_run.load_config(n) and n not in EVALUATION
]
STUDIES = [n for n in NAMES if "axes" in tiny_run.load_config(n)]
# Of commands of modules.
COMMANDS = {"tokenize": "gemma_funnel.data.tokenize"} | dict.fromkeys(
  STUDIES, "gemma_funnel.study"
)
TRAINING = [n for n in NAMES if n not in (*EVALUATION, *TUNING, *COMMANDS)]


def test_there_are_configs_of_all_kinds():
  assert "quickstart" in TRAINING and "finetune" in TUNING
  assert "ablation_quick" in STUDIES
  assert {"eval_accuracy", "eval_latency", "eval_task"} <= set(EVALUATION)


@pytest.mark.parametrize("name", TRAINING)
def test_a_training_config_is_a_run(name):
  config = tiny_run.load_config(name)
  setup = pretrain.resolve(config)
  assert setup.model_config == TransformerConfig.from_dict(config.model)
  weights, opt_state = init_state.make_init(setup)[1]
  params = weights["params"]
  assert params["embedding"].shape == (
    config.model.vocab_size,
    config.model.embed_dim,
  )
  assert len(jax.tree.leaves(opt_state)) > 2 * len(jax.tree.leaves(params))
  assert config.workdir and config.log_every <= config.steps


@pytest.mark.parametrize("name", TUNING)
def test_a_tuning_config_is_a_run_of_each_seed(name, tmp_path):
  config = tiny_run.load_config(name)
  config.tokenizer = str(tmp_path / "tokenizer.model")
  lines = [f"{a}{b} {b}{a}" for a in "abcdefghij" for b in "klmnopqrst"]
  documents = [sources.Document(str(n), x) for n, x in enumerate(lines)]
  tokenizer_lib.train(documents, 300, config.tokenizer)
  text = TextExample("ab ba", None, 1)
  task = Task(
    "t",
    "classification",
    ("a", "b"),
    ("accuracy",),
    dict.fromkeys(SPLITS, (text,) * 320),
  )
  for seed in config.seeds:
    setup = finetune.resolve(finetuned.of_seed(config, seed), task)
    assert setup.config.workdir == f"{config.workdir}/seed_{seed}"
    assert setup.model_config == TransformerConfig.from_dict(config.model)
    assert setup.steps == math.ceil(320 / config.batch_size * config.epochs)
  # Each task that the file names is one.
  with pytest.raises(ValueError, match="task='none'"):
    tiny_run.load_config(name, "none")
  text = pathlib.Path(tiny_run.ROOT, "configs", f"{name}.py").read_text()
  for preset in tasks.PRESETS:
    # A set of pairs has nothing to fine-tune for, "tfds" needs a name too.
    if preset not in (tasks.BLIMP, "tfds"):
      assert preset in text
      assert tiny_run.load_config(name, preset).task.format in tasks.FORMATS


@pytest.mark.parametrize("name", STUDIES)
def test_a_study_is_a_grid(name):
  config = tiny_run.load_config(name)
  reads = any(t.task.format == "table" for t in config.tasks.values())
  if reads and "GEMMA_FUNNEL_DATA" not in os.environ:
    pytest.skip("its tasks are files, which GEMMA_FUNNEL_DATA has")
  for given in config.tasks.values():
    given.task.update(max_train=50, max_dev=30, max_test=30)
  config.finetune.optimizer.warmup_steps = 0
  made = grid.make(config)
  axes = config.axes
  assert {cell.task for cell in made.cells} == set(axes.task)
  assert {cell.axes["seed"] for cell in made.cells} == set(axes.seed)
  found = {c.axes["recover"] for c in made.cells} - {None}
  assert found == set(axes.recover)
  kinds = {pretraining.kind for pretraining in made.pretrainings}
  assert kinds == set(axes.pretraining)


@pytest.mark.parametrize("name", EVALUATION)
def test_an_evaluation_config_names_its_evaluator(name):
  config = tiny_run.load_config(name)
  assert config.evaluator == {"eval_methods": "damage"}.get(name, name[5:])
  for funnel in config.funnels:
    funnel = funnel.replace("=?", "=1")  # Found when it runs.
    if funnel != "trained":
      assert format_funnel(parse_funnel(funnel))
  config.evaluator = "none"
  with pytest.raises(ValueError, match="evaluator='none'"):
    evaluation.run(config)


@pytest.mark.parametrize("name", NAMES)
def test_a_config_tells_its_command(name):
  text = pathlib.Path(tiny_run.ROOT, "configs", f"{name}.py").read_text()
  program = "eval.py" if name in EVALUATION else "train.py"
  if name in COMMANDS:
    program = f"-m {COMMANDS[name]}"
  assert f"python {program} --config=configs/{name}.py" in text
  assert "Expect" in text.split('"""')[1]
