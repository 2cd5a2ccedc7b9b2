"""The command line: a mistake is one line, not a traceback."""

import errno
import importlib.util
import io
import os
import re
import runpy
import subprocess
import sys
import tempfile

import pytest
import tiny_run

from gemma_funnel import cli, config_file, evaluation, experiment, locks, tasks
from gemma_funnel.data import pipeline, tokenize
from gemma_funnel.evaluation import finetuned, latency
from gemma_funnel.evaluation import training as evaluation_training
from gemma_funnel.tasks import task
from gemma_funnel.training import finetune, pretrain


@pytest.fixture(scope="module")
def source(tmp_path_factory):
  return tiny_run.write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture
def run_main(monkeypatch, capsys):
  """cli.main in this process: (status, stderr)."""

  def call(run, *args, command="train.py"):
    monkeypatch.setattr(sys, "argv", [command, *args])
    capsys.readouterr()
    try:
      cli.main(run, command)
      status = 0
    except SystemExit as stop:
      status = stop.code
    return status, capsys.readouterr().err

  return call


def _assert_refused(result, text):
  status, err = result
  assert status == 2
  assert re.fullmatch(rf"error: .*{text}.*\n", err), err


@pytest.mark.parametrize(
  "argument, text",
  [
    ("--config.funnel=start=2,stop=2", "funnel.start=2 .*funnel.stop=2"),
    ("--config.funnel=start=1,stop=3", "funnel.stop=3 is past .* 2 layers"),
    ("--config.funnel=start=1,stride=0", "funnel.stride=0"),
    ("--config.funnel=start=1,stried=2", r"no field \['stried'\]; .*'stride'"),
    ("--config.funnel=start=1 stride=2", "joined by commas"),
    ("--config.funnel=start=1;stride=2", "joined by commas"),
    ("--config.funnel=start=0+start=0", "two funnel stages start at layer 0"),
    ("--config.funnel=start=1,recover=none", "recover='none' leaves .* short"),
    ("--config.funnel=2", "'2' is not key=value"),
    ("--config.length=66", "length=66 is beyond model.max_length=64"),
    ("--config.batch_size=12", "batch_size=12 must be a multiple of 8"),
    (
      "--config.mesh.data=3",
      "mesh.data=3 does not divide 8 devices: .* such as mesh.data=8",
    ),
    ("--config.mesh.fsdp=16", "product is 8, such as mesh.fsdp=8"),
    ("--config.optimizer.warmup_steps=30", "steps=30: .* below steps=12"),
    ("--config.wandb=funnels", "needs the package wandb; expected pip"),
    ("--config.mesh.tensor=8", "tensor=8 does not divide 4"),
    ("--config.data.source=/nowhere/*.txt", "no file matches"),
    ("--config.data.tokenizer=/nowhere", "/nowhere: cannot be read"),
    ("--config.optimizer.b1=2", "optimizer.b1=2"),
  ],
)
def test_a_mistake_is_one_line(
  argument, text, run_main, source, tmp_path, monkeypatch
):
  monkeypatch.setitem(sys.modules, "wandb", None)
  args = tiny_run.command(tmp_path / "run", source, argument)[2:]
  _assert_refused(run_main(experiment.run, *args), text)
  assert not (tmp_path / "run" / "checkpoints").exists()


QUICK = "--config=quickstart"


@pytest.mark.parametrize(
  ("command", "arguments", "said"),
  [
    # No file, another one, or one that is not there.
    ("train.py", [], "expected --config=FILE, .* quickstart, finetune"),
    ("eval.py", [], "of configs/: eval_accuracy, eval_damage, eval_latency"),
    ("train.py", ["--config"], "--config has no value"),
    ("train.py", ["--config="], "expected --config=FILE"),
    ("train.py", [QUICK, QUICK], "--config is given twice"),
    ("train.py", ["--config=configs/quickstrat.py"], "mean .*quickstart.py"),
    ("train.py", ["--config=Quickstart"], "mean .*quickstart.py"),
    ("train.py", ["--config=nowhere"], "no such file; expected .* finetune"),
    ("train.py", ["--config=setup.cfg"], "expected a Python file"),
    ("train.py", ["--config=gs://b/a.py"], "no such file"),
    ("train.py", ["--config=quickstart:x"], "takes no argument"),
    ("eval.py", ["--config=eval_latency:gema"], "line .* preset='gema'"),
    ("eval.py", ["--config=eval_task:hellaswag"], "expected one of .*blimp"),
    # Words, and flags that are none.
    ("train.py", ["configs/quickstart.py"], "--config=configs/quickstart.py"),
    ("train.py", ["finetune:table"], "mean --config=finetune:table"),
    ("train.py", [QUICK, "steps=1"], "mean --config.steps=1"),
    ("train.py", [QUICK, "word"], "unexpected argument 'word'"),
    ("train.py", ["--steps=10"], "mean --config.steps"),
    ("train.py", ["--learning-rate=1"], "mean --config.optimizer.learning"),
    ("train.py", ["--num-layers=1"], "mean --config.model.num_layers"),
    ("eval.py", ["--checkpoint=x"], "mean --config.checkpoint"),
    ("train.py", ["--confg=x"], "mean --config"),
    ("train.py", ["--confg.steps=3"], "mean --config.steps"),
    ("train.py", ["--xyzzy"], "unknown flag --xyzzy; --help lists all"),
    ("train.py", [QUICK, "--num-processes=x"], "'x': expected an integer"),
    # Keys that are none.
    ("train.py", [QUICK, "--config.lr=1"], "optimizer.learning_rate"),
    (
      "train.py",
      [QUICK, "--config.optimizer.lr=1"],
      "optimizer has no key 'lr'",
    ),
    ("train.py", [QUICK, "--config.batch=1"], "mean --config.batch_size"),
    ("train.py", [QUICK, "--config.num_layers=1"], "--config.model.num_layers"),
    ("train.py", [QUICK, "--config.modle.window=3"], "--config.model.window"),
    ("train.py", [QUICK, "--config.model.num_layer=3"], "model.num_layers"),
    ("train.py", [QUICK, "--config.xyzzy=3"], "no key 'xyzzy'; it has: "),
    ("train.py", [QUICK, "--config.steps.x=3"], "steps=280 has no keys"),
    ("train.py", [QUICK, "--config.=3"], "has no key ''"),
    # Values of another type.
    ("train.py", [QUICK, "--config.steps"], "--config.steps has no value"),
    ("train.py", [QUICK, "--config.steps=ten"], "=ten: expected an integer"),
    ("train.py", [QUICK, "--config.steps=1e3"], "=1e3: expected an integer"),
    ("train.py", [QUICK, "--config.steps=True"], "expected an integer"),
    ("train.py", [QUICK, "--config.z_loss=small"], "=small: expected a number"),
    ("train.py", [QUICK, "--config.tensorboard=2"], "expected true or false"),
    ("train.py", [QUICK, "--config.keep_period=x"], "an integer, or None"),
    ("train.py", [QUICK, "--config.optimizer.b1=x"], "a number, or None"),
    ("train.py", [QUICK, "--config.profile_steps=(1"], "expected a tuple"),
    ("train.py", [QUICK, "--config.optimizer=adam"], "is a group of keys"),
    ("train.py", [QUICK, "--config.model=gemma4"], "preset.* 'gemma2_2b'"),
    # Configurations of other commands.
    ("train.py", ["--config=eval_latency"], "python eval.py --config=eval_la"),
    ("train.py", ["--config=ablation_quick"], "python -m gemma_funnel.study"),
    ("train.py", ["--config=tokenize"], "python -m gemma_funnel.data.tokenize"),
    ("eval.py", [QUICK], "python train.py --config=quickstart"),
    ("tpu/plan.py", ["--config=finetune"], "python train.py"),
    ("-m gemma_funnel.study", ["--config=eval_task"], "python eval.py"),
    # Places that are not read.
    ("train.py", [QUICK, "--config.workdir=gs:/a"], "expected gs://BUCKET"),
    ("train.py", [QUICK, "--config.workdir=gs:"], "expected gs://BUCKET"),
    ("train.py", [QUICK, "--config.workdir=s3://a/b"], "install s3fs"),
    ("train.py", [QUICK, "--config.data.source=a,s3://a/b"], "install s3fs"),
    ("train.py", [QUICK, "--config.workdir=hf://a/b"], "by init_from and che"),
    ("eval.py", ["--config=eval_task", "--config.out=https://a/b"], "download"),
  ],
)
def test_a_wrong_command_is_told_of(command, arguments, said, run_main):
  never = lambda config: pytest.fail(f"run with {config}")
  _assert_refused(run_main(never, *arguments, command=command), said)


@pytest.mark.parametrize(
  ("arguments", "key", "expected"),
  [
    (["--config.z-loss=1"], "z_loss", 1.0),
    (["--config.steps", "7"], "steps", 7),
    (["--config.steps=3", "--config.steps=4"], "steps", 4),
    (["--config.seed", "-1"], "seed", -1),
    (["--config.tensorboard=False"], "tensorboard", False),
    (["--config.tensorboard", "no"], "tensorboard", False),
    (["--noconfig.tensorboard"], "tensorboard", False),
    (["--config.stochastic=x"], None, None),
    (["--config.optimizer.stochastic_rounding"], "optimizer", True),
    (["--config.keep_period=3"], "keep_period", 3),
    (["--config.keep_period=None"], "keep_period", None),
    (["--config.model.attn_softcap=None"], "model.attn_softcap", None),
    (["--config.model.attn_softcap=2"], "model.attn_softcap", 2.0),
    (["--config.model.embed_scale=2"], "model.embed_scale", 2),
    (["--config.profile_steps=1,2"], "profile_steps", (1, 2)),
    (["--config.funnel_sampled=off"], "funnel_sampled", ("off",)),
    (["--config.funnel_sampled=('off', 'x')"], "funnel_sampled", ("off", "x")),
    (["--config.data.heldout=x.txt"], "data.heldout", "x.txt"),
    (["--config.workdir=file:///a/b"], "workdir", "/a/b"),
    (["--config.data.source=a=b,file:///c"], "data.source", "a=b,/c"),
    # A preset, and one of its keys, in whatever order.
    (["--config.model=gemma2_9b"], "model.embed_dim", 3584),
    (["--config.model=llama3.2_1b"], "model.rope_scaling.factor", 32.0),
    (
      ["--config.model=llama3.1_8b", "--config.model=tiny"],
      "model.rope_scaling",
      None,
    ),
    (
      ["--config.model.window=3", "--config.model=gemma1_2b"],
      "model.window",
      3,
    ),
  ],
)
def test_values_of_keys(arguments, key, expected, run_main):
  seen = []
  status, err = run_main(seen.append, QUICK, *arguments)
  if key is None:
    assert status == 2
    return
  assert (status, err) == (0, "")
  (config,) = seen
  for name in key.split("."):
    config = config[name]
  if key == "optimizer":
    config = config.stochastic_rounding
  assert config == expected and type(config) is type(expected)


@pytest.mark.parametrize(
  ("text", "said"),
  [
    ("\ndef get_config(:\n", r"{file}, line 2: "),
    ("import nothing_of_that_name", "{file}, line 1: ModuleNotFoundError: "),
    ("def get_config():\n  raise ValueError('a\\nb')", "{file}, line 2: a b"),
    ("def get_config():\n  return {}['x']", "{file}, line 2: KeyError: 'x'"),
    ("x = 1", "{file} has no function get_config"),
    ("get_config = 1", "{file} has no function get_config"),
    (
      "get_config = lambda: {}",
      "{file}: .* returned a dict: expected a ml_coll",
    ),
    ("def get_config(): pass", "returned a NoneType: expected a ml_coll"),
    ("def get_config(size): pass", "takes an argument, .*:ARGUMENT"),
    (
      "import ml_collections\nget_config = ml_collections.ConfigDict",
      "has no key 'optimizer', as those of train.py have; such as quickstart",
    ),
    ("\0", "{file}: "),
  ],
)
def test_config_files_that_cannot_be_loaded(text, said, run_main, tmp_path):
  file = tmp_path / "file.py"
  file.write_text(text)
  result = run_main(print, f"--config={file}", "--config.steps=3")
  _assert_refused(result, said.format(file=file))


def test_a_config_of_another_folder(run_main, tmp_path, monkeypatch):
  """It imports its neighbour, and raises a stack on request."""
  (tmp_path / "neighbour.py").write_text("STEPS = 5\n")
  (tmp_path / "mine.py").write_text(
    "import ml_collections, neighbour\n"
    "def get_config(scale='1'):\n"
    "  steps = neighbour.STEPS * int(scale)\n"
    "  return ml_collections.ConfigDict(dict(optimizer={}, steps=steps))\n"
  )
  monkeypatch.chdir(tmp_path)
  for given, steps in (
    ("mine.py", 5),
    ("mine", 5),
    (f"{tmp_path}/mine.py:3", 15),
    ("./mine.py:2", 10),
  ):
    seen = []
    assert run_main(seen.append, f"--config={given}") == (0, "")
    assert seen[0].steps == steps
  # Ours are found from wherever the command is called.
  assert run_main(seen.append, "--config=configs/quickstart.py") == (0, "")
  monkeypatch.setenv("GEMMA_FUNNEL_TRACEBACK", "1")
  with pytest.raises(ValueError, match="mine.py, line 3: invalid literal"):
    run_main(print, "--config=mine.py:x")


@pytest.mark.parametrize(
  ("command", "keys"),
  [
    ("train.py", ["optimizer.learning_rate=0.003", "keep_period=(unset, int)"]),
    ("train.py", ["task.dev_fraction=0.1", "epochs=4.0"]),
    ("eval.py", ["chunk=512", "decode.new_tokens=128", "few_shot=0"]),
    ("-m gemma_funnel.study", ["axes.seed=(0, 1)"]),
    ("-m gemma_funnel.data.tokenize", ["source=stdlib"]),
  ],
)
def test_help_lists_flags_and_keys(
  command, keys, run_main, capsys, monkeypatch
):
  monkeypatch.setattr(sys, "argv", [command, "--help"])
  with pytest.raises(SystemExit) as stop:
    cli.main(print, command)
  told = capsys.readouterr()
  assert stop.value.code == 0 and told.err == ""
  assert "--process_id" in told.out and "(default: off)" in told.out
  for key in keys:
    assert f"--config.{key}" in told.out


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
  refuse("config.json cannot be read: Expecting", workdir=taken)


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

  args = (QUICK,)
  _assert_refused(run_main(named, *args), "no sharding rule")
  for bug in (not_named, from_elsewhere):
    with pytest.raises(ValueError):
      run_main(bug, *args)


@pytest.mark.slow
def test_a_loss_that_is_not_finite_exits_with_status_two(source, tmp_path):
  args = tiny_run.command(
    tmp_path / "run", source, "--config.optimizer.learning_rate=1e30"
  )
  _, err = tiny_run.finish(tiny_run.start(args), 2)
  _assert_refused((2, err), "is (nan|inf) at step 3; the last good checkpoint")


_INTEGERS = ("0", "-1", f"{2**31 - 1}", f"{10**20}", "9" * 400)
_NUMBERS = ("0", "-1", "1e30", "nan", "inf", "-inf", "1e-320", "None")
_TUPLES = ("()", "(0,)", "(-1,)", f"({10**20},)", "('x',)", "(1.5,)", "((1,),)")
_ABSURD = {
  bool: ("False", "True"),
  int: _INTEGERS,
  float: _NUMBERS,
  str: ("", "\x1b[31m", "None", "-1", "a/b", "(", "*", "x" * 5000),
  tuple: (*_TUPLES, "(None,)", "(1, 2, 3)", "x"),
  type(None): (*_NUMBERS, f"{10**20}", "x", "(1,)"),
}


class _End(Exception):
  """All has been checked: what takes long would begin."""


def _resolve_finetuning(config):
  text = task.TextExample("ab ba", None, 1)
  made = task.Task(
    "t",
    "classification",
    ("a", "b"),
    ("accuracy",),
    dict.fromkeys(task.SPLITS, (text,) * 320),
  )
  for seed in config.seeds:
    finetune.resolve(finetuned.of_seed(config, seed), made)


def _read_data(config):
  pipeline.load_corpus(config.data, 512, config.workdir)


def _evaluate(config):
  with pytest.MonkeyPatch.context() as patch:
    for module, name in (
      (latency, "random_model"),
      (evaluation_training, "_Steps"),
    ):
      patch.setattr(module, name, _raise_end)
    evaluation.run(config)


def _raise_end(*args):
  raise _End


@pytest.mark.parametrize(
  ("name", "only", "resolve"),
  [
    ("quickstart", "", pretrain.resolve),
    ("quickstart", "data.", _read_data),
    ("finetune", "", _resolve_finetuning),
    ("finetune", "task.", lambda config: tasks.load(config.task)),
    ("eval_latency", "", _evaluate),
    ("eval_training", "", _evaluate),
    ("tokenize", "", tokenize.tokenize),
  ],
  ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_absurd_value_of_any_key_is_named(
  name, only, resolve, source, tmp_path, monkeypatch
):
  """All ends well, or in a mistake that the package names."""
  monkeypatch.chdir(tmp_path)
  tokenizer = tmp_path / "t.model"
  if only == "data." or name == "tokenize":
    pipeline.load_corpus(
      tiny_run.make_config(".", source).data, 512, str(tmp_path)
    )
    tokenizer = tmp_path / "tokenizer.model"
  rows = [f"w{i} a\t{'ab'[i % 2]}\n" for i in range(40)]
  (tmp_path / "t.tsv").write_text("".join(["text\tlabel\n", *rows]))
  base = config_file.load(name)

  def changed(key, text):
    config = config_file.load(name)
    config.update_from_flattened_dict(
      {
        "quickstart": {"data.source": source, "data.tokenizer": str(tokenizer)},
        "finetune": {
          f"task.{key}": value
          for key, value in dict(
            kind="classification",
            format="table",
            text="text",
            label="label",
            train="t.tsv",
            test="t.tsv",
          ).items()
        },
        "tokenize": {
          "source": source,
          "tokenizer": str(tokenizer),
          "out": tempfile.mktemp(dir=tmp_path),
        },
      }.get(name, {})
    )
    config_file.set_key(config, key, text)
    config_file.check_paths(config)
    return config

  for key, group, end in config_file.leaves(base):
    for text in _ABSURD[group.get_type(end)] if key.startswith(only) else ():
      try:
        resolve(changed(key, text))
      except _End:
        pass
      except ValueError as error:
        assert cli.is_named(error), f"{key}={text}: {error!r}"
      except (MemoryError, OSError) as error:
        assert isinstance(error, MemoryError) or error.filename
      except Exception as error:
        raise AssertionError(f"{key}={text}: {error!r}") from error


def test_the_package_lists_its_commands(monkeypatch, capsys):
  monkeypatch.setattr(sys, "argv", ["gemma_funnel"])
  with pytest.raises(SystemExit) as stop:
    runpy.run_module("gemma_funnel", run_name="__main__")
  told = capsys.readouterr().out
  assert stop.value.code == 0
  named = re.findall(r"^  python (\S+\.py|-m \S+) ", told, re.MULTILINE)
  assert len(named) == 9
  for name in named:
    if name.endswith(".py"):
      assert (tiny_run.ROOT / name).exists()
    else:
      assert importlib.util.find_spec(name.removeprefix("-m "))


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
    (PermissionError(errno.EACCES, "No", "a\nb"), 2, "error: a b: No"),
    (MemoryError("Unable to"), 1, "error: not enough memory: Unable to"),
    (
      RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating"),
      1,
      "error: not enough memory: RESOURCE_EXHAUSTED",
    ),
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
  assert told.startswith("error: workdir=x cannot be written: Read-only file")


def test_a_stack_is_shown_on_request(monkeypatch):
  monkeypatch.setenv("GEMMA_FUNNEL_TRACEBACK", "1")

  def run():
    raise FULL

  with pytest.raises(OSError):
    cli.guard(run)
