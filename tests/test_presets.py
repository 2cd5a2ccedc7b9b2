"""Presets: every name is a configuration that the reader takes."""

import pytest

from gemma_funnel import tasks
from gemma_funnel.tasks import presets


@pytest.mark.parametrize("name", presets.PRESETS)
def test_a_preset_has_the_keys_of_every_task(name):
  config, default = presets.preset(name), tasks.default_config()
  assert config.keys() == default.keys()
  assert config.format in tasks.FORMATS
  changed = {k for k in config if config[k] != default[k]}
  allowed = {
    "format",
    "dataset",
    "kind",
    "choices",
    "group",
    "max_train",
    "max_dev",
    "max_test",
  }
  assert changed <= allowed
  assert presets.preset(name) is not config  # One's changes are not another's.


def test_there_are_nine_tasks_of_glue():
  assert len(set(presets.GLUE)) == 9
  assert presets.preset("stsb").dataset == "glue/stsb"
  assert presets.preset("stsb").format == "tfds"
  assert presets.preset("conll2003").dataset == "conll2003"


def test_minimal_pairs_are_read_by_their_columns(tmp_path):
  config = presets.preset("blimp")
  path = tmp_path / "pairs.jsonl"
  path.write_text(
    '{"sentence_good": "she runs", "sentence_bad": "she run", "UID": "verb"}\n'
  )
  config.test = str(path)
  task = tasks.load(config)
  (example,) = task.splits["test"]
  assert task.kind == "choice" and example.choices == ("she runs", "she run")
  assert (example.answer, example.group, example.prompt) == (0, "verb", "")


def test_tasks_without_files_are_small_ones():
  for name in ("code_tags", "code_packages"):
    config = presets.preset(name)
    assert (config.max_train, config.max_dev, config.max_test) == (
      2000,
      300,
      600,
    )


def test_no_such_preset():
  with pytest.raises(ValueError, match="task 'cola2': expected one of .*cola"):
    presets.preset("cola2")
