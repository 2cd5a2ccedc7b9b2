"""A run resolved: values that cannot be are named, defaults are of one place."""

import dataclasses

import pytest
import tiny_run

from gemma_funnel.training import pretrain, spec


@pytest.mark.parametrize(
  "changes, text",
  [
    ({"steps": 0}, "steps=0: expected an integer >= 1"),
    ({"batch_size": 12}, "batch_size=12 must be a multiple of 8"),
    ({"seed": -1}, "seed=-1"),
    ({"length": 128}, "length=128 is beyond model.max_length=64"),
    ({"init_from": "tests/nowhere"}, "init_from=.tests/nowhere. is not there"),
    ({"accumulate": 0}, "accumulate=0"),
    ({"log_every": 0.5}, "log_every=0.5"),
    ({"checkpoint_every": 0}, "checkpoint_every=0"),
    ({"checkpoint_minutes": 0.0}, "checkpoint_minutes=0.0"),
    ({"watchdog_minutes": -1.0}, "watchdog_minutes=-1.0"),
    ({"keep": 0}, "keep=0"),
    ({"keep_best": -1}, "keep_best=-1"),
    ({"keep_period": 0}, "keep_period=0"),
    ({"max_skipped": 0}, "max_skipped=0"),
    ({"on_nonfinite": "ignore"}, "on_nonfinite='ignore': expected .*'stop'"),
    ({"rollback.factor": 0.5}, "rollback.factor=0.5"),
    ({"rollback.window": 0}, "rollback.window=0"),
    ({"rollback.most": 0}, "rollback.most=0"),
    ({"profile_steps": (5, 2)}, r"profile_steps=\(5, 2\)"),
    ({"lora.rank": 2}, "lora.rank=2 needs init_from"),
  ],
  ids=str,
)
def test_a_value_that_cannot_be(changes, text):
  if "log_every" in changes:
    with pytest.raises(ValueError, match=text):
      spec.LoopSpec(**changes)
    return
  config = tiny_run.make_config("unused", "unused", **changes)
  with pytest.raises(ValueError, match=text):
    pretrain.resolve(config)


def test_a_configuration_has_the_keys_and_defaults_of_the_loop():
  config = tiny_run.load_config()
  loop = spec.read(spec.LoopSpec, config)
  default = spec.LoopSpec(eval_every=140, checkpoint_every=70)
  assert loop == default
  with pytest.raises(ValueError, match="no keys .*'evaluate_every'"):
    spec.loop_config(evaluate_every=3)


@pytest.mark.parametrize(("decay", "told"), [(0.999, True), (0.5, False)])
def test_an_average_of_initial_weights_is_told(decay, told, capsys):
  changes = {"optimizer.ema_decay": decay, "steps": 100}
  pretrain.resolve(tiny_run.make_config("unused", "unused", **changes))
  said = "after 100 steps 90% of the average" in capsys.readouterr().err
  assert said == told


def test_a_run_is_frozen_and_leaves_what_it_was_given():
  config = tiny_run.make_config("unused", "unused", funnel=None)
  before = config.to_dict()
  found = pretrain.resolve(config)
  assert config.to_dict() == before and found.config is not config
  with pytest.raises(dataclasses.FrozenInstanceError):
    found.steps = 3
  with pytest.raises(AttributeError):
    found.task.data.seed = 3
