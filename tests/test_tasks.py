"""Tasks as a whole: keys, splits, samples and names."""

import json

import pytest

from gemma_funnel import tasks
from gemma_funnel.tasks import examples, metrics
from gemma_funnel.tasks.task import KINDS


def _write(tmp_path, name, count, start=0):
  """Rows sorted by class: a first part would have one class alone."""
  rows = [
    {"text": f"t{i}", "label": "a" if i < start + count // 2 else "b"}
    for i in range(start, start + count)
  ]
  path = tmp_path / name
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return str(path)


def _config(tmp_path, **keys):
  config = tasks.default_config()
  config.update(kind="classification", text="text", label="label")
  config.train = _write(tmp_path, "train.jsonl", 100)
  config.test = _write(tmp_path, "test.jsonl", 60, 1000)
  config.update(keys)
  return config


def _texts(task, split):
  return [example.text for example in task.splits[split]]


def test_dev_is_taken_from_train(tmp_path):
  task = tasks.load(_config(tmp_path, dev_fraction=0.2))
  train, dev = _texts(task, "train"), _texts(task, "dev")
  assert (len(train), len(dev)) == (80, 20)
  assert sorted(train + dev) == sorted(f"t{i}" for i in range(100))
  # Of both classes, though the file is sorted.
  assert 3 < sum(e.label for e in task.splits["dev"]) < 17
  assert list(task.splits) == ["train", "dev", "test"]
  dev = _write(tmp_path, "dev.jsonl", 10, 500)
  task = tasks.load(_config(tmp_path, dev=dev))
  assert len(_texts(task, "train")) == 100
  assert _texts(task, "dev") == [f"t{i}" for i in range(500, 510)]


def test_samples_are_seeded_and_of_all_rows(tmp_path):
  keys = dict(max_train=30, max_dev=5, max_test=20)
  task = tasks.load(_config(tmp_path, **keys))
  sizes = {split: len(part) for split, part in task.splits.items()}
  assert sizes == {"train": 30, "dev": 5, "test": 20}
  assert 5 < sum(e.label for e in task.splits["train"]) < 25
  assert 3 < sum(e.label for e in task.splits["test"]) < 17
  # Pinned: the same rows on every machine and in every version of Python.
  assert _texts(task, "dev") == ["t10", "t13", "t63", "t90", "t93"]
  again = tasks.load(_config(tmp_path, **keys))
  assert again == task
  other = tasks.load(_config(tmp_path, **keys, split_seed=1))
  assert _texts(other, "test") != _texts(task, "test")
  assert other.labels == task.labels


def test_generative_kinds_need_a_test_alone(tmp_path):
  config = _config(tmp_path, kind="perplexity", label=None, train=None)
  assert list(tasks.load(config).splits) == ["test"]
  config.train = config.test
  task = tasks.load(config)
  assert list(task.splits) == ["train", "test"]
  assert len(task.splits["train"]) == 60


def test_names_and_metrics(tmp_path):
  (tmp_path / "news").mkdir()
  config = _config(tmp_path / "news", metrics="matthews, accuracy")
  task = tasks.load(config)
  assert task.name == "news"
  assert task.metrics == ("matthews", "accuracy")
  config.name = "News"
  assert tasks.load(config).name == "News"


def test_files_of_one_folder_have_names_of_their_own(tmp_path, capsys):
  names = []
  for file in ("amazon.jsonl", "imdb.jsonl", "test_2.jsonl", "latest.jsonl"):
    test = _write(tmp_path, file, 60)
    names.append(tasks.load(_config(tmp_path, test=test)).name)
  assert names == ["amazon", "imdb", tmp_path.name, "latest"]
  assert capsys.readouterr().err == ""
  tasks.load(_config(tmp_path, test=_config(tmp_path).train))
  assert "train and test are both" in capsys.readouterr().err


@pytest.mark.parametrize(
  ("keys", "message"),
  [
    ({"format": "parquet"}, "format='parquet': expected one of"),
    ({"kind": "ner"}, "kind='ner': expected one of"),
    ({"test": None}, "test is not set: name the file"),
    ({"train": None}, "train is not set: name its file"),
    ({"dev_fraction": 0.0}, "dev_fraction=0.0: expected"),
    ({"dev_fraction": 1.0}, "dev_fraction=1.0: expected"),
    ({"dev_fraction": float("nan")}, "dev_fraction=nan: expected"),
    ({"max_dev": 0}, "max_dev=0: expected an integer >= 1"),
    ({"on_bad": "drop"}, "on_bad='drop'"),
    ({"metrics": "bleu"}, "metric 'bleu'"),
    ({"metrics": "span_f1"}, "metric 'span_f1': not of kind"),
    ({"dataset": "glue/sst2"}, "dataset='glue/sst2': format='table' does not"),
    ({"separator": "tab"}, "separator='tab': format='table' does not use it"),
    ({"format": "conll"}, "text='text': format='conll' does not use it"),
    ({"format": "code_tags"}, "format='code_tags' does not use it"),
    ({"format": "conll", "text": None, "label": None}, "is 'tagging'"),
  ],
)
def test_keys(tmp_path, keys, message):
  with pytest.raises(ValueError, match=message):
    tasks.load(_config(tmp_path, **keys))


def test_train_too_small_to_divide(tmp_path):
  path = _write(tmp_path, "one.jsonl", 1)
  with pytest.raises(ValueError, match="train has 1 example, too few"):
    tasks.load(_config(tmp_path, train=path, test=path))


def test_every_kind_of_a_table_has_metrics_that_fit():
  for kind, spec in examples.KINDS.items():
    assert kind in KINDS
    metrics.check_names(spec.metrics, kind)


@pytest.mark.parametrize("name", tasks.PRESETS)
def test_a_preset_has_the_keys_of_every_task(name):
  config, default = tasks.preset(name), tasks.default_config()
  assert config.keys() == default.keys()
  assert config.format in tasks.FORMATS
  changed = {k for k in config if config[k] != default[k]}
  sizes = {"max_train", "max_dev", "max_test"}
  assert changed <= {"format", "dataset", "kind", "choices", "group", *sizes}
  found = config.max_train, config.max_dev, config.max_test
  assert sizes.isdisjoint(changed) or found == (2000, 300, 600)
  assert tasks.preset(name) is not config  # One's changes are not another's.
  config.max_train = 5  # A placeholder takes a value of its type.
  with pytest.raises(TypeError):
    config.max_train = "all"


def test_presets_by_name():
  assert len(set(tasks.GLUE)) == 9
  for name, dataset in (("stsb", "glue/stsb"), ("conll2003", "conll2003")):
    config = tasks.preset(name)
    assert (config.format, config.dataset) == ("tfds", dataset)
  with pytest.raises(ValueError, match="task='cola2': expected one of .*cola"):
    tasks.preset("cola2")
