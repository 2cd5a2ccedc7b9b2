"""Grids: which cells a study has, what they share, what tells them apart."""

import collections
import functools
import itertools
import pathlib

import pytest
import tiny_run
import tiny_study
from tiny_study import ONE

from gemma_funnel.reducers import Reducer
from gemma_funnel.registry import REDUCERS
from gemma_funnel.study import grid


@pytest.fixture(scope="module")
def files(tmp_path_factory):
  folder = tmp_path_factory.mktemp("tasks")
  (folder / "text").write_text("text")
  return tiny_study.write_tasks(folder)


@pytest.fixture
def study(files):
  text = pathlib.Path(files["words"]["test"]).with_name("text")
  return lambda **axes: tiny_study.make_study("w", text, files, **axes)


@pytest.fixture
def registered(monkeypatch):
  """Reducers of somebody else: one without a stride, one for causal models."""

  class Whole(Reducer):
    """keeps all slots"""

    def length(self, length, causal, context_length=0):
      return length

  class OneWay(Whole):
    """of causal models only"""

    bidirectional = False

  monkeypatch.setitem(REDUCERS, "test_whole", Whole)
  monkeypatch.setitem(REDUCERS, "test_one_way", OneWay)


def test_any_registered_reducer_is_a_value(study, registered):
  able = {n: kind for n, kind in REDUCERS.items() if kind.trains}
  trained = [n for n, kind in able.items() if kind.bidirectional]
  config = study(
    task=("words",), stride=(2, 4), reduce=tuple(trained), recover=("repeat",)
  )
  found = collections.defaultdict(set)
  for cell in grid.make(config).cells:
    found[cell.axes["reduce"]].add(cell.axes["stride"])
  # Where there are no strides, those of the axis make no difference.
  assert found == {
    None: {None},
    **{n: {2, 4} if "stride" in able[n].options else {None} for n in trained},
  }
  config.axes.update(reduce=("test_one_way",), stride=(2,), task=("pairs",))
  assert grid.make(config).cells  # A language model's task is causal.


def _kinds(cells):
  axes = ("pretraining", "finetuning", "inference", "task")
  return collections.Counter(tuple(map(c.axes.get, axes)) for c in cells)


def test_cells_of_a_small_grid(study):
  cells = grid.make(study()).cells
  # For each of two recoveries; "aware" is fine-tuned with its funnel, and
  # measured with it. A task without fine-tuning has no such choice.
  assert _kinds(cells) == {
    # The baseline knows no recovery: there is one.
    ("standard", "off", "off", "words"): 1,
    ("standard", "off", "on", "words"): 2,
    ("standard", "on", "on", "words"): 2,
    ("aware", "on", "on", "words"): 2,
    ("standard", None, "off", "pairs"): 1,
    ("standard", None, "on", "pairs"): 2,
    ("aware", None, "off", "pairs"): 2,
    ("aware", None, "on", "pairs"): 2,
  }
  assert len({c.hash for c in cells}) == len(cells)


def test_everything_is_there_if_nothing_is_excluded(study):
  config = study(seed=(0, 1), task=("words",))
  config.exclude = ()
  cells = grid.make(config).cells
  # Seeds x (baseline + recoveries x (3 of standard + 4 of aware)).
  assert len(cells) == 2 * (1 + 2 * (3 + 4))


def test_trainings_are_shared(study):
  made = grid.make(study(seed=(0, 1)))
  assert [(p.kind, p.funnel) for p in made.pretrainings] == [
    ("standard", "off"),
    ("aware", f"{ONE}average"),
    ("aware", f"{ONE}repeat"),
  ]
  standard = made.branches[0]
  # Per seed, one without a funnel (three funnels at inference), and one with
  # each of the two.
  found = {(t.funnel, t.seed): len(c) for t, c in standard.tunings.items()}
  assert found == {
    **dict.fromkeys(itertools.product(["off"], (0, 1)), 3),
    **dict.fromkeys(
      itertools.product((f"{ONE}average", f"{ONE}repeat"), (0, 1)), 1
    ),
  }
  assert len(standard.generative) == 3
  counted = [c.hash for branch in made.branches for c in branch.cells]
  assert sorted(counted) == sorted(c.hash for c in made.cells)


def test_tasks_without_fine_tuning_have_one_seed(study):
  made = grid.make(study(seed=(3, 4, 5)))
  seeds = collections.defaultdict(set)
  for cell in made.cells:
    seeds[cell.task].add(cell.axes["seed"])
  assert seeds == {"words": {3, 4, 5}, "pairs": {0}}
  counts = collections.Counter(c.task for c in made.cells)
  assert counts == {"words": 21, "pairs": 7}
  assert all(c.tuning is None for c in made.cells if c.task == "pairs")


def test_a_cell_says_its_axes(study):
  made = grid.make(study())
  for cell in made.cells:
    values = cell.axes
    assert set(grid.AXES) < values.keys() and values["hash"] == cell.hash
    if values["funnel"] == "off":
      assert values["start"] is None and cell.measured_with == "off"
    else:
      assert values["stop"] == 2
      on = values["inference"] == "on"
      assert cell.measured_with == (values["funnel"] if on else "off")
  assert set(made.funnels()["small"]) == {
    "off",
    f"{ONE}average",
    f"{ONE}repeat",
  }


def test_one_sampled_fine_tuning_serves_all_funnels(study):
  config = study(
    task=("words",), pretraining=("standard",), finetuning=("sampled",)
  )
  made = grid.make(config)
  ((pretraining, _, tunings),) = made.branches
  (tuning,) = tunings
  assert tuning.funnel == "sampled" and len(tunings[tuning]) == 3
  found = made.finetune_config(pretraining, tuning)
  assert found.funnel_sampled == ("off", *grid.all_funnels(config, "small"))
  assert made.work() > 0


@pytest.mark.parametrize(
  "exclude, left",
  [
    ((), 15),
    (("pretraining=aware",), 7),
    (("recover=repeat",), 8),
    (("pretraining=aware, recover=repeat",), 11),
    (("pretraining=aware,recover=repeat,seed=0",), 11),
    (("pretraining=aware,seed=1",), 15),
    (("start=1,inference=on",), 7),
    (("stop=None",), 0),
  ],
  ids=str,
)
def test_exclusions(exclude, left, study):
  config = study(task=("words",))
  config.exclude = exclude
  if left:
    assert len(grid.make(config).cells) == left
  else:
    with pytest.raises(ValueError, match="exclude leaves nothing"):
      grid.make(config)


@pytest.mark.parametrize(
  "text",
  "aware pretrain=aware pretraining=awre inference=yes task=wods =on".split(),
)
def test_an_exclusion_that_excludes_nothing_ever(text, study):
  config = study()
  config.exclude = (text,)
  with pytest.raises(ValueError, match=f"exclude: '{text}'"):
    grid.make(config)


def _hashes(config):
  return {c.hash for c in grid.make(config).cells}


@pytest.mark.parametrize(
  "key, value",
  [
    ("finetune.optimizer.learning_rate", 1e-4),
    ("finetune.epochs", 2.0),
    ("models.small.mlp_dim", 48),
    ("pretrain.steps", 9),
    ("pretrain.optimizer.learning_rate", 1e-4),
    ("tasks.words.task.max_test", 4),
  ],
  ids=str,
)
def test_hashes_tell_of_what_matters(key, value, study):
  config = study(task=("words",))
  before = _hashes(config)
  assert before == _hashes(study(task=("words",)))
  config.update_from_flattened_dict({key: value})
  assert not before & _hashes(config)


def test_hashes_tell_of_what_a_task_is_tuned_with(study):
  config = study()
  before = _hashes(config)
  with config.unlocked():
    config.tasks.words.tune = dict(epochs=3.0)
  assert len(before & _hashes(config)) == 7  # Those of pairs.


def test_hashes_do_not_tell_of_where_and_how_it_is_told(study):
  config = study()
  before = _hashes(config)
  config.update(workdir="elsewhere", title="T", keep_finetuned=True)
  config.update(retry=True, dry_run=True)
  assert _hashes(config) == before


def test_a_larger_study_has_the_cells_of_the_smaller(study):
  small = study(recover=("average",), task=("words",))
  assert _hashes(small) < _hashes(study())


def test_every_kind_of_pretraining(study):
  config = study(task=("words",), pretraining=grid.PRETRAININGS)
  made = grid.make(config)
  kinds = collections.Counter(p.kind for p in made.pretrainings)
  assert kinds == {
    "standard": 1,
    "aware": 2,
    "switched": 2,
    "sampled": 1,
    "distilled": 2,
  }
  folders = set()
  for pretraining in made.pretrainings:
    kind, found = pretraining.kind, pretraining.config(config, "/f")
    folders.add(found.workdir)
    assert found.funnel_from == (4 if kind == "switched" else 0)
    assert found.steps == (3 if kind == "distilled" else 8)
    assert bool(found.funnel_sampled) == (kind == "sampled")
    distilled = found.objective == "distill"
    assert distilled == (kind == "distilled")
    assert (found.funnel == "off") == (kind in ("standard", "sampled"))
    assert found.data.tokenizer is None  # The study gives it its own.
    if kind == "sampled":
      assert found.funnel_sampled == ("off", f"{ONE}average", f"{ONE}repeat")
    if kind == "distilled":
      assert made.teacher(pretraining) == made.pretrainings[0]
  assert len(folders) == len(made.pretrainings)


def test_a_student_is_another_one_where_its_teacher_is(study):
  config = study(task=("words",), pretraining=("distilled",))

  def told():
    made = grid.make(config)
    folder = made.pretrainings[0].config(config, "/f").workdir
    return _hashes(config), folder

  hashes, folder = told()
  assert told() == (hashes, folder)
  config.pretrain.steps = 9  # Of the teacher alone.
  others, other_folder = told()
  assert not hashes & others and folder != other_folder


def test_work_that_is_left(study):
  made = grid.make(study(seed=(0, 1)))
  total, done = made.work(), {c.hash for c in made.cells}
  assert total > 0 == made.work(done)
  # All the fine-tunings of one pretraining but one cell.
  first, _, tunings = made.branches[-1]
  tuning, (cell,) = next(iter(tunings.items()))
  alone = made._work_of(grid.Branch(first, [], {tuning: [cell]}))
  assert made.work(done - {cell.hash}) == sum(alone)
  assert made.work(done - {cell.hash}, {first}) == alone[1]
  text = "\n".join(made.describe(done - {cell.hash}, 1e9))
  assert f"{len(made.cells)} cells, 1 to be measured" in text
  assert "1 fine-tunings, 1 cells" in text and "0 fine-tunings, 0 cells" in text


@pytest.mark.parametrize(
  "axis, values, text",
  [
    ("pretraining", ("normal",), "axes.pretraining='normal'"),
    ("finetuning", ("yes",), "axes.finetuning='yes'"),
    ("inference", "on", "axes.inference='on'"),
    ("task", ("word",), "axes.task='word'"),
    ("model", ("large",), "axes.model='large': .*'small'"),
    ("seed", (), "axes.seed="),
    ("seed", (-1,), "axes.seed=-1"),
    ("seed", (0.5,), "axes.seed=0.5"),
    ("start", (2,), "funnel.start=2 must be below"),
    ("stride", (0,), "funnel.stride=0"),
    ("reduce", ("mean", "sum"), "axes.reduce='sum': .*'strided', 'mean'"),
    ("reduce", ("context",), "'context' cannot be used .*trains=False"),
    ("reduce", ("test_one_way",), "'test_one_way' .* task words, causal=False"),
    ("recover", ("half",), "axes.recover='half'"),
    ("recover", ("none",), "recover='none'.*task pairs needs a state"),
    ("stride", (3,), "length=32 must be a multiple .* 3"),
  ],
  ids=str,
)
def test_an_axis_that_cannot_be(axis, values, text, study, registered):
  with pytest.raises(ValueError, match=text):
    grid.make(study(**{axis: values}))


@pytest.mark.parametrize(
  "key, value, text",
  [
    ("tasks.words.task.train", "nowhere.tsv", "tasks.words: .*nowhere.tsv"),
    ("pretrain.batch_size", 12, "batch_size=12"),
    ("tasks.words.tune", {"epoch": 3.0}, "tasks.words.tune: "),
    ("tasks.words.tune", {"optimizer": {"rate": 1.0}}, "tasks.words.tune: "),
  ],
  ids=str,
)
def test_a_study_that_cannot_be(key, value, text, study):
  config = study()
  with config.unlocked():
    *folder, name = key.split(".")
    functools.reduce(getattr, folder, config)[name] = value
  with pytest.raises(ValueError, match=text):
    grid.make(config)


@pytest.mark.parametrize("name", ["quickstart", "finetune", "eval_accuracy"])
def test_a_configuration_of_another_kind(name):
  with pytest.raises(ValueError, match=r"lacks \[.*ablation_quick.py"):
    grid.make(tiny_run.load_config(name))


@pytest.mark.parametrize(
  ("key", "value"),
  [
    ("workdir", ""),
    ("workdir", "gs://bucket/study"),
    ("switch_step", -1),
    ("distill_steps", 0),
    ("latency.repeats", -1),
    ("similarity.rows", -1),
    ("generative.batch_size", 0),
  ],
)
def test_a_value_that_cannot_be_is_named(key, value, study):
  config = study()
  config.update_from_flattened_dict({key: value})
  with pytest.raises(ValueError, match=f"^{key}="):
    grid.make(config)
