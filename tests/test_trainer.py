"""The loop: interrupted anyhow, a run is the run that was not interrupted."""

import json
import os
import pathlib
import re
import shutil
import signal
import time

from flax import nnx
import jax
import numpy as np
import pytest
import tiny_run

from gemma_funnel import convert
from gemma_funnel.data import sources, tokenizer
from gemma_funnel.training import pretrain, trainer

# Long enough to be interrupted in the middle.
STEPS = 120
FLAGS = (f"--config.steps={STEPS}", "--config.checkpoint_every=20")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
  return tiny_run.write_corpus(tmp_path_factory.mktemp("corpus"))


def _train(workdir, source, evaluator=None, **changes):
  config = tiny_run.make_config(workdir, source, **changes)
  return trainer.train(pretrain.resolve(config), evaluator)


def _params(workdir):
  run = convert.load_run(workdir)
  return run.step, jax.device_get(nnx.to_pure_dict(nnx.state(run.model)))


def _lines(workdir):
  text = (pathlib.Path(workdir) / "metrics.jsonl").read_text()
  return [json.loads(line) for line in text.splitlines()]


def _last_step(workdir):
  path = pathlib.Path(workdir) / "metrics.jsonl"
  return path.read_text().count('"train"') if path.exists() else 0


def _interrupt(process, number, when):
  """Sends a signal as soon as `when()`, which has to come."""
  deadline = time.monotonic() + 200
  while not when():
    assert process.poll() is None, tiny_run.finish(process)
    assert time.monotonic() < deadline
    time.sleep(0.001)
  process.send_signal(number)


def _assert_same_run(workdir, other):
  assert list(tiny_run.train_losses(workdir)) == list(range(1, STEPS + 1))
  # As written: not one bit of any metric differs.
  trained = lambda d: [x for x in _lines(d) if x["kind"] == "train"]
  assert trained(workdir) == trained(other)
  (step, params), (other_step, others) = _params(workdir), _params(other)
  assert step == other_step == STEPS
  jax.tree.map(np.testing.assert_array_equal, params, others)


@pytest.mark.slow
def test_an_interrupted_run_is_the_uninterrupted_one(source, tmp_path):
  whole, cut = str(tmp_path / "whole"), str(tmp_path / "cut")
  out, _ = tiny_run.finish(
    tiny_run.start(tiny_run.command(whole, source, *FLAGS))
  )
  assert "resuming" not in out
  losses = tiny_run.train_losses(whole)
  assert losses[STEPS] < losses[1] - 0.5  # It learns.

  again = lambda: tiny_run.start(tiny_run.command(cut, source, *FLAGS))
  checkpoints = pathlib.Path(cut, "checkpoints")
  # Killed while it saves for the first time, or a moment after.
  process = again()
  _interrupt(
    process, signal.SIGKILL, lambda: any(checkpoints.glob("20.orbax*"))
  )
  tiny_run.finish(process, -signal.SIGKILL)
  # Asked to end.
  process = again()
  _interrupt(process, signal.SIGTERM, lambda: _last_step(cut) >= 27)
  out, err = tiny_run.finish(process)
  stopped = int(re.search(rf"SIGTERM: saved {cut} at step (\d+)", out)[1])
  assert 27 <= stopped < STEPS and "Traceback" not in err
  assert (checkpoints / str(stopped)).is_dir()
  assert "Held-out" not in out  # What is told of a finished run.
  assert _last_step(cut) == stopped
  # Killed at some step between checkpoints.
  process = again()
  _interrupt(
    process, signal.SIGKILL, lambda: _last_step(cut) > max(stopped, 60) + 5
  )
  out, _ = tiny_run.finish(process, -signal.SIGKILL)
  assert f"resuming {cut} at step {stopped}" in out
  assert _last_step(cut) < STEPS
  out, _ = tiny_run.finish(again())
  assert f"resuming {cut} at step" in out and "Held-out" in out
  _assert_same_run(cut, whole)


@pytest.mark.slow
def test_worker_processes_resume_exactly(source, tmp_path):
  whole, cut = str(tmp_path / "whole"), str(tmp_path / "cut")
  flags = (*FLAGS, "--config.data.num_workers=1")
  tiny_run.finish(tiny_run.start(tiny_run.command(whole, source, *flags)))
  process = tiny_run.start(tiny_run.command(cut, source, *flags))
  _interrupt(process, signal.SIGKILL, lambda: _last_step(cut) > 45)
  tiny_run.finish(process, -signal.SIGKILL)
  out, _ = tiny_run.finish(
    tiny_run.start(tiny_run.command(cut, source, *flags))
  )
  assert f"resuming {cut} at step" in out
  _assert_same_run(cut, whole)


def test_a_run_tells_of_all_its_steps(source, tmp_path, capsys):
  evaluated = []

  def evaluator(corpus, setup):
    assert corpus.heldout and setup.stages[0].stride == 2
    return lambda model: (
      evaluated.append(model) or {"loss": 7.0, "bits_per_byte": 3.0}
    )

  result = _train(
    tmp_path / "run",
    source,
    evaluator,
    steps=7,
    eval_every=3,
    log_every=5,
    checkpoint_every=4,
    tensorboard=True,
  )
  assert result.finished and result.steps == 7
  lines = _lines(tmp_path / "run")
  steps = lambda kind: [x["step"] for x in lines if x["kind"] == kind]
  assert steps("train") == [1, 2, 3, 4, 5, 6, 7]
  assert steps("heldout") == [3, 6, 7] and len(evaluated) == 3
  groups = {
    f"{norm}/{group}"
    for norm in ("grad_norm", "update_norm")
    for group in ("attention", "embedding", "mlp", "norm")
  }
  assert set(lines[0]) == groups | {
    "step",
    "kind",
    "loss",
    "accuracy",
    "tokens",
    "grad_norm",
    "learning_rate",
    "skipped",
  }
  # The rate that the step was taken with: warm-up is two steps long.
  rates = [x["learning_rate"] for x in lines if x["kind"] == "train"][:3]
  np.testing.assert_allclose(rates, [0, 0.0015, 0.003], rtol=1e-6)
  out = capsys.readouterr().out
  assert "35,104 parameters trained, funnel start=1,stop=2,stride=2" in out
  said = re.findall(r"step (\d+)/7  loss .* tokens/s  ETA", out)
  assert said == ["5", "7"]
  assert re.findall(r"step (\d+)/7  held out: loss 7", out) == ["3", "6", "7"]
  names = sorted(os.listdir(tmp_path / "run" / "checkpoints"))
  assert names == ["4", "7"]
  assert list((tmp_path / "run" / "tensorboard").glob("events*"))


def test_a_finished_run_is_not_trained_again(source, tmp_path, capsys):
  first = _train(tmp_path / "run", source, steps=3)
  before = (tmp_path / "run" / "metrics.jsonl").read_text()
  capsys.readouterr()
  second = _train(tmp_path / "run", source, steps=3)
  assert second.finished and second.steps == 3
  assert "resuming" in capsys.readouterr().out
  assert (tmp_path / "run" / "metrics.jsonl").read_text() == before
  jax.tree.map(
    np.testing.assert_array_equal,
    jax.device_get(nnx.to_pure_dict(nnx.state(first.model))),
    jax.device_get(nnx.to_pure_dict(nnx.state(second.model))),
  )


def test_a_loss_that_is_not_finite_stops_the_run(source, tmp_path):
  changes = dict(steps=20, optimizer__learning_rate=1e30, checkpoint_every=1)
  with pytest.raises(FloatingPointError) as error:
    _train(tmp_path / "run", source, **changes)
  # The first rate of the warm-up is 0, the second too high: the second step's
  # loss is fine, and its parameters are not.
  text = str(error.value)
  assert re.fullmatch(
    r"(loss|grad_norm) is (nan|inf) at step 3; the last good checkpoint is "
    r"of step 2",
    text,
  )
  assert _last_step(tmp_path / "run") == 2
  assert convert.load_run(tmp_path / "run").step == 2
  with pytest.raises(FloatingPointError, match="at step 3; .* of step 2"):
    _train(tmp_path / "run", source, **changes)


def test_a_loss_that_is_not_finite_before_any_checkpoint(source, tmp_path):
  with pytest.raises(FloatingPointError, match="the last good .* is none"):
    _train(tmp_path / "run", source, optimizer__learning_rate=1e30)
  assert os.listdir(tmp_path / "run" / "checkpoints") == []


def test_a_mesh_that_does_not_fit_is_found_before_any_work(source, tmp_path):
  with pytest.raises(ValueError, match="tensor=8 does not divide 4"):
    _train(tmp_path / "run", source, mesh__tensor=8)
  assert not (tmp_path / "run").exists()


def _poison(monkeypatch, steps, factor=float("nan")):
  """Makes the losses of some batches, counted from 1, that many times more."""
  honest, count = pretrain.TextTask.make_loss, iter(range(1, 1000))
  put = trainer.sharding.put_batch

  def poisoned_put(host, mesh):
    scale = factor if next(count) in steps else 1.0
    rows = len(host["tokens"])
    host = host | {"scale": np.full(rows, scale, np.float32)}
    return put(host, mesh)

  def make_loss(task, spec):
    inner = honest(task, spec)

    def loss(variant, params, frozen_params, batch, key):
      batch = dict(batch)
      scale = batch.pop("scale")[0]
      value, metrics = inner(variant, params, frozen_params, batch, key)
      return value * scale, metrics | {"loss": metrics["loss"] * scale}

    return loss

  monkeypatch.setattr(trainer.sharding, "put_batch", poisoned_put)
  monkeypatch.setattr(pretrain.TextTask, "make_loss", make_loss)


def test_steps_that_are_not_finite_may_be_skipped(
  source, tmp_path, monkeypatch, capsys
):
  _poison(monkeypatch, {3, 4})
  folder = tmp_path / "run"
  result = _train(folder, source, steps=8, on_nonfinite="skip")
  assert result.finished and result.steps == 8
  lines = [x for x in _lines(folder) if x["kind"] == "train"]
  assert [x["loss"] is None for x in lines] == [
    step in (3, 4) for step in range(1, 9)
  ]
  assert [x["skipped"] for x in lines] == [0, 0, 1, 2, 2, 2, 2, 2]
  assert capsys.readouterr().out.count("skipped (") == 2
  assert all(
    np.isfinite(x).all()
    for x in jax.tree.leaves(jax.device_get(_params(folder)[1]))
  )


def test_too_many_of_them_in_a_row_end_the_run(source, tmp_path, monkeypatch):
  _poison(monkeypatch, {3, 4, 5, 6})
  with pytest.raises(FloatingPointError, match="at step 5, as in 2 steps"):
    _train(
      tmp_path / "run", source, steps=8, on_nonfinite="skip", max_skipped=2
    )


def test_a_spike_sends_the_run_back_and_on_with_the_data(
  source, tmp_path, monkeypatch, capsys
):
  _poison(monkeypatch, {7}, 100.0)
  batches, put = [], trainer.sharding.put_batch
  monkeypatch.setattr(
    trainer.sharding,
    "put_batch",
    lambda host, mesh: batches.append(host["tokens"]) or put(host, mesh),
  )
  folder = tmp_path / "run"
  _train(
    folder,
    source,
    steps=10,
    checkpoint_every=4,
    rollback__factor=3.0,
    rollback__window=4,
    log_every=1,
  )
  out = capsys.readouterr().out
  assert (
    "far above those before; back to step 4, on with the data (1 of 3)" in out
  )
  lines = [x for x in _lines(folder) if x["kind"] == "train"]
  assert [x["step"] for x in lines] == list(range(1, 11))
  assert max(x["loss"] for x in lines) < 10
  # The steps after the fourth were taken again, with the next batches.
  assert len(batches) > 10
  assert len({x.tobytes() for x in batches}) == len(batches)


def test_spikes_that_come_again_end_the_run(source, tmp_path, monkeypatch):
  _poison(monkeypatch, set(range(7, 100)), 100.0)
  with pytest.raises(FloatingPointError, match="after 1 rollbacks"):
    _train(
      tmp_path / "run",
      source,
      steps=30,
      checkpoint_every=2,
      rollback__factor=3.0,
      rollback__window=2,
      rollback__most=1,
    )


def test_checkpoints_are_kept_by_age_by_loss_and_by_number(source, tmp_path):
  losses = iter((5.0, 1.0, 4.0, 3.0, 6.0, 7.0))

  def evaluator(corpus, setup):
    return lambda model: {"loss": next(losses), "bits_per_byte": 0.0}

  _train(
    tmp_path / "run",
    source,
    evaluator,
    steps=12,
    eval_every=2,
    checkpoint_every=2,
    keep=1,
    keep_best=1,
    keep_period=6,
  )
  kept = {int(p) for p in os.listdir(tmp_path / "run" / "checkpoints")}
  assert kept == {4, 6, 12}  # The best, every sixth, the newest.


def test_checkpoints_are_written_by_the_clock_too(
  source, tmp_path, monkeypatch
):
  now = [0.0]

  class Clock:
    @staticmethod
    def monotonic():
      now[0] += 10
      return now[0]

  monkeypatch.setattr(trainer, "time", Clock)
  _train(
    tmp_path / "run",
    source,
    steps=9,
    checkpoint_every=100,
    log_every=2,
    checkpoint_minutes=0.5,
    keep=9,
  )
  kept = sorted(int(p) for p in os.listdir(tmp_path / "run" / "checkpoints"))
  assert 9 in kept and len(kept) > 1
  assert all(step % 2 == 0 for step in kept[:-1])


def test_the_average_of_weights_is_what_a_run_gives(source, tmp_path):
  measured = []

  def evaluator(corpus, setup):
    return lambda model: (
      measured.append(np.asarray(model.embedding[...]))
      or {"loss": 0.0, "bits_per_byte": 0.0}
    )

  folder = tmp_path / "run"
  result = _train(
    folder, source, evaluator, steps=6, eval_every=6, optimizer__ema_decay=0.9
  )
  plain = _train(tmp_path / "plain", source, steps=6)
  found = np.asarray(result.model.embedding[...])
  np.testing.assert_array_equal(measured[-1], found)
  np.testing.assert_array_equal(_params(folder)[1]["embedding"], found)
  assert np.abs(found - np.asarray(plain.model.embedding[...])).max() > 1e-4


def _flip(path):
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 1
  path.write_bytes(data)


@pytest.mark.parametrize("what", ["data", "tokenizer", "no tokenizer"])
def test_what_a_run_depends_on_is_what_it_was(what, source, tmp_path, capsys):
  text = pathlib.Path(shutil.copy(source, tmp_path / "text.txt"))
  workdir = tmp_path / "run"
  _train(workdir, text, steps=4)
  tokenizer = workdir / "tokenizer.model"
  fault = "data:source:0:text.txt .changed."
  if what == "data":
    text.write_text(text.read_text() + "More of it.\n")
  elif what == "tokenizer":
    _flip(tokenizer)
    fault = "tokenizer:tokenizer.model .changed."
  else:
    tokenizer.unlink()
    fault = "the tokenizer of the run .* is missing"
  before = _contents(workdir)
  with pytest.raises(ValueError, match=fault) as error:
    _train(workdir, text, steps=4)
  assert "\n" not in str(error.value) and _contents(workdir) == before
  if what == "tokenizer":
    with pytest.raises(ValueError, match=fault):
      convert.load_run(workdir)
  if what == "data":
    _train(workdir, text, steps=4, accept_changed=True)
    assert "warning: the run in" in capsys.readouterr().err


def _contents(folder):
  files = (f for f in folder.rglob("*") if f.is_file())
  return {f: f.read_bytes() for f in files}


def test_a_run_has_the_tokenizer_that_it_was_given(source, tmp_path):
  given = tmp_path / "given.model"
  tokenizer.train(sources.load(str(source)), tiny_run.VOCAB, given)
  changes = {"data.tokenizer": str(given), "steps": 4}
  _train(tmp_path / "run", source, **changes)
  assert (tmp_path / "run" / "tokenizer.model").exists()
  given.unlink()
  # It is enough.
  _train(tmp_path / "run", source, **changes)
  given.write_bytes((tmp_path / "run" / "tokenizer.model").read_bytes())
  _train(tmp_path / "run", source, **changes)
  tokenizer.train(sources.load(str(source)), tiny_run.VOCAB - 9, given)
  with pytest.raises(ValueError, match="is another than .*tokenizer.model"):
    _train(tmp_path / "run", source, **changes)
