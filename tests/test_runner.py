"""The study: run, interrupted, failed and run again."""

import errno
import json
import os
import pathlib
import shutil
import subprocess
import sys
import types

import pytest
import tiny_run
import tiny_study

from gemma_funnel import locks, reducers
from gemma_funnel.data import pipeline
from gemma_funnel.registry import REDUCERS
from gemma_funnel.study import grid, results, runner
from gemma_funnel.training import finetune, trainer, watchdog


@pytest.fixture(autouse=True, scope="module")
def _one_device():
  """Programs for eight take long to compile; other tests have those."""
  with pytest.MonkeyPatch.context() as patch:
    tiny_run.use_one_device(patch)
    yield


def _lines(folder, kind=None):
  text = (pathlib.Path(folder) / results.RESULTS).read_text()
  lines = [json.loads(line) for line in text.splitlines()]
  return [x for x in lines if kind in (None, x["kind"])]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
  """(text to train on, keys of the tasks)."""
  folder = tmp_path_factory.mktemp("inputs")
  return tiny_run.write_corpus(folder), tiny_study.write_tasks(folder)


@pytest.fixture
def small(inputs, tmp_path):
  """Makes a study of one recovery, the funnel on, and standard pretraining."""

  def make(**axes):
    defaults = dict(recover=("average",), inference=("on",))
    defaults["pretraining"] = ("standard",)
    config = tiny_study.make_study(tmp_path, *inputs, **defaults | axes)
    config.exclude = ()
    return config

  return make


@pytest.fixture
def count(monkeypatch):
  """Counts trainings: {"pretrain": .., "finetune": ..}."""
  counts, inner = {"pretrain": 0, "finetune": 0}, trainer.train

  def train(spec, *args):
    counts[type(spec.task).__module__.rpartition(".")[2]] += 1
    return inner(spec, *args)

  monkeypatch.setattr(trainer, "train", train)
  return counts


def _measured_study(folder, inputs):
  config = tiny_study.make_study(folder, *inputs)
  config.similarity.update(rows=2, length=16)
  config.latency.update(batch_size=1, length=32, repeats=1)
  return config


@pytest.fixture(scope="module")
def finished(inputs, tmp_path_factory):
  """The folder of a study that was run."""
  folder = tmp_path_factory.mktemp("study") / "done"
  runner.run(_measured_study(folder, inputs))
  return folder


@pytest.fixture
def again(finished, inputs, tmp_path):
  """The configuration of a copy of the finished study."""
  shutil.copytree(finished, tmp_path / "copy")
  return _measured_study(tmp_path / "copy", inputs)


@pytest.mark.slow
def test_a_study_is_complete(finished, again):
  hashes = [c.hash for c in grid.make(again).cells]
  lines = _lines(finished, "cell")
  assert sorted(x["hash"] for x in lines) == sorted(hashes)
  assert len(lines) == 14 and not _lines(finished, "failure")
  for line in lines:
    assert 0 <= line["value"] <= 1 and line["metric"] == "accuracy"
    assert line["num_test"] == 8 and line["higher_is_better"]
    on = line["inference"] == "on"
    assert (line["ideal_reduction"] > 0) == on
    assert line["latency_s"] > 0 and (line["reduction"] != 0) == on
    assert ("train_s" in line) == (line["task"] == "words")
  # Of the plain model with each funnel, and of each model with its own.
  moved = _lines(finished, "similarity")
  assert len(moved) == 4 and all(len(x["layers"]) >= 2 for x in moved)
  names = {path.name for path in finished.iterdir()}
  assert {"results.jsonl", "report.html", "pretrain"} <= names
  assert not list((finished / "finetune").iterdir())
  assert len(list((finished / "pretrain").iterdir())) == 3
  assert (finished / "report.html").stat().st_size > 1000


@pytest.mark.slow
def test_a_finished_study_trains_nothing(again, count):
  path = pathlib.Path(again.workdir)
  before = (path / results.RESULTS).read_text()
  (path / "report.html").unlink()
  runner.run(again)
  assert count == {"pretrain": 0, "finetune": 0}
  assert (path / results.RESULTS).read_text() == before
  assert (path / "report.html").exists()


@pytest.mark.slow
@pytest.mark.parametrize("cut", ["within a line", "before its end"])
def test_a_killed_study_goes_on(cut, again, count):
  path = pathlib.Path(again.workdir) / results.RESULTS
  value = {x["hash"]: x["value"] for x in _lines(again.workdir, "cell")}
  lines = path.read_text().splitlines()
  keep = next(n for n, x in enumerate(lines) if json.loads(x).get("train_s"))
  text = "\n".join(lines[: keep + 1])
  path.write_text(text if cut == "before its end" else text[:-7])
  runner.run(again)
  found = _lines(again.workdir, "cell")
  # Values are what they were: training is the same again.
  assert {x["hash"]: x["value"] for x in found} == value and len(found) == 14
  assert count["finetune"] == 5


@pytest.mark.slow
@pytest.mark.parametrize("damage", [None, b"[]", b"\xff", b""])
def test_a_study_that_was_moved_goes_on(damage, again, capsys, monkeypatch):
  path = pathlib.Path(again.workdir) / results.RESULTS
  lines = path.read_text().splitlines(keepends=True)
  dropped = [x for x in lines if '"task": "words"' in x and '"aware"' in x]
  path.write_text("".join(x for x in lines if x not in dropped[:1]))
  with monkeypatch.context() as patch:
    patch.setattr(watchdog.Termination, "by", lambda self, step: step >= 1)
    with pytest.raises(KeyboardInterrupt):
      runner.run(again)
  (folder,) = (path.parent / "finetune").iterdir()
  if damage is not None:
    (folder / "config.json").write_bytes(damage)
  again.workdir = str(path.parent.rename(path.parent.with_name("moved")))
  capsys.readouterr()
  runner.run(again)
  printed = capsys.readouterr()
  assert f"resuming {again.workdir}/finetune" in printed.out
  assert (folder.name in printed.err) == (damage is not None)
  values = {
    x["hash"]: x["value"] for x in map(json.loads, lines) if "value" in x
  }
  found = _lines(again.workdir, "cell")
  assert {x["hash"]: x["value"] for x in found} == values
  assert not _lines(again.workdir, "failure")


@pytest.mark.slow
def test_a_model_that_is_another_is_measured_anew(again, capsys):
  path = pathlib.Path(again.workdir) / results.RESULTS
  lines = [json.loads(line) for line in path.read_text().splitlines()]
  cells = [x for x in lines if x["kind"] == "cell"]
  assert all(len(x["base"]) == 12 for x in cells)
  mine = [x for x in cells if x["pretraining"] == "aware"]
  mine = [x for x in mine if x["base"] == mine[0]["base"]]
  # One is missing: the model is needed. Those there are of another machine.
  values = {x["hash"]: x["value"] for x in cells}
  for line in mine[1:]:
    line.update(base="0" * 12, value=0.125)
  lines.remove(mine[0])
  path.write_text("".join(json.dumps(x) + "\n" for x in lines))
  runner.run(again)
  told = capsys.readouterr().err
  assert f"that {len(mine) - 1} results are of: they are measured anew" in told
  found = {x["hash"]: x["value"] for x in _lines(again.workdir, "cell")}
  assert found == values  # The last line of each.
  runner.run(again)
  assert not capsys.readouterr().err


@pytest.mark.slow
def test_a_failure_leaves_the_rest(small, tmp_path, count, capsys):
  config = small()
  config.finetune.epochs = 2.0
  with config.unlocked():
    config.tasks.words.tune = dict(optimizer=dict(learning_rate=1e30))
  runner.run(config)
  failures = _lines(tmp_path, "failure")
  assert [x["task"] for x in failures] == ["words"] * 2
  assert all(x["error"].startswith("FloatingPoint") for x in failures)
  (cell,) = _lines(tmp_path, "cell")
  assert cell["task"] == "pairs"
  assert capsys.readouterr().out.count("failed, and left out: Floa") == 2
  assert count == {"pretrain": 1, "finetune": 2}
  assert (tmp_path / "report.html").exists()
  # It is not tried again, unless that is asked for.
  runner.run(config)
  assert count["finetune"] == 2
  config.retry = True
  runner.run(config)
  assert count["finetune"] == 4 and len(_lines(tmp_path, "cell")) == 1
  with config.unlocked():
    config.tasks.words.tune = dict()
  runner.run(config)
  assert len(_lines(tmp_path, "cell")) == 3


@pytest.mark.slow
def test_a_student_is_distilled_from_the_plain_model(small, tmp_path, count):
  runner.run(small(pretraining=("distilled",), task=("pairs",)))
  (cell,) = _lines(tmp_path, "cell")
  assert cell["pretraining"] == "distilled" and not _lines(tmp_path, "failure")
  assert count == {"pretrain": 2, "finetune": 0}


def test_a_dry_run_trains_nothing(inputs, tmp_path, count, capsys, monkeypatch):
  monkeypatch.setattr(runner, "_rate", lambda config: 1e9)
  config = tiny_study.make_study(tmp_path / "study", *inputs)
  config.dry_run = True
  runner.run(config)
  assert "14 cells, 14 to be measured, from 3 pretr" in capsys.readouterr().out
  assert count == {"pretrain": 0, "finetune": 0}
  assert not (tmp_path / "study").exists()


def test_help_tells_of_the_axes():
  command = [sys.executable, "-m", "gemma_funnel.study", "--help"]
  out, _ = tiny_run.finish(tiny_run.start(command))
  own = [k for k, v in REDUCERS.items() if v.__module__ == reducers.__name__]
  for text in (*grid.AXES, *grid.PRETRAININGS, *own, "--dry-run"):
    assert text in out


def test_one_cell_that_cannot_be_measured_leaves_the_others(
  inputs, tmp_path, monkeypatch
):
  config = tiny_study.make_study(
    tmp_path, *inputs, task=("words",), pretraining=("standard",)
  )
  config.keep_finetuned = True
  made = grid.make(config)
  values = iter([None, 0.5, 0.25])
  task = types.SimpleNamespace(rows={"test": ()})
  spec = types.SimpleNamespace(task=task, batch_size=8, length=8)
  model = types.SimpleNamespace(with_funnel=lambda funnel: funnel)
  result = types.SimpleNamespace(steps=1, finished=True, model=model)
  monkeypatch.setattr(finetune, "resolve", lambda *args: spec)
  monkeypatch.setattr(trainer, "train", lambda spec: result)
  monkeypatch.setattr(
    finetune, "measure", lambda *args, **kwargs: {"accuracy": next(values)}
  )
  tuning, cells = next(iter(made.branches[0].tunings.items()))
  runner.Runner(made)._tuned(tuning, cells, "path", "name")
  kinds = [(x["kind"], x["hash"]) for x in _lines(tmp_path)]
  expected = ("failure", "cell", "cell")
  assert kinds == list(zip(expected, (c.hash for c in cells), strict=True))


@pytest.fixture
def own(tmp_path):
  """The configuration of a study of files that a test may change."""
  folder = tmp_path / "own"
  folder.mkdir()
  text, tasks = tiny_run.write_corpus(folder), tiny_study.write_tasks(folder)
  config = tiny_study.make_study(tmp_path / "study", text, tasks)
  return config, folder


def _put_results(config, value):
  """Results of all cells that have none, as if they were measured."""
  study = runner.Runner(grid.make(config))
  study._note_inputs()
  for cell in grid.make(config).cells:
    if cell.hash not in study.done:
      study._add(
        cell,
        dict(
          kind="cell", metric="accuracy", value=value, higher_is_better=True
        ),
      )


@pytest.mark.parametrize(
  "name, measured",
  [("train.tsv", "words"), ("test.tsv", "words"), ("pairs.jsonl", "pairs")],
)
def test_a_changed_task_is_measured_anew(name, measured, own, capsys):
  config, folder = own
  _put_results(config, 0.25)
  before = grid.make(config)
  assert not set(c.hash for c in before.cells) - runner.Runner(before).done
  path = folder / name
  path.write_text(path.read_text())  # Another time, the same content.
  assert grid.make(config).inputs == before.inputs
  path.write_text(path.read_text().replace("house", "hovel"))
  after = grid.make(config)
  study = runner.Runner(after)
  left = [cell for cell in after.cells if cell.hash not in study.done]
  assert left == [cell for cell in after.cells if cell.task == measured]
  # Results of what was are in no table with those of what is.
  assert {row["task"] for row in study.rows()} == {"words", "pairs"} - {
    measured
  }
  study._note_inputs()
  (told,) = capsys.readouterr().err.splitlines()
  assert f"task {measured} changed since" in told and "anew" in told
  study._note_inputs()
  assert not capsys.readouterr().err
  _put_results(config, 0.5)
  values = {(row["task"], row["value"]) for row in runner.Runner(after).rows()}
  assert values == {(measured, 0.5)} | {
    (task, 0.25) for task in {"words", "pairs"} - {measured}
  }


def test_a_changed_text_trains_all_anew(own, capsys):
  config, folder = own
  _put_results(config, 0.25)
  before = grid.make(config)
  (source,) = folder.glob(pathlib.Path(config.pretrain.data.source).name)
  with source.open("a") as file:
    file.write("more\n" if source.suffix != ".jsonl" else '{"text": "more"}\n')
  after = grid.make(config)
  study = runner.Runner(after)
  assert not {cell.hash for cell in after.cells} & study.done
  assert not study.rows()
  folders = [
    {p.config(config, "w").workdir for p in made.pretrainings}
    for made in (before, after)
  ]
  assert not folders[0] & folders[1]
  study._note_inputs()
  assert "warning: text changed since" in capsys.readouterr().err


def test_a_text_that_changes_meanwhile_ends_the_study(own):
  config, folder = own
  study = runner.Runner(grid.make(config))
  source = pathlib.Path(config.pretrain.data.source)
  source.write_text(source.read_text() + "\n")
  cells = list(study._grid.cells)
  with pytest.raises(ValueError, match="changed while the study ran"):
    study._guarded(cells, study._pretrained, cells[0].pretraining)
  assert not study._results.lines


def test_the_tokenizer_is_kept_by_all_that_determines_it(
  own, capsys, monkeypatch
):
  config, folder = own
  trained, load = [], pipeline.load_corpus

  def load_corpus(data, *args):
    trained.append(data.source)
    return load(data, *args)

  monkeypatch.setattr(pipeline, "load_corpus", load_corpus)

  def tokenizer():
    made = grid.make(config)
    own_config = made.pretrainings[0].config(config, config.workdir)
    return runner.Runner(made)._tokenizer(own_config)

  first = tokenizer()
  assert tokenizer() == first and len(trained) == 1
  (kept,) = pathlib.Path(config.workdir).glob("tokenizer_*/tokenizer.model")
  for damage in (
    lambda: kept.write_bytes(first[:100] + b"?" + first[101:]),
    lambda: kept.write_bytes(b""),
    lambda: kept.unlink(),
  ):
    damage()
    trained.clear()
    assert tokenizer() == first and len(trained) == 1
    assert f"warning: {kept}" in capsys.readouterr().err
  source = pathlib.Path(config.pretrain.data.source)
  source.write_text(source.read_text().replace("b", "z"))
  assert tokenizer() != first


def test_two_studies_in_one_folder(own):
  config, _ = own
  pathlib.Path(config.workdir).mkdir()
  with locks.Lock(f"{config.workdir}/.lock", "x"):
    with pytest.raises(ValueError) as refused:
      runner.run(config)
  assert str(refused.value).startswith(f"workdir={config.workdir} is in use by")
  assert str(os.getpid()) in str(refused.value)
  assert [p.name for p in pathlib.Path(config.workdir).iterdir()] == []


@pytest.mark.parametrize(
  "raised",
  [
    OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "f"),
    ValueError("RESOURCE_EXHAUSTED: write: No space left on device [28]"),
    ValueError("workdir=w cannot be written to: Read-only file system"),
  ],
)
def test_a_disk_that_is_full_fails_no_cell(raised, own):
  config, _ = own
  study = runner.Runner(grid.make(config))

  def fail():
    raise raised

  with pytest.raises(OSError):
    study._guarded(list(study._grid.cells), fail)
  assert not study._results.lines


def test_another_holder_of_a_run_fails_no_cell(own):
  config, _ = own
  study = runner.Runner(grid.make(config))

  def fail():
    raise locks.HeldError("in use")

  with pytest.raises(ValueError, match="in use"):
    study._guarded(list(study._grid.cells), fail)
  assert not study._results.lines


@pytest.mark.parametrize("name", ["a[1]", "a*", "b?"])
def test_a_folder_whose_checkpoints_cannot_be_read(name, own):
  config, folder = own
  config.workdir = str(folder / name)
  with pytest.raises(ValueError, match="workdir="):
    runner.run(config)
  assert not (folder / name).exists()


@pytest.mark.parametrize("shape", ["file", "lock is a folder"])
def test_a_workdir_of_another_shape(shape, own):
  config, _ = own
  path = pathlib.Path(config.workdir)
  if shape == "file":
    path.write_text("mine")
  else:
    (path / ".lock").mkdir(parents=True)
  fault = "is a file" if shape == "file" else "cannot be written"
  with pytest.raises(ValueError, match=f"workdir={path} {fault}"):
    runner.run(config)
  assert shape != "file" or path.read_text() == "mine"


@pytest.fixture
def small_disk(tmp_path):
  """Mounts a tmpfs: (its folder, a function that makes it larger)."""
  folder = tmp_path / "disk"
  folder.mkdir()

  def mount(options):
    command = ["mount", "-t", "tmpfs", "-o", options, "none", str(folder)]
    try:
      return subprocess.run(command, capture_output=True).returncode == 0
    except OSError:
      return False

  if not mount("size=64k"):
    pytest.skip("needs the right to mount a tmpfs")
  yield folder, lambda size: mount(f"remount,size={size}")
  subprocess.run(["umount", "--lazy", str(folder)], check=True)


_CONFIG = """
import tiny_study

def get_config():
  config = tiny_study.make_study(*{arguments!r}, inference=("on",))
  config.axes.update(recover=("average",), pretraining=("standard",))
  config.exclude = ()
  return config
"""


@pytest.mark.slow
def test_a_study_on_a_full_disk(inputs, small_disk, tmp_path):
  folder, resize = small_disk
  study, file = folder / "study", tmp_path / "config.py"
  arguments = str(study), str(inputs[0]), inputs[1]
  file.write_text(_CONFIG.format(arguments=arguments))
  command = [sys.executable, "-m", "gemma_funnel.study", f"--config={file}"]
  env = tiny_run.environment()
  paths = [tiny_run.ROOT, tiny_run.ROOT / "tests"]
  env["PYTHONPATH"] = os.pathsep.join(map(str, paths))
  before = []
  for size, status in (("64k", 1), ("640k", 1), ("16m", 0)):
    assert resize(size)
    done = subprocess.run(
      command, env=env, cwd=tiny_run.ROOT, capture_output=True, text=True
    )
    assert done.returncode == status, done.stderr
    assert ("error: " in done.stderr) == bool(status)
    assert "No space left on device" in done.stderr or not status
    kept = results.Results(study).lines
    assert kept[: len(before)] == before  # No result is lost.
    assert not [line for line in kept if line["kind"] == "failure"]
    before = kept
  assert len(_lines(study, "cell")) == 3


@pytest.mark.parametrize("name", ["pretrain", "report.html", "tokenizer"])
def test_a_part_of_a_study_of_another_shape(name, own, monkeypatch):
  config, _ = own
  monkeypatch.setattr(runner, "_rate", lambda config: 1e9)
  made = grid.make(config)
  path = pathlib.Path(config.workdir)
  path.mkdir()
  if name == "pretrain":
    (path / name).mkdir()
    folder = made.pretrainings[0].config(config, config.workdir).workdir
    pathlib.Path(folder).write_text("mine")
  elif name == "tokenizer":
    monkeypatch.setattr(runner.grid, "hash_of", lambda *parts: "x")
    (path / "tokenizer_320_x").write_text("mine")
  else:
    (path / name).mkdir()
    _put_results(config, 0.5)
  with pytest.raises(runner.StudyError):
    runner.run(config)
  assert not [x for x in _lines(path) if x["kind"] == "failure"]
