"""Progress: lines, and the file of metrics over interruptions."""

import json
import os
import re

import ml_collections

from gemma_funnel.training import progress

VALUES = {"loss": 2.5, "learning_rate": 1e-3, "grad_norm": 0.5}


def _config(folder, **changes):
  return ml_collections.ConfigDict(
    {"workdir": str(folder), "log_every": 2, "tensorboard": False, **changes}
  )


def test_lines_of_steps_to_be_taken_again_are_dropped(tmp_path):
  path = tmp_path / "metrics.jsonl"
  line = lambda step, kind="train": json.dumps({"step": step, "kind": kind})
  kept = [line(1), line(2), line(2, "heldout")]
  path.write_text("\n".join([*kept, line(3), line(4), '{"step": 2, "ki']))
  progress._keep_until(path, 2)
  assert path.read_text() == "\n".join(kept) + "\n"
  progress._keep_until(path, 0)
  assert path.read_text() == ""
  progress._keep_until(tmp_path / "none", 3)
  assert os.listdir(tmp_path) == ["metrics.jsonl"]


def test_every_step_is_written_and_some_are_told(tmp_path, capsys):
  with progress.Metrics(_config(tmp_path), 0, 5) as metrics:
    for step in range(1, 6):
      metrics.trained(step, VALUES, 64)
    metrics.evaluated(5, {"loss": 3.0, "pearson": None})
  text = (tmp_path / "metrics.jsonl").read_text()
  lines = [json.loads(line) for line in text.splitlines()]
  assert [x["step"] for x in lines] == [1, 2, 3, 4, 5, 5]
  assert lines[0] == {"step": 1, "kind": "train", **VALUES}
  assert lines[-1] == {
      "step": 5, "kind": "heldout", "loss": 3.0, "pearson": None
  }  # fmt: skip
  out = capsys.readouterr().out
  # Every second step, and the last one.
  assert re.findall(r"step (\d)/5  loss 2\.5000  lr 1\.00e-03", out) == [
      "2", "4", "5"
  ]  # fmt: skip
  assert "step 5/5  held out: loss 3.0000\n" in out  # None is not told.


def test_a_resumed_run_goes_on_with_the_file(tmp_path):
  for begin, end in ((0, 4), (2, 5)):
    with progress.Metrics(_config(tmp_path), begin, 5) as metrics:
      for step in range(begin + 1, end + 1):
        metrics.trained(step, {**VALUES, "loss": float(begin)}, 64)
  text = (tmp_path / "metrics.jsonl").read_text()
  lines = [json.loads(line) for line in text.splitlines()]
  assert [(x["step"], x["loss"]) for x in lines] == [
      (1, 0.0), (2, 0.0), (3, 2.0), (4, 2.0), (5, 2.0)
  ]  # fmt: skip


def test_rates_and_what_is_left_count_from_where_this_call_began(
  tmp_path, capsys, monkeypatch
):
  clock = [100.0]
  monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
  with progress.Metrics(_config(tmp_path), 10, 20) as metrics:
    for step in (11, 12):
      clock[0] += 5
      metrics.trained(step, VALUES, 1000)
    clock[0] += 20
    metrics.trained(13, VALUES, 1000)
    metrics.trained(14, VALUES, 1000)
  out = capsys.readouterr().out.splitlines()
  assert out[0].endswith("200 tokens/s  ETA 0m40s")  # 8 steps of 5 s.
  # Of the two steps since; 6 steps of 30 s / 4.
  assert out[1].endswith("100 tokens/s  ETA 0m45s")


def test_duration():
  shown = {0.4: "0m00s", 59.6: "1m00s", 187: "3m07s", 3600: "1h00m",
           7384: "2h03m"}  # fmt: skip
  assert {s: progress.duration(s) for s in shown} == shown
