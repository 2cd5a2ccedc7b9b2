"""Times and memory of whole training steps."""

import json

import jax
import numpy as np
import pytest
import tiny_run

from gemma_funnel import evaluation, flops
from gemma_funnel.config import TransformerConfig
from gemma_funnel.evaluation import training

FUNNEL = "start=1,stride=2"


@pytest.fixture(autouse=True, scope="module")
def _one_device():
  with pytest.MonkeyPatch.context() as patch:
    tiny_run.use_one_device(patch)
    yield


def _config(out, **changes):
  config = tiny_run.load_config("eval_training")
  changed = {k: v for k, v in tiny_run.CHANGES.items() if k != "funnel"}
  config.pretrain.update_from_flattened_dict(changed)
  config.update(out=str(out), funnels=(FUNNEL,), repeats=2, warmup=1)
  config.update(changes)
  return config


@pytest.mark.slow
def test_a_table_of_steps(tmp_path):
  config = _config(tmp_path, loss_chunks=(8, 0), remats=("none", "block"))
  config.pretrain.model.vocab_size = 4096
  setup = training._setup(config, training.Variant("off", 8, "none"))
  batch = training._batch(setup)
  assert np.asarray(batch["segment"]).min() == 1  # Full rows.
  assert (np.asarray(batch["position"])[:, -1] == 31).all()
  rows = evaluation.run(config)
  named = [(r["funnel"], r["loss_chunk"], r["remat"]) for r in rows]
  assert named == [
    ("off", 8, "none"),
    (FUNNEL, 8, "none"),
    ("off", 0, "none"),
    ("off", 8, "block"),
  ]
  model = TransformerConfig.from_dict(config.pretrain.model)
  for row, funnel in zip(rows, (None, FUNNEL, None, None), strict=True):
    assert row["flops"] == flops.train_step(model, funnel, 8, 32)
    assert row["error"] is None and len(row["times_s"]) == 2
    assert row["tokens_per_s"] == pytest.approx(256 / row["latency_s"])
  assert rows[0]["memory_ratio"] == 1 and rows[0]["ideal_reduction"] == 0
  assert rows[1]["ideal_reduction"] == pytest.approx(
    1 - rows[1]["flops"] / rows[0]["flops"]
  )
  # Logits of 8 rows of 32, of 4096 numbers each, are most of the memory.
  assert rows[2]["memory_ratio"] > 1.5
  written = json.loads((tmp_path / "training.json").read_text())
  assert len(written["rows"]) == 4 and (tmp_path / "training.png").exists()


def test_what_would_not_fit_is_not_run(tmp_path):
  config = _config(
    tmp_path, loss_chunks=(8, 0), funnels=(), memory_limit_gib=1e-9
  )
  config.pretrain.model.vocab_size = 4096
  # Nothing fits; what each would need is a result all the same.
  peaks = [row["peak_bytes"] for row in training.run(config)]
  assert peaks[1] > 1.5 * peaks[0]
  config.memory_limit_gib = sum(peaks) / 2 / 2**30
  rows = training.measure(config)
  assert rows[0]["error"] is None
  assert "MemoryError: it needs" in rows[1]["error"]
  assert rows[1]["peak_bytes"] > 0 and "latency_s" not in rows[1]


def test_steps_go_on_from_each_other(tmp_path, monkeypatch):
  steps = []
  call = training._Steps._call

  def spy(self, *args):
    steps.append(jax.tree.leaves(self.state[0])[0])
    return call(self, *args)

  monkeypatch.setattr(training._Steps, "_call", spy)
  training.measure(_config(tmp_path, loss_chunks=(8,)))
  assert len(steps) == 2 * 3  # Two variants, in three rounds.
  assert all(x.is_deleted() for x in steps)  # Weights are given away.


@pytest.mark.parametrize(
  ("changes", "said"),
  [
    (dict(loss_chunks=(-1,)), "loss_chunks=-1"),
    (dict(remats=()), r"remats=\(\)"),
    (dict(memory_limit_gib=-1.0), "memory_limit_gib=-1.0"),
    (dict(funnels=("start=9",)), "funnel"),
    (dict(repeats=0), "repeats"),
  ],
)
def test_configurations_that_cannot_be(changes, said, tmp_path):
  with pytest.raises(ValueError, match=said):
    training.run(_config(tmp_path, **changes))


def test_a_step_that_fails_everywhere_is_an_error(tmp_path, monkeypatch):
  def build(self, variant):
    raise ValueError("no such kernel")

  monkeypatch.setattr(training._Steps, "build", build)
  with pytest.raises(RuntimeError, match="every variant failed: ValueError"):
    training.run(_config(tmp_path))
