"""Plans: which cells a study has, what they share, what tells them apart."""

import collections

import pytest
import tiny_study

from gemma_funnel.study import grid


@pytest.fixture(scope="module")
def files(tmp_path_factory):
  return tiny_study.write_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture
def study(files):
  return lambda **axes: tiny_study.make_study("w", "s", files, **axes)


def _kinds(cells):
  return collections.Counter(
    (c.pretraining.kind, c.finetuning, c.inference, c.task) for c in cells
  )


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


def test_stages_are_shared(study):
  made = grid.make(study(seed=(0, 1)))
  stages = list(made.by_pretraining())
  assert [(p.kind, p.funnel) for p, _, _ in stages] == [
    ("standard", "off"),
    ("aware", f"{tiny_study.ONE}average"),
    ("aware", f"{tiny_study.ONE}repeat"),
  ]
  standard, own, tunings = stages[0]
  assert made.pretrainings == tuple(p for p, _, _ in stages)
  # Per seed, one without a funnel (three funnels at inference), and one with
  # each of the two.
  assert {(t.funnel, t.seed): len(c) for t, c in tunings.items()} == {
    ("off", 0): 3,
    ("off", 1): 3,
    **{
      (f"{tiny_study.ONE}{r}", s): 1
      for r in ("average", "repeat")
      for s in (0, 1)
    },
  }
  assert len(own) == 3
  counted = [
    c
    for _, cells, ts in stages
    for c in (*cells, *(c for own in ts.values() for c in own))
  ]
  assert sorted(c.hash for c in counted) == sorted(c.hash for c in made.cells)


def test_tasks_without_fine_tuning_have_one_seed(study):
  made = grid.make(study(seed=(3, 4, 5)))
  seeds = collections.defaultdict(set)
  for cell in made.cells:
    seeds[cell.task].add(cell.seed)
  assert seeds == {"words": {3, 4, 5}, "pairs": {0}}
  counts = collections.Counter(c.task for c in made.cells)
  assert counts == {"words": 21, "pairs": 7}
  assert all(c.tuning is None for c in made.cells if c.task == "pairs")


def test_a_cell_says_its_axes(study):
  made = grid.make(study())
  for cell in made.cells:
    values = cell.to_dict()
    assert set(grid.AXES) < values.keys()
    if cell.funnel is None:
      assert values["funnel"] == "off" and values["start"] is None
      assert cell.measured_with == "off"
    else:
      assert values["stop"] == 2
      on = cell.inference == "on"
      assert (values["recover"] in cell.measured_with) == on
  assert set(made.funnels()["small"]) == {
    "off",
    f"{tiny_study.ONE}average",
    f"{tiny_study.ONE}repeat",
  }


def test_one_sampled_fine_tuning_serves_all_funnels(study):
  config = study(
    task=("words",), pretraining=("standard",), finetuning=("sampled",)
  )
  made = grid.make(config)
  ((stage, _, tunings),) = made.by_pretraining()
  (tuning,) = tunings
  assert tuning.funnel == "sampled" and len(tunings[tuning]) == 3
  found = made.finetune_config(stage, tuning)
  assert found.funnel_sampled == ("off", *grid.sampled_funnels(config, "small"))
  assert made.work() > 0


def test_exclusions(study):
  config = study(task=("words",))
  count = lambda *exclude: (
    config.update(exclude=exclude) or len(grid.make(config).cells)
  )
  everything = count()
  assert everything == 15
  assert count("pretraining=aware") == 7
  assert count("recover=repeat") == 8
  assert count("pretraining=aware, recover=repeat") == 11
  assert count("pretraining=aware,recover=repeat,seed=0") == 11
  assert count("pretraining=aware,seed=1") == everything
  assert count("start=1,inference=on") == 7
  with pytest.raises(ValueError, match="exclude leaves nothing"):
    count("stop=None")


@pytest.mark.parametrize(
  "text",
  [
    "aware",
    "pretrain=aware",
    "pretraining=awre",
    "inference=yes",
    "task=wods",
    "=on",
  ],
)
def test_an_exclusion_that_excludes_nothing_ever(text, study):
  config = study()
  config.exclude = (text,)
  with pytest.raises(ValueError, match=f"exclude: '{text}'"):
    grid.make(config)


def _hashes(config):
  return {c.hash for c in grid.make(config).cells}


MATTERS = (
  ("finetune.optimizer.learning_rate", 1e-4),
  ("finetune.epochs", 2.0),
  ("models.small.mlp_dim", 48),
  ("pretrain.steps", 9),
  ("pretrain.optimizer.learning_rate", 1e-4),
  ("tasks.words.task.max_test", 4),
)


@pytest.mark.parametrize("key, value", MATTERS, ids=str)
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
  config.update(
    workdir="elsewhere",
    title="T",
    keep_finetuned=True,
    retry=True,
    dry_run=True,
  )
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
  for stage in made.pretrainings:
    found = stage.config(config, "/f")
    folders.add(found.workdir)
    assert found.funnel_from == (4 if stage.kind == "switched" else 0)
    assert found.steps == (3 if stage.kind == "distilled" else 8)
    assert bool(found.funnel_sampled) == (stage.kind == "sampled")
    distilled = found.objective == "distill"
    assert distilled == (stage.kind == "distilled")
    assert (found.funnel == "off") == (stage.kind in ("standard", "sampled"))
    assert found.data.tokenizer is None  # The study gives it its own.
    if stage.kind == "sampled":
      assert found.funnel_sampled == (
        "off",
        f"{tiny_study.ONE}average",
        f"{tiny_study.ONE}repeat",
      )
    if stage.kind == "distilled":
      assert made.teacher(stage) == made.pretrainings[0]
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
  stage, _, tunings = list(made.by_pretraining())[-1]
  (cell,) = list(tunings.values())[0]
  left = made.work(done - {cell.hash})
  assert left == made._pretraining_work(stage) + made._tuning_work(
    stage, cell.tuning
  )
  text = made.describe(done - {cell.hash}, 1e9)
  assert f"{len(made.cells)} cells, 1 to be measured" in text
  assert "1 fine-tunings, 1 cells" in text and "0 fine-tunings, 0 cells" in text


@pytest.mark.parametrize(
  "axes, text",
  [
    (
      {"pretraining": ("normal",)},
      "axes.pretraining: found 'normal', expected",
    ),
    ({"finetuning": ("yes",)}, "axes.finetuning: found 'yes'"),
    ({"inference": "on"}, "axes.inference='on': expected a tuple"),
    ({"task": ("word",)}, "axes.task: found 'word', expected"),
    ({"model": ("large",)}, "axes.model: found 'large', .*'small'"),
    ({"seed": ()}, "axes.seed=.*: expected a tuple of one value"),
    ({"seed": (-1,)}, "axes.seed: found -1"),
    ({"seed": (0.5,)}, "axes.seed: found 0.5"),
    ({"start": (2,)}, "funnel.start=2 must be below"),
    ({"stride": (0,)}, "funnel.stride=0"),
    ({"pool": ("sum",)}, "funnel.pool='sum'"),
    ({"recover": ("half",)}, "funnel.recover='half'"),
    ({"recover": ("none",)}, "recover='none'.*task pairs needs a state"),
    ({"stride": (3,)}, "length=32 must be a multiple .* 3"),
  ],
  ids=str,
)
def test_an_axis_that_cannot_be(axes, text, study):
  with pytest.raises(ValueError, match=text):
    grid.make(study(**axes))


def test_a_study_that_cannot_be(study):
  config = study()
  config.tasks.words.task.train = "nowhere.tsv"
  with pytest.raises(ValueError, match="tasks.words: .*nowhere.tsv"):
    grid.make(config)
  config = study()
  config.pretrain.batch_size = 12
  with pytest.raises(ValueError, match="batch_size=12"):
    grid.make(config)
  for tune in ({"epoch": 3.0}, {"optimizer": {"rate": 1.0}}):
    config = study()
    with config.unlocked():
      config.tasks.words.tune = tune
    with pytest.raises(ValueError, match="tasks.words.tune: "):
      grid.make(config)
