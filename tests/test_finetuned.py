"""Runs from end to end: pretraining, choices, fine-tuning, and its table."""

import dataclasses
import json
import pathlib
import random
import shutil

import ml_collections
import pytest
import tiny_run

from gemma_funnel import evaluation
from gemma_funnel.config import format_funnel
from gemma_funnel.evaluation import finetuned, funnels, load_for_eval
from gemma_funnel.evaluation.scoring import Scorer
from gemma_funnel.tasks.task import Task
from gemma_funnel.training import step

pytestmark = pytest.mark.slow
FUNNEL = "start=1,stride=2"
LENGTH = 16


@pytest.fixture(scope="module", autouse=True)
def one_device():
  """Training on one of the devices here: programs of eight take twice as long
  to compile, and test_pretrain and test_sharding have them."""
  with pytest.MonkeyPatch.context() as patch:
    tiny_run.use_one_device(patch)
    yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return tmp_path_factory.mktemp("finetuned")


@pytest.fixture(scope="module")
def words(folder):
  """Words of the corpus that the tokenizer is trained on."""
  tiny_run.write_corpus(folder)
  lines = (folder / "corpus.jsonl").read_text().splitlines()
  return sorted({w for x in lines for w in json.loads(x)["text"].split()})


@pytest.fixture(scope="module")
def pretrained(folder, words):
  """The folder of a training run, as configs/quickstart.py makes one."""
  config = tiny_run.make_config(
    folder / "run", folder / "corpus.jsonl", steps=3, data__num_workers=0
  )
  result = tiny_run.train(config, lambda corpus, setup: lambda model: {})
  assert result.finished
  return config.workdir


def write_rows(path, words, count, names=("neg", "pos")):
  """Texts whose label is whether the first word is the first or the last."""
  draw, lines = random.Random(path.name), ["text\tlabel"]
  for number in range(count):
    marked = words[0] if number % 2 else words[-1]
    text = " ".join([marked, *draw.choices(words, k=3)])
    lines.append(f"{text}\t{names[number % 2]}")
  path.write_text("\n".join(lines) + "\n")
  return str(path)


@pytest.fixture(scope="module")
def config(folder, words, pretrained):
  """configs/finetune.py, of a table of 60 rows, 2 seeds and 2 funnels."""
  config = tiny_run.load_config("finetune", "table")
  config.task.update(
    kind="classification",
    text="text",
    label="label",
    name="first word",
    train=write_rows(folder / "train.tsv", words, 60),
    test=write_rows(folder / "test.tsv", words, 23),
    dev_fraction=0.2,
  )
  config.update(
    workdir=str(folder / "tuned"),
    seeds=(0, 1),
    init_from=pretrained,
    epochs=3.0,
    batch_size=16,
    length=LENGTH,
    log_every=1,
    tensorboard=False,
  )
  config.optimizer.update(learning_rate=3e-3, warmup_steps=1)
  return config


@pytest.fixture(scope="module")
def rows(config):
  return finetuned.run(config)


def eval_config(checkpoint, **changes):
  config = tiny_run.load_config("eval_task")
  config.checkpoint = str(checkpoint)
  config.update_from_flattened_dict(changes)
  return config


def test_the_table_is_of_both_funnels_over_seeds(config, rows):
  assert [r["funnel"] for r in rows] == ["as trained", "off"]
  assert [r["resolved"].split(",")[0] for r in rows] == ["start=1", "off"]
  for row in rows:
    one, two = [r["accuracy"] for r in row["of_seeds"]]
    assert row["value"] == row["accuracy"] == pytest.approx((one + two) / 2)
    assert row["spread"] == pytest.approx(abs(one - two) / 2**0.5)
    assert (row["metric"], row["seeds"], row["num_examples"]) == (
      "accuracy",
      2,
      23,
    )
  # Learned, and read with the funnel that the row names.
  assert rows[0]["accuracy"] > 0.7
  assert rows[0]["ideal_reduction"] > rows[1]["ideal_reduction"] == 0
  folder = pathlib.Path(config.workdir)
  assert json.loads((folder / "task.json").read_text())["rows"] == rows
  assert (folder / "task.png").read_bytes()[:4] == b"\x89PNG"
  assert "| deviation of accuracy % |" in (folder / "task.md").read_text()


def test_the_same_call_trains_nothing(config, rows, monkeypatch):
  def refuse(*args):
    raise AssertionError("a step was taken")

  monkeypatch.setattr(step, "make_train_step", lambda *args: refuse)
  assert finetuned.run(config) == rows


def test_eval_has_the_same_numbers(config, rows, monkeypatch):
  seen, inner = [], finetuned.finetune.measure
  monkeypatch.setattr(
    finetuned.finetune,
    "measure",
    lambda encoder, *args, **options: (
      seen.append(format_funnel(encoder.model.stages))
      or inner(encoder, *args, **options)
    ),
  )
  assert evaluation.run(eval_config(config.workdir)) == rows
  # Each row is of the funnel that it names, which numbers may not tell.
  assert seen == [row["resolved"] for row in rows] * 2
  out = pathlib.Path(config.workdir, "eval")
  content = json.loads((out / "first_word.json").read_text())
  assert content["rows"] == rows
  assert content["settings"]["trained"]["length"] == LENGTH
  assert (out / "first_word.png").exists()
  for number in (0, 1):
    path = pathlib.Path(config.workdir, f"seed_{number}")
    found = evaluation.run(eval_config(path, funnels=("off", "trained")))
    expected = [r["of_seeds"][number] for r in reversed(rows)]
    assert [r["of_seeds"] for r in found] == [[r] for r in expected]
    assert "spread" not in found[0] and found[0]["seeds"] == 1


def test_another_file_of_the_same_labels(config, rows, folder, words):
  write_rows(folder / "swapped.tsv", words, 23, ("pos", "neg"))
  shutil.copy(config.task.test, folder / "again.tsv")
  changes = {f"task.{k}": config.task[k] for k in ("kind", "text", "label")}
  changes |= {"task.train": config.task.train, "batch_size": 16}
  path = pathlib.Path(config.workdir, "seed_0")
  for name, right in (("again", True), ("swapped", False)):
    given = eval_config(path, **changes)
    given.task.test = str(folder / f"{name}.tsv")
    found = evaluation.run(given)
    if right:
      assert found[0]["accuracy"] == rows[0]["of_seeds"][0]["accuracy"]
    else:
      assert found[0]["accuracy"] < 0.5
  given = eval_config(path, **changes, max_examples=7, split="dev")
  given.task.test = config.task.test
  assert evaluation.run(given)[0]["num_examples"] == 6


@pytest.mark.parametrize(
  "changes, message",
  [
    (dict(few_shot=1), "few_shot=1: expected 0, it is of tasks without a head"),
    (dict(max_length=32), "max_length=32: expected None"),
    (dict(dtype="float32"), "dtype='float32': expected none"),
    (dict(tokenizer="x"), "tokenizer='x': expected none"),
    (dict(funnels=("half",)), "funnels: 'half'"),
    (dict(max_examples=0), "max_examples=0: expected an integer >= 1"),
    ({"task.max_test": 3}, "task.max_test=3 without a file, a data set"),
    ({"task.format": "code_packages"}, r"labels .* \['neg', 'pos'\], it has"),
    ({"task.format": "code_tags"}, "'tagging': expected classification"),
  ],
)
def test_mistakes_of_eval_are_named(config, rows, changes, message):
  given = eval_config(pathlib.Path(config.workdir, "seed_0"))
  given.update_from_flattened_dict(changes)
  if "task.format" in changes:
    given.task.update(max_train=40, max_dev=20, max_test=20)
  with pytest.raises(ValueError, match=message):
    evaluation.run(given)


def test_labels_must_be_those_of_the_run():
  head = ml_collections.ConfigDict(dict(per_token=False))
  task = Task("t", "classification", ("a", "b"), ("accuracy",), {})
  finetuned._check_labels(task, ("a", "b"), head, "RUN")
  for labels, message in (
    (("a", "c"), r"of RUN: .*, it has \['b'\] more and lacks \['c'\]"),
    (("b", "a"), r"expected \['b', 'a'\], it has them as \['a', 'b'\]"),
  ):
    with pytest.raises(ValueError, match=message):
      finetuned._check_labels(task, labels, head, "RUN")
  for kind, per_token in (("choice", False), ("classification", True)):
    head.per_token = per_token
    with pytest.raises(ValueError, match=f"is of kind '{kind}': expected"):
      finetuned._check_labels(
        dataclasses.replace(task, kind=kind), ("a", "b"), head, "RUN"
      )


def test_seeds_are_found_in_order_and_of_one_configuration(tmp_path):
  for name in ("seed_10", "seed_9", "seed_x", "other"):
    (tmp_path / name).mkdir()
    (tmp_path / name / "head.json").write_text("{}")
  found = finetuned.find_runs(str(tmp_path))
  assert [pathlib.Path(p).name for p in found] == ["seed_9", "seed_10"]
  assert finetuned.find_runs(found[0]) == found[:1]
  assert finetuned.find_runs(None) == finetuned.find_runs("/nowhere") == []
  with pytest.raises(ValueError, match="seed_9 is no fine-tuned run: head"):
    evaluation.run(eval_config(tmp_path))
  one = dict.fromkeys(finetuned._COMMON, 1)
  finetuned._check_same("A", one, "B", one | {"seed": 2})
  with pytest.raises(ValueError, match="B has not the length of A"):
    finetuned._check_same("A", one, "B", one | {"length": 2})


def test_an_undefined_metric_of_one_seed():
  task = Task("t", "regression", (), ("pearson", "spearman"), {})
  seeds = [dict(pearson=p, spearman=None) for p in (None, 0.2, 0.4)]
  [row] = finetuned._over_seeds(task, [[seed] for seed in seeds])
  assert row["value"] == row["pearson"] == pytest.approx(0.3)
  assert row["spread"] == pytest.approx(0.02**0.5)
  assert row["spearman"] is None and row["of_seeds"] == seeds


def test_funnels_are_checked_before_training(config, folder):
  config = config.copy_and_resolve_references()
  config.update(workdir=str(folder / "never"), eval_funnels=("half",))
  with pytest.raises(ValueError, match="funnels: 'half'"):
    finetuned.run(config)
  assert not (folder / "never").exists()
  head = ml_collections.ConfigDict(dict(per_token=False))
  bad = ("start=1,recover=none",)
  assert funnels.resolve(bad, 2, **finetuned._needs(head))
  head.per_token = True
  with pytest.raises(ValueError, match="recover='none'.*every token"):
    funnels.resolve(bad, 2, **finetuned._needs(head))


def test_a_run_without_a_head_needs_another_kind(config, pretrained):
  given = eval_config(pretrained)
  given.task = config.task
  with pytest.raises(ValueError, match="a fine-tuned run .*finetune.py"):
    evaluation.run(given)


def test_minimal_pairs_of_a_training_run(pretrained, folder, words):
  # The likelier of each pair, and for every third the other.
  pairs = [
    [" ".join(words[n : n + 3]), " ".join(words[n + 2 : n - 1 : -1])]
    for n in range(1, 7)
  ]
  path = folder / "pairs.jsonl"
  config = eval_config(
    pretrained,
    batch_size=6,
    max_length=LENGTH,
    **{"task.kind": "choice", "task.choices": "good,bad"},
  )
  config.task.test, config.task.name = str(path), "order"
  config.funnels = ("trained", "off")

  def measure():
    path.write_text(
      "".join(json.dumps(dict(good=a, bad=b)) + "\n" for a, b in pairs)
    )
    rows = evaluation.run(config)
    lines = (folder / "run" / "eval" / "order.predictions.jsonl").read_text()
    return rows, [json.loads(line) for line in lines.splitlines()]

  _, records = measure()
  for number, record in enumerate(records[:6]):
    if record["chosen"] != (number % 3 == 0):
      pairs[number].reverse()
  rows, records = measure()
  assert rows[0]["accuracy"] == rows[0]["value"] == pytest.approx(4 / 6)
  assert [r["funnel"] for r in rows] == ["as trained", "off"]
  assert rows[0]["num_examples"] == 6 and rows[0]["num_ties"] == 0
  # With the funnel of each row: of the same texts, other likelihoods.
  assert [r["choices"] for r in records] == pairs * 2
  own, off = (r["log_likelihoods"] for r in (records[0], records[6]))
  assert own != off
  loaded = load_for_eval.load(config)
  text = loaded.load_tokenizer().encode(pairs[0][0])
  for funnel, found in ((FUNNEL, own), ("off", off)):
    model = loaded.model.with_funnel(funnel)
    [expected] = Scorer(model, None, 6, (LENGTH,)).rolling([text])
    assert found[0] == pytest.approx(expected, rel=1e-4)
