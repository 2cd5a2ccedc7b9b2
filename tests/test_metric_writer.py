"""Progress: lines, and the file of metrics over interruptions."""

import json
import math
import re
import shutil
import sys
import types

import jax
import ml_collections
import pytest

from gemma_funnel.parallel import hardware, sharding
from gemma_funnel.training import metric_writer
from gemma_funnel.training.spec import LoopSpec

VALUES = {"loss": 2.5, "learning_rate": 1e-3, "grad_norm": 0.5}


def _config(folder, **changes):
  config = ml_collections.ConfigDict({"workdir": str(folder), **changes})
  loop = LoopSpec(**{"log_every": 2, "tensorboard": False, **changes})
  return types.SimpleNamespace(workdir=str(folder), loop=loop, config=config)


def _metrics(config, step, steps, clock={}):  # noqa: B006
  mesh = sharding.make_mesh(sharding.default_config(), jax.devices()[:1])
  config.steps, config.mesh = steps, mesh
  return metric_writer.MetricWriter(config, step, clock)


def _lines(folder, *kinds):
  text = (folder / "metrics.jsonl").read_text()
  lines = [json.loads(line) for line in text.splitlines()]
  return [x for x in lines if x["kind"] in kinds]


@pytest.fixture
def clock(monkeypatch):
  """Seconds that pass when they are added to."""
  now = [100.0]
  monkeypatch.setattr(metric_writer.time, "monotonic", lambda: now[0])
  monkeypatch.setattr(metric_writer.time, "time", lambda: 5000 + now[0])
  return now


def test_every_step_is_written_and_some_are_told(tmp_path, capsys):
  with _metrics(_config(tmp_path), 0, 5) as metrics:
    for step in range(1, 6):
      metrics.trained(step, VALUES, 64)
    metrics.evaluated(5, {"loss": 3.0, "pearson": None})
  lines = _lines(tmp_path, "train", "heldout")
  assert [x["step"] for x in lines] == [1, 2, 3, 4, 5, 5]
  assert lines[0] == {"step": 1, "kind": "train", **VALUES}
  assert lines[-1] == {
    "step": 5,
    "kind": "heldout",
    "loss": 3.0,
    "pearson": None,
  }
  assert [x["step"] for x in _lines(tmp_path, "speed")] == [2, 4, 5]
  out = capsys.readouterr().out
  # Every second step, and the last one.
  assert re.findall(r"step (\d)/5  loss 2\.5000  lr 1\.00e-03", out) == [
    "2",
    "4",
    "5",
  ]
  assert "step 5/5  held out: loss 3.0000\n" in out  # None is not told.


def test_what_is_not_finite_is_null(tmp_path):
  with _metrics(_config(tmp_path), 0, 5) as metrics:
    metrics.trained(1, {**VALUES, "loss": math.nan}, 64)
  text = (tmp_path / "metrics.jsonl").read_text()
  assert "NaN" not in text and json.loads(text)["loss"] is None


def test_a_resumed_run_goes_on_with_the_file(tmp_path, capsys):
  for begin, end in ((0, 4), (2, 5)):
    with _metrics(_config(tmp_path), begin, 5) as metrics:
      for step in range(begin + 1, end + 1):
        metrics.trained(step, {**VALUES, "loss": float(begin)}, 64)
    if not begin:
      with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('1\n{"stepp": 1}\n[]\n')
      with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 1, "kind": "\xff"}\n')
        file.write(b'{"step": 2, "ki')  # Cut short by a kill.
  said = capsys.readouterr().err
  for number in range(7, 12):
    assert f"metrics.jsonl, line {number} is dropped: " in said
  lines = _lines(tmp_path, "train")
  assert [(x["step"], x["loss"]) for x in lines] == [
    (1, 0.0),
    (2, 0.0),
    (3, 2.0),
    (4, 2.0),
    (5, 2.0),
  ]


def test_rates_are_of_steps_alone(tmp_path, capsys, clock):
  with _metrics(_config(tmp_path), 10, 20) as metrics:
    clock[0] += 50  # It compiles.
    metrics.trained(11, VALUES, 1000)
    clock[0] += 5
    metrics.trained(12, VALUES, 1000)
    clock[0] += 20
    metrics.trained(13, VALUES, 1000)
    with metrics.elsewhere():
      clock[0] += 1000
    metrics.trained(14, VALUES, 1000)
  out = capsys.readouterr().out.splitlines()
  assert out[0].endswith("200 tokens/s  ETA 0m40s")  # 8 steps of 5 s.
  # Of the two steps since; 6 steps of 20 s / 2.
  assert out[1].endswith("100 tokens/s  ETA 1m00s")


def test_goodput_goes_on_over_interruptions(tmp_path, clock):
  steps = ((1, 5), (2, 5), (3, 5), (4, 5))
  with _metrics(_config(tmp_path), 0, 20) as metrics:
    for step, seconds in steps:
      clock[0] += seconds
      metrics.trained(step, VALUES, 1000)
    saved = metrics.clock()
    clock[0] += 5
    metrics.trained(5, VALUES, 1000)  # Lost.
  clock[0] += 60
  with _metrics(_config(tmp_path), 4, 20, saved) as metrics:
    for step, seconds in ((5, 5), (6, 5)):
      clock[0] += seconds
      metrics.trained(step, VALUES, 1000)
  # Three steps, and one of the second call, of all seconds since the start.
  last = _lines(tmp_path, "speed")[-1]
  assert last["step"] == 6
  assert last["goodput"] == pytest.approx((15 + 5) / (25 + 60 + 10))


def test_utilisation_is_of_a_known_device_s_peak(tmp_path, clock, monkeypatch):
  def run(steps):
    with _metrics(_config(tmp_path), 0, 20) as metrics:
      for step in steps:
        clock[0] += 2
        metrics.trained(step, VALUES, 1000, flops=3e12)
    return _lines(tmp_path, "speed")[-1]

  assert "mfu" not in run((1, 2))
  monkeypatch.setattr(
    metric_writer, "chip_of", lambda device: hardware.Chip(5e12, 1, 1, 1)
  )
  assert run((1, 2, 3, 4))["mfu"] == pytest.approx(0.3)


def test_lines_of_steps_gone_back_over_are_dropped(tmp_path):
  with _metrics(_config(tmp_path), 0, 20) as metrics:
    for step in range(1, 8):
      metrics.trained(step, VALUES, 1)
    metrics.rewind(4)
    metrics.trained(5, {**VALUES, "loss": 9.0}, 1)
  lines = _lines(tmp_path, "train")
  assert [x["step"] for x in lines] == [1, 2, 3, 4, 5]
  assert lines[-1]["loss"] == 9.0


def test_a_trace_is_of_the_steps_asked_for(tmp_path, monkeypatch):
  calls = []
  for name in ("start_trace", "stop_trace"):
    monkeypatch.setattr(
      jax.profiler, name, lambda *a, name=name: calls.append((name, *a))
    )
  config = _config(tmp_path, profile_steps=(3, 4))
  with _metrics(config, 0, 9) as metrics:
    for step in range(1, 7):
      metrics.trace(step)
      calls.append(step)
  folder = str(tmp_path / "profile")
  assert calls == [1, 2, ("start_trace", folder), 3, 4, ("stop_trace",), 5, 6]


def test_weights_and_biases_are_told(tmp_path, monkeypatch):
  logged = []
  fake = types.SimpleNamespace(
    init=lambda **kw: logged.append(kw) or fake,
    log=lambda values, step: logged.append((step, values)),
    finish=lambda: logged.append("finished"),
  )
  monkeypatch.setitem(sys.modules, "wandb", fake)
  with _metrics(_config(tmp_path, wandb="funnels"), 0, 9) as metrics:
    metrics.trained(1, VALUES, 1)
    metrics.evaluated(1, {"loss": 3.0, "pearson": None})
  assert logged[0]["project"] == "funnels" and logged[0]["resume"] == "allow"
  assert logged[1] == (1, {f"train/{k}": v for k, v in VALUES.items()})
  assert logged[2:] == [(1, {"heldout/loss": 3.0}), "finished"]
  # A run keeps its id, wherever it is; one that is begun again has another.
  moved = tmp_path.with_name("moved")
  shutil.copytree(tmp_path, moved)
  for folder, step in ((moved, 1), (tmp_path / "again", 0), ("old/run", 3)):
    (tmp_path / folder).mkdir(parents=True, exist_ok=True)
    with _metrics(_config(tmp_path / folder, wandb="funnels"), step, 9):
      pass
  ids = [kw["id"] for kw in logged if isinstance(kw, dict) and "id" in kw]
  assert ids[0] == ids[1] != ids[2]
  assert ids[3] == str(tmp_path / "old/run").strip("/").replace("/", "-")
  monkeypatch.setitem(sys.modules, "wandb", None)
  with pytest.raises(ValueError, match="needs the package wandb"):
    _metrics(_config(tmp_path, wandb="funnels"), 0, 9)


def test_duration():
  shown = {
    0.4: "0m00s",
    59.6: "1m00s",
    187: "3m07s",
    3600: "1h00m",
    7384: "2h03m",
  }
  assert {s: metric_writer.duration(s) for s in shown} == shown
