"""Every file of configs/ can be built, and what it says can be done."""

import pathlib

import jax
import pytest
import tiny_run

from gemma_funnel import evaluation
from gemma_funnel.config import GemmaConfig, format_funnel, parse_funnel
from gemma_funnel.training import pretrain

NAMES = sorted(p.stem for p in (tiny_run.ROOT / "configs").glob("*.py"))
TRAINING = [name for name in NAMES if not name.startswith("eval_")]
EVALUATION = [name for name in NAMES if name.startswith("eval_")]


def test_there_are_configs_of_both_kinds():
  assert "quickstart" in TRAINING and "eval_latency" in EVALUATION


@pytest.mark.parametrize("name", TRAINING)
def test_a_training_config_is_a_run(name):
  config = tiny_run.load_config(name)
  setup = pretrain.make_setup(config)
  assert setup.model_config == GemmaConfig.from_dict(config.model)
  weights, opt_state = pretrain.make_init(setup)[1]
  params = weights["params"]
  assert params["embedding"].shape == (
      config.model.vocab_size, config.model.embed_dim
  )  # fmt: skip
  assert len(jax.tree.leaves(opt_state)) > 2 * len(jax.tree.leaves(params))
  assert config.workdir and config.log_every <= config.steps


@pytest.mark.parametrize("name", EVALUATION)
def test_an_evaluation_config_names_its_evaluator(name):
  config = tiny_run.load_config(name)
  assert name == f"eval_{config.evaluator}"
  for funnel in config.funnels:
    if funnel != "trained":
      assert format_funnel(parse_funnel(funnel))
  config.evaluator = "none"
  with pytest.raises(ValueError, match="evaluator='none'"):
    evaluation.run(config)


@pytest.mark.parametrize("name", NAMES)
def test_a_config_tells_its_command(name):
  text = pathlib.Path(tiny_run.ROOT, "configs", f"{name}.py").read_text()
  program = "train.py" if name in TRAINING else "eval.py"
  assert f"python {program} --config=configs/{name}.py" in text
  assert "Expect" in text.split('"""')[1]
