"""TFDS sets that are prepared as array_record, read without tensorflow."""

import os
import subprocess
import sys

import numpy as np
import pytest

tfds = pytest.importorskip("tensorflow_datasets")
pytest.importorskip("array_record")

from made_tfds import TEXT, prepare, prepare_sst2

from gemma_funnel import tasks
from gemma_funnel.data import tfds as prepared
from gemma_funnel.tasks import tfds as reader
from gemma_funnel.tasks.task import TextExample


def _load(data_dir, dataset, **keys):
  config = tasks.default_config()
  config.update(format="tfds", dataset=dataset, data_dir=str(data_dir), **keys)
  return tasks.load(config)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
  """GLUE's names and columns, with texts of our own."""
  root = tmp_path_factory.mktemp("tfds")
  prepare_sst2(root)
  rows = [
    {"sentence1": f"a {i}", "sentence2": f"b {i}", "label": i / 2}
    for i in range(10)
  ]
  features = {"sentence1": TEXT, "sentence2": TEXT, "label": np.float32}
  splits = {"train": rows, "validation": rows[:4]}
  prepare(root, "glue/stsb", features, splits)
  names = ["entailment", "neutral", "contradiction"]
  rows = [{"premise": "p", "hypothesis": "", "label": i % 3} for i in range(9)]
  label = tfds.features.ClassLabel(names=names)
  features = {"premise": TEXT, "hypothesis": TEXT, "label": label}
  splits = {
    f"validation_{k}matched": rows[:n] for k, n in (("", 3), ("mis", 5))
  }
  prepare(root, "glue/mnli", features, {"train": rows, **splits})
  tags = tfds.features.ClassLabel(names=["O", "B-PER", "I-PER"])
  features = {"tokens": TEXT, "ner": tags}
  features = {k: tfds.features.Sequence(v) for k, v in features.items()}
  words = [
    {"tokens": [], "ner": []},
    {"tokens": ["Ana", "Ruiz", "ran"], "ner": [1, 2, 0]},
    {"tokens": ["She", "ran"], "ner": [0, 0]},
  ]
  splits = {"train": words, "dev": words[1:], "test": words[:2]}
  prepare(root, "conll2003", features, splits)
  return root


class TestGlue:
  def test_official_splits_and_metrics(self, data_dir):
    task = _load(data_dir, "glue/sst2")
    assert task.name == "glue/sst2"
    assert task.labels == ("negative", "positive")
    assert task.metrics == ("accuracy",)
    sizes = {split: len(part) for split, part in task.splits.items()}
    assert sizes == {"train": 18, "dev": 2, "test": 6}
    assert set(task.splits["test"]) == {
      TextExample(f"text é {i}", None, i % 2) for i in range(100, 106)
    }
    both = {e.text for s in ("train", "dev") for e in task.splits[s]}
    assert both == {f"text é {i}" for i in range(20)}

  def test_pairs_and_numbers(self, data_dir):
    task = _load(data_dir, "glue/stsb")
    assert task.kind == "regression" and task.labels == ()
    assert task.metrics == ("pearson", "spearman")
    assert TextExample("a 3", "b 3", 1.5) in task.splits["test"]

  def test_mismatched_on_request(self, data_dir):
    assert len(_load(data_dir, "glue/mnli").splits["test"]) == 3
    task = _load(data_dir, "glue/mnli", test="validation_mismatched")
    assert len(task.splits["test"]) == 5
    assert task.splits["test"][0].second == ""

  def test_all_nine(self):
    glue = {k.split("/")[1]: v for k, v in reader.DATASETS.items() if "/" in k}
    main = dict.fromkeys(tasks.GLUE, "accuracy")
    main |= dict(cola="matthews", mrpc="f1", qqp="f1", stsb="pearson")
    assert {name: spec.metrics[0] for name, spec in glue.items()} == main

  def test_columns_are_those_tfds_has(self):
    """The builders that TFDS comes with name the same columns."""
    from tensorflow_datasets.text import glue

    configs = {c.name: c for c in glue.Glue.BUILDER_CONFIGS}
    for name, known in reader.DATASETS.items():
      if not name.startswith("glue/"):
        continue
      columns = {known.text, known.second} - {None}
      assert columns == set(configs[name.split("/")[1]].text_features)


def test_conll2003(data_dir):
  task = _load(data_dir, "conll2003")
  assert task.labels == ("O", "B-PER", "I-PER")
  assert task.metrics[0] == "span_f1"
  sizes = {split: len(part) for split, part in task.splits.items()}
  assert sizes == {"train": 2, "dev": 2, "test": 1}
  (example,) = task.splits["test"]
  assert example.words == ("Ana", "Ruiz", "ran")
  assert example.tags == (1, 2, 0)


def test_any_other_set(tmp_path):
  features = {"body": TEXT, "stars": np.int64}
  rows = [{"body": "x", "stars": s} for s in (10, 9, 10, 9)]
  prepare(tmp_path, "reviews", features, {"train": rows, "test": rows[:2]})
  keys = dict(text="body", label="stars", test="test", train="train")
  task = _load(tmp_path, "reviews", **keys, dev="train[50%:]")
  assert task.labels == ("9", "10")
  assert task.metrics == ("accuracy", "macro_f1")
  assert len(task.splits["dev"]) == 2
  with pytest.raises(ValueError, match="test is not set.*'reviews'"):
    _load(tmp_path, "reviews", **{**keys, "test": None})
  with pytest.raises(ValueError, match=r"text='nobody'.*\['body', 'stars'\]"):
    _load(tmp_path, "reviews", **{**keys, "text": "nobody"})
  with pytest.raises(ValueError, match="kind='tagging'.*'classification'"):
    _load(tmp_path, "reviews", **keys, kind="tagging")


@pytest.mark.parametrize(
  ("split", "message"),
  [
    ("test", "example 0: found the label -1, .*hidden"),
    ("dev", "test='dev'.*Unknown split.*validation"),
  ],
)
def test_splits_that_do_not_do(data_dir, split, message):
  with pytest.raises(ValueError, match=message):
    _load(data_dir, "glue/sst2", test=split)


@pytest.mark.parametrize("dataset", ["glue/cola", "nothing", "glue"])
def test_not_prepared(data_dir, dataset):
  keys = dict(text="x", label="y", train="train", test="test")
  with pytest.raises(ValueError) as caught:
    _load(data_dir, dataset, **keys)
  message = str(caught.value)
  assert f"dataset={dataset!r}: cannot be read from data_dir" in message
  assert str(data_dir) in message and "\n" not in message
  assert f"tfds.builder('{dataset}'" in message
  assert "file_format='array_record').download_and_prepare()" in message


def test_prepared_as_tfrecord(data_dir, tmp_path):
  """As TFDS does by default: what is said then is how to do it again."""
  import json
  import shutil

  shutil.copytree(data_dir / "glue", tmp_path / "glue")
  (path,) = tmp_path.glob("glue/sst2/*/dataset_info.json")
  info = json.loads(path.read_text())
  info["fileFormat"] = "tfrecord"
  path.write_text(json.dumps(info))
  for file in path.parent.glob("*.array_record-*"):
    file.rename(str(file).replace("array_record", "tfrecord"))
  with pytest.raises(ValueError, match="cannot be read.*as array_record"):
    _load(tmp_path, "glue/sst2")


def test_without_tensorflow(data_dir, tmp_path):
  """A tensorflow that can be found, but not be imported, is left alone."""
  package = tmp_path / "tensorflow"
  package.mkdir()
  (package / "__init__.py").write_text("raise AssertionError('imported')\n")
  program = (
    "import sys\n"
    "from gemma_funnel import tasks\n"
    "config = tasks.default_config()\n"
    "config.update(format='tfds', dataset='glue/sst2', data_dir=sys.argv[1])\n"
    "print(len(tasks.load(config).splits['test']), 'tensorflow' in sys.modules)"
  )
  paths = [str(tmp_path), *sys.path]
  found = subprocess.run(
    [sys.executable, "-c", program, str(data_dir)],
    env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
    capture_output=True,
    text=True,
  )
  assert found.stdout == "6 False\n", found.stderr


def test_version(data_dir):
  assert len(_load(data_dir, "glue/sst2:1.0.0").splits["test"]) == 6
  with pytest.raises(ValueError, match=r"it has the versions \['1.0.0'\]"):
    _load(data_dir, "glue/sst2:2.0.0")


def test_latest_version(tmp_path, monkeypatch):
  opened = []
  tfds = pytest.importorskip("tensorflow_datasets")
  monkeypatch.setattr(tfds, "builder_from_directory", opened.append)
  for version in ("1.9.0", "1.10.0", "incomplete.x"):
    (tmp_path / "set" / version).mkdir(parents=True)
    (tmp_path / "set" / version / "dataset_info.json").write_text("{}")
  (tmp_path / "set" / "2.0.0").mkdir()
  for dataset, version in (("set", "1.10.0"), ("set:1.9.0", "1.9.0")):
    with pytest.raises(ValueError, match="cannot be read"):
      prepared.open_split(dataset, "train", str(tmp_path))
    assert opened.pop() == str(tmp_path / "set" / version)


def test_code_of_tfds_does_not_matter(data_dir):
  """With its builders imported, tfds would want tfrecord by their names."""
  import tensorflow_datasets.text  # noqa: F401

  assert len(_load(data_dir, "glue/sst2").splits["test"]) == 6
  assert len(_load(data_dir, "conll2003").splits["test"]) == 1
