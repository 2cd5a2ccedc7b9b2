"""Two commands that write to one place: one works, the other says who does."""

import os
import pathlib

import pytest
import tiny_checkpoints
import tiny_run
import tiny_study

from gemma_funnel import convert, locks
from gemma_funnel.data import sources, tokenize
from gemma_funnel.data import tokenizer as tokenizer_lib
from gemma_funnel.study import runner


@pytest.fixture(autouse=True)
def _one_device(monkeypatch):
  tiny_run.use_one_device(monkeypatch)


def _train(folder, patch):
  config = tiny_run.make_config(
    folder / "run", tiny_run.write_corpus(folder), steps=3
  )
  return lambda: tiny_run.train(config), folder / "run" / "checkpoints" / "3"


def _study(folder, patch):
  patch.setattr(
    runner, "_run", lambda made: (folder / "study" / "x").write_text("x")
  )
  text, tasks = tiny_run.write_corpus(folder), tiny_study.write_tasks(folder)
  config = tiny_study.make_study(folder / "study", text, tasks)
  return lambda: runner.run(config), folder / "study" / "x"


def _tokenize(folder, patch):
  text = tiny_run.write_corpus(folder)
  given = folder / "given.model"
  tokenizer_lib.train(sources.load(str(text)), 280, given)
  config = tiny_run.load_config("tokenize")
  config.update(source=str(text), tokenizer=str(given), shards=1)
  config.out = str(folder / "ids")
  return lambda: tokenize.tokenize(config), folder / "ids" / "metadata.json"


def _convert(folder, patch):
  source = folder / "source"
  source.mkdir()
  raw = tiny_checkpoints.GEMMA2
  tensors = tiny_checkpoints.random_tensors(raw)
  tiny_checkpoints.write(source, raw, tensors)
  target = folder / "target"
  return lambda: convert.convert(source, target, to="orbax"), target


@pytest.mark.parametrize(
  "command",
  [
    pytest.param(_train, id="train"),
    pytest.param(_study, id="study"),
    pytest.param(_tokenize, id="tokenize"),
    pytest.param(_convert, id="convert"),
  ],
)
def test_the_second_is_told_who_holds_the_folder(
  command, tmp_path, monkeypatch
):
  run, written = command(tmp_path, monkeypatch)
  enter, told = locks.Lock.__enter__, []

  def enter_and_run_again(self):
    held = enter(self)
    monkeypatch.setattr(locks.Lock, "__enter__", enter)
    with pytest.raises(locks.HeldError) as refused:
      run()
    told.append(str(refused.value))
    return held

  monkeypatch.setattr(locks.Lock, "__enter__", enter_and_run_again)
  run()
  assert pathlib.Path(written).exists()
  (line,) = told
  assert f"in use by process {os.getpid()} on" in line and "\n" not in line
