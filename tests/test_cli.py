"""The command line: a mistake is one line, not a traceback."""

import errno
import io
import os
import re
import subprocess
import sys

from absl import flags
import pytest
import tiny_run

from gemma_funnel import cli, experiment, locks

# How ml_collections loads a file.
pytestmark = pytest.mark.filterwarnings(
  "ignore:.*load_module:DeprecationWarning"
)
CONFIG = str(tiny_run.ROOT / "configs" / "quickstart.py")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
  return tiny_run.write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture
def run_main(monkeypatch, capsys):
  """cli.main in this process, with flags of its own: (status, stderr)."""

  def call(run, *args):
    values = flags.FlagValues()
    # What absl.app defines, and what its run() reads.
    monkeypatch.setattr(flags, "FLAGS", values)
    monkeypatch.setattr(sys, "argv", ["train.py", *args])
    monkeypatch.setattr(cli, "config_flags", _Own(values))
    monkeypatch.setattr(
      flags,
      "mark_flag_as_required",
      lambda name: flags._validators.mark_flag_as_required(name, values),
    )
    monkeypatch.setattr(
      cli.app, "run", lambda main, flags_parser: main(flags_parser(sys.argv))
    )
    capsys.readouterr()
    try:
      cli.main(run)
      status = 0
    except SystemExit as stop:
      status = stop.code
    return status, capsys.readouterr().err

  return call


class _Own:
  """config_flags that define their flag in `values`."""

  def __init__(self, values):
    self._values = values

  def DEFINE_config_file(self, *args):  # noqa: N802
    from ml_collections import config_flags

    return config_flags.DEFINE_config_file(*args, flag_values=self._values)


def _assert_refused(result, text):
  status, err = result
  assert status == 2
  assert re.fullmatch(rf"error: .*{text}.*\n", err), err


@pytest.mark.parametrize(
  "argument, text",
  [
    ("--config.modle.num_layers=3", "no key 'modle'; .* mean 'model'"),
    ("--config.model.num_layer=3", "'num_layer'; .* mean 'num_layers'"),
    ("--config.xyzzy=3", "no key 'xyzzy'"),
    ("--config.steps=abc", "config.steps=abc"),
    ("--config.model.num_layers=1.5", "config.model.num_layers=1.5"),
    ("--confg=x", "Unknown command line flag 'confg'"),
    ("word", r"unexpected arguments \['word'\]"),
    ("--config.funnel=start=2,stop=2", "funnel.start=2 .*funnel.stop=2"),
    ("--config.funnel=start=1,stop=3", "funnel.stop=3 is past .* 2 layers"),
    ("--config.funnel=start=1,stride=0", "funnel.stride=0"),
    ("--config.funnel=start=1,stried=2", r"no field \['stried'\]"),
    ("--config.funnel=start=0+start=0", "two funnel stages start at layer 0"),
    ("--config.funnel=start=1,recover=none", "recover='none' leaves .* short"),
    ("--config.funnel=2", "'2' is not key=value"),
    ("--config.length=66", "length=66 is beyond model.max_length=64"),
    ("--config.batch_size=12", "batch_size=12 must be a multiple of 8"),
    ("--config.mesh.data=3", "does not divide 8 devices"),
    ("--config.mesh.tensor=8", "tensor=8 does not divide 4"),
    ("--config.data.source=/nowhere/*.txt", "no file matches"),
    ("--config.data.tokenizer=/nowhere", "/nowhere: cannot be read"),
    ("--config.optimizer.b1=2", "optimizer.b1=2"),
  ],
)
def test_a_mistake_is_one_line(argument, text, run_main, source, tmp_path):
  args = tiny_run.command(tmp_path / "run", source, argument)[2:]
  _assert_refused(run_main(experiment.run, *args), text)
  assert not (tmp_path / "run" / "checkpoints").exists()


def test_config_files_that_cannot_be_loaded(run_main, tmp_path):
  run = lambda config: config.to_dict()
  _assert_refused(run_main(run), "config must have a value")
  missing = tmp_path / "none.py"
  _assert_refused(run_main(run, f"--config={missing}"), str(missing))
  overridden = run_main(run, f"--config={missing}", "--config.steps=3")
  _assert_refused(overridden, str(missing))
  file = tmp_path / "file.py"
  file.write_text("\ndef get_config(:\n")
  _assert_refused(run_main(run, f"--config={file}"), rf"{file}, line 2: ")
  file.write_text("def get_config():\n  raise ValueError('too few')\n")
  _assert_refused(run_main(run, f"--config={file}"), "too few")
  latency = tiny_run.ROOT / "configs" / "eval_latency.py"
  _assert_refused(
    run_main(run, f"--config={latency}:gema"), "preset='gema': expected one"
  )


def test_files_that_are_not_what_they_should_be(run_main, source, tmp_path):
  def refuse(text, workdir=tmp_path / "run", **changes):
    args = tiny_run.command(
      workdir,
      source,
      *(f"--config.{k.replace('__', '.')}={v}" for k, v in changes.items()),
    )[2:]
    _assert_refused(run_main(experiment.run, *args), text)

  empty = tmp_path / "empty.txt"
  empty.write_text("")
  refuse("split is empty", data__source=empty)
  broken = tmp_path / "broken.model"
  broken.write_bytes(b"\x00not a model")
  refuse("broken.model: not a SentencePiece model", data__tokenizer=broken)
  refuse("is a file", workdir=empty)
  taken = tmp_path / "taken"
  taken.mkdir()
  (taken / "config.json").write_text("{")
  refuse("config.json is not JSON", workdir=taken)


def test_a_tokenizer_larger_than_the_vocabulary(run_main, source, tmp_path):
  from gemma_funnel.data import pipeline

  config = tiny_run.make_config(tmp_path, source)
  pipeline.load_corpus(config.data, 512, tmp_path)
  args = tiny_run.command(
    tmp_path / "run",
    source,
    "--config.model.vocab_size=400",
    f"--config.data.tokenizer={tmp_path / 'tokenizer.model'}",
  )
  _assert_refused(
    run_main(experiment.run, *args[2:]), "512 pieces.* vocab_size=400"
  )


def test_a_workdir_of_another_run(run_main, source, tmp_path):
  from gemma_funnel.training import workdir

  workdir.init_workdir(tiny_run.make_config(tmp_path / "run", source))
  (tmp_path / "run" / "checkpoints").mkdir()
  args = tiny_run.command(tmp_path / "run", source, "--config.seed=7")[2:]
  _assert_refused(run_main(experiment.run, *args), "seed: 0 / 7")


def test_errors_of_the_package_alone_are_lines(run_main):
  def named(config):
    del config
    experiment.trainer.sharding.spec_of("nothing", (1,), None)

  def not_named(config):
    del config
    raise ValueError("a bug")

  def from_elsewhere(config):
    del config
    int("x")

  args = (f"--config={CONFIG}",)
  _assert_refused(run_main(named, *args), "no sharding rule")
  for bug in (not_named, from_elsewhere):
    with pytest.raises(ValueError):
      run_main(bug, *args)


def test_the_configuration_is_handed_on(run_main):
  seen = []
  status, err = run_main(
    seen.append,
    f"--config={CONFIG}",
    "--config.steps=7",
    "--config.data.heldout=x.txt",
    "--config.model.attn_softcap=2",
  )
  assert (status, err) == (0, "")
  (config,) = seen
  assert (config.steps, config.data.heldout) == (7, "x.txt")
  assert config.model.attn_softcap == 2.0


@pytest.mark.slow
def test_a_loss_that_is_not_finite_exits_with_status_two(source, tmp_path):
  args = tiny_run.command(
    tmp_path / "run", source, "--config.optimizer.learning_rate=1e30"
  )
  _, err = tiny_run.finish(tiny_run.start(args), 2)
  _assert_refused((2, err), "is (nan|inf) at step 3; the last good checkpoint")


def test_eval_takes_the_same_flags():
  result = subprocess.run(
    [sys.executable, "eval.py", "--config=configs/eval_accuracy.py"],
    cwd=tiny_run.ROOT,
    env=tiny_run.environment(),
    capture_output=True,
    text=True,
    check=False,
  )
  _assert_refused((result.returncode, result.stderr), "checkpoint is missing")


def test_progress_is_a_line_at_times(monkeypatch, capsys):
  monkeypatch.setattr(cli, "_PROGRESS_SECONDS", 0.0)
  with cli.Progress("loading", 200) as progress:
    progress.add("a", 50)
    progress.add("b", 150)
  lines = capsys.readouterr().err.splitlines()
  assert lines[0].startswith("loading a: 25%, about ")
  assert lines[1] == "loading b: 100%, about 0 s left"
  monkeypatch.setattr(cli, "_PROGRESS_SECONDS", 60.0)
  with cli.Progress("loading", 200) as progress:
    progress.add("a", 200)
  assert capsys.readouterr().err == ""


def test_progress_is_a_bar_on_a_terminal(monkeypatch):
  class Terminal(io.StringIO):
    def isatty(self):
      return True

  terminal = Terminal()
  monkeypatch.setattr(sys, "stderr", terminal)
  with cli.Progress("loading", 3_000_000) as progress:
    progress.add("a", 3_000_000)
  shown = terminal.getvalue()
  assert "loading" in shown and "100%" in shown and "3.0/3.0 MB" in shown


def _from(error, cause):
  error.__cause__ = cause
  return error


FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "runs/a")
ORBAX = ValueError("RESOURCE_EXHAUSTED: writing: No space left on device [28]")


@pytest.mark.parametrize(
  ("error", "status", "said"),
  [
    (FULL, 1, "error: runs/a: No space left on device. "),
    (ORBAX, 1, "error: No space left on device. "),
    (_from(RuntimeError("later"), FULL), 1, "error: runs/a: No space left"),
    (
      OSError(errno.EROFS, os.strerror(errno.EROFS), "b"),
      1,
      "error: b: Read-o",
    ),
    (KeyboardInterrupt(), 130, ""),
    (RuntimeError("a bug"), None, ""),
    (FileNotFoundError(errno.ENOENT, "No such file"), None, ""),
  ],
)
def test_a_disk_that_is_full_is_one_line(error, status, said, capsys):
  def run():
    raise error

  if status is None:
    with pytest.raises(type(error)):
      cli.guard(run)
  else:
    assert cli.guard(run) == status
  told = capsys.readouterr().err
  assert told.startswith(said) and told.count("\n") == bool(said)


def test_a_folder_of_a_disk_for_reading_alone(capsys, monkeypatch):
  def refuse(*args):
    raise OSError(errno.EROFS, os.strerror(errno.EROFS))

  monkeypatch.setattr(os, "open", refuse)
  assert cli.guard(lambda: locks.Lock("x/.lock", "workdir=x").__enter__()) == 1
  told = capsys.readouterr().err
  assert told.startswith(
    "error: workdir=x cannot be written to: Read-only file"
  )


def test_a_stack_is_shown_on_request(monkeypatch):
  monkeypatch.setenv("GEMMA_FUNNEL_TRACEBACK", "1")

  def run():
    raise FULL

  with pytest.raises(OSError):
    cli.guard(run)
