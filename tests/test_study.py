"""What a study says of results that are made up: truths are planted."""

import itertools
import json
import math
import random

import pytest

from gemma_funnel.study import analysis, html_report

RECOVERIES = {"average": 0.0, "add": 0.012, "repeat": 0.03}
STARTS = {2: 0.06, 4: 0.03, 6: 0.01}
TASKS = {"grammar": 1.6, "topic": 0.5}
# Of awareness nothing is true for the null pretraining.
PRETRAININGS = {"standard": 1.0, "aware": 0.5, "sampled": 1.0}


def _row(kind, task, seed, **changes):
  row = dict(
    kind=kind,
    hash="h",
    model="study",
    pretraining="standard",
    finetuning="off",
    inference="off",
    funnel="off",
    start=None,
    stop=None,
    stride=None,
    pool=None,
    recover=None,
    task=task,
    task_kind="tagging",
    seed=seed,
    metric="accuracy",
    higher_is_better=True,
    num_test=500,
    ideal_reduction=0.0,
    latency_s=None,
    reduction=None,
    git="59d0d6d",
    device="cpu x1",
  )
  if task == "prose":
    row |= dict(
      task_kind="perplexity",
      metric="bits_per_byte",
      finetuning=None,
      higher_is_better=False,
    )
  return row | changes


def _funnel(start, recover, **changes):
  funnel = f"start={start},stop=8,stride=2,pool=mean,recover={recover}"
  return (
    dict(
      funnel=funnel,
      start=start,
      stop=8,
      stride=2,
      pool="mean",
      recover=recover,
      inference="on",
      ideal_reduction=0.5 * (8 - start) / 8,
    )
    | changes
  )


def make_rows(noise=0.002, seeds=(0, 1), pretrainings=("standard", "aware")):
  """A study of 3 recoveries x 3 starts, and a failure."""
  chance, rows = random.Random(0), []
  for task, seed in itertools.product((*TASKS, "prose"), seeds):
    base = 0.8 + 0.02 * seed
    made = [_row("cell", task, seed, value=base)]
    finetunings = (None,) if task == "prose" else ("off", "on")
    for start, recover, pretraining, finetuning in itertools.product(
      STARTS, RECOVERIES, pretrainings, finetunings
    ):
      lost = (STARTS[start] + RECOVERIES[recover]) * TASKS.get(task, 1)
      lost *= PRETRAININGS[pretraining] * (0.5 if finetuning == "on" else 1)
      lost += chance.gauss(0, noise)
      value = base * (1 + lost) if task == "prose" else base - lost
      made.append(
        _row(
          "cell",
          task,
          seed,
          pretraining=pretraining,
          finetuning=finetuning,
          value=value,
          **_funnel(start, recover),
        )
      )
    rows += made
  rows.append(
    _row("failure", "topic", 5, error="out of <memory>", **_funnel(2, "add"))
  )
  for recover, pretraining in itertools.product(RECOVERIES, pretrainings):
    layers = [
      {
        "layer": n,
        "at": "layer",
        "short": n > 1,
        "cosine": 1
        - max(0, n - 1)
        * (0.05 + RECOVERIES[recover])
        * PRETRAININGS[pretraining],
      }
      for n in range(8)
    ]
    layers.append({"layer": 7, "at": "recovery", "short": False, "cosine": 0.8})
    rows.append(
      _row(
        "similarity",
        None,
        0,
        pretraining=pretraining,
        layers=layers,
        **_funnel(2, recover),
      )
    )
  return rows


def _line(claims, start, number=0):
  found = [line for line in claims if line.startswith(start)]
  assert found, claims
  return found[number]


def _table(rows, number):
  tables = html_report.tables(analysis.organise(rows))
  return next(t for t in tables if t.title.startswith(f"{number}."))


# --- Numbers --------------------------------------------------------------


def test_mean_and_spread():
  spread = analysis.mean_and_spread([1, 2, 4])
  assert spread.mean == pytest.approx(7 / 3)
  assert spread.deviation == pytest.approx(math.sqrt(7 / 3))
  assert spread.text(".1f") == "2.3 ± 1.5"
  assert analysis.mean_and_spread([0.5]).text() == "0.50 (n=1)"
  assert analysis.mean_and_spread([]) is None


def test_clear_is_more_than_twice_the_standard_error():
  # Deviation 1, n 4: the standard error is 1/2.
  values = [-math.sqrt(0.75)] * 2 + [math.sqrt(0.75)] * 2
  shifted = lambda by: analysis.mean_and_spread([v + by for v in values])
  assert shifted(1.01).is_clear and shifted(-1.01).is_clear
  assert not shifted(0.99).is_clear
  assert not analysis.mean_and_spread([5.0, 5.0]).is_clear
  assert analysis.mean_and_spread([5.0, 5.0, 5.0]).is_clear
  assert not analysis.mean_and_spread([0.0, 0.0, 0.0]).is_clear


def test_drops_are_from_the_baseline_of_the_seed():
  rows = [
    _row("cell", "topic", 0, value=0.9),
    _row("cell", "topic", 1, value=0.5),
    _row("cell", "topic", 0, value=0.8, **_funnel(2, "add")),
    _row("cell", "topic", 1, value=0.6, **_funnel(2, "add")),
    _row("cell", "topic", 2, value=0.6, **_funnel(2, "add")),
    _row("cell", "prose", 0, value=2.0),
    _row("cell", "prose", 0, value=2.1, **_funnel(2, "add")),
    _row("cell", "topic", 0, value=0.7, finetuning="on"),
    _row("cell", "topic", 0, value=0.6, pretraining="aware"),
  ]
  results = analysis.organise(rows)
  drops = [cell["drop"] for cell in results.compared()]
  assert drops == pytest.approx([10, -10, 5])
  units = [cell["unit"] for cell in results.compared()]
  assert units == [analysis.POINTS, analysis.POINTS, analysis.PERCENT]
  # Trained otherwise, without a funnel at inference: not a baseline.
  plain = [c["drop"] for c in results.compared("plain")]
  assert plain == pytest.approx([20, 30])
  assert (
    "1 cells with a funnel are left out"
    in html_report.baseline_table(results).note
  )


def test_later_rows_replace_earlier_ones_and_failures_nothing():
  cell = lambda value: _row("cell", "topic", 0, value=value)
  failed = _row("failure", "topic", 0, error="no")
  results = analysis.organise([failed, cell(0.1), cell(0.2), failed])
  assert [c["value"] for c in results.cells] == [0.2]
  assert not results.failures
  results = analysis.organise([failed, {"kind": "of the future"}])
  assert len(results.failures) == 1
  for value in (float("nan"), None):
    results = analysis.organise([cell(value)])
    assert results.failures[0]["error"] == f"accuracy is {value}"
    assert not results.cells


def test_a_row_without_a_key():
  row = _row("cell", "topic", 0)
  with pytest.raises(ValueError, match=r"row 2 \(cell\) has no \['value'\]"):
    analysis.organise([_row("cell", "topic", 0, value=1.0), row])


def test_pairings_differ_in_one_choice():
  cells = analysis.organise(make_rows()).compared()
  for axis in ("recover", "start", "pretraining", "finetuning", "task"):
    groups = analysis.pairings(cells, axis)
    assert groups
    for group in groups:
      first, *others = group.values()
      for other in others:
        names = ("seed", "task", "pretraining", "finetuning", "start")
        for name in (*names, "recover"):
          assert (first[name] == other[name]) == (name != axis)
  # An option that is no key of a row keeps cells apart.
  apart = [
    _row("cell", "topic", 0, value=1.0, **_funnel(2, r)) for r in RECOVERIES
  ]
  apart[1]["funnel"] += ",keep_first=true"
  assert [len(g) for g in analysis.pairings(apart, "recover")] == [2]


# --- Tables ---------------------------------------------------------------


def test_where_it_should_start():
  table = _table(make_rows(noise=0), 1)
  text = table.markdown()
  assert "grammar accuracy (points)" in text
  assert "prose bits_per_byte (%)" in text
  row = next(
    r
    for r in table.rows
    if (r["start"], r["pretraining"], r["finetuning"]) == (2, "standard", "off")
  )
  # 100 * (0.06 + the mean of the recoveries) * 1.6, the same of both seeds.
  assert row["drop grammar"] == "11.84 ± 0.00"
  assert row["ideal_reduction"] == pytest.approx(0.375)
  assert "time saved" not in text
  timed = [
    r | {"reduction": 0.2} if r["inference"] == "on" else r for r in make_rows()
  ]
  assert "time saved (%)" in _table(timed, 1).markdown()


def test_what_training_recovers():
  rows = make_rows(noise=0)
  table = _table(rows, 2)
  share = {
    (r["task"], r["pretraining"], r["finetuning"]): r["share"]
    for r in table.rows
  }
  assert share["grammar", "standard", "off"] is None
  assert share["grammar", "standard", "on"] == pytest.approx(0.5)
  assert share["grammar", "aware", "on"] == pytest.approx(0.75)
  assert share["prose", "aware", None] == pytest.approx(0.5)


def test_no_share_of_a_drop_within_its_spread():
  def rows(drops):
    for seed, drop in enumerate(drops):
      yield _row("cell", "topic", seed, value=0.8)
      for tuned, lost in (("off", drop), ("on", drop / 2)):
        yield _row(
          "cell",
          "topic",
          seed,
          value=0.8 - lost,
          finetuning=tuned,
          **_funnel(2, "add"),
        )

  share = lambda drops: _table(list(rows(drops)), 2).rows[-1]["share"]
  assert share((0.03, 0.02)) == pytest.approx(0.5)
  assert share((0.03, -0.02)) is None
  assert share((-0.03, -0.02)) is None
  assert share((0.03,)) == pytest.approx(0.5)


def test_which_recovery_is_best():
  table = _table(make_rows(noise=0), 3)
  points = [r for r in table.rows if r["unit"] == analysis.POINTS]
  assert [(r["recover"], r["rank"]) for r in points] == [
    ("average", 1),
    ("add", 2),
    ("repeat", 3),
  ]
  # 2 tasks x 3 starts x 2 pretrainings x 2 fine-tunings x 2 seeds.
  assert [(r["best"], r["of"]) for r in points] == [(48, 48), (0, 48), (0, 48)]
  text = table.markdown()
  assert "start 6" in text and "prose bits_per_byte" in text


def test_which_tasks_suffer():
  table = _table(make_rows(), 4)
  assert [r["task"] for r in table.rows] == ["grammar", "topic", "prose"]
  assert "standard, tuned off" in table.markdown()


# --- Verdicts -------------------------------------------------------------


def test_claims_find_what_was_planted():
  claims = analysis.claims(make_rows())
  best = _line(claims, "recover:")
  assert "average is best of 3 in 4" in best and "of 48 pairings" in best
  assert "+0.7" in best and "over the next, add" in best
  aware = _line(claims, "pretraining: aware")
  assert "aware beats standard in 7" in aware and "of 72" in aware
  assert "on beats off" in _line(claims, "funnel at fine-tuning")
  start = _line(claims, "start:")
  assert "later is better: 6 against 2 in 48 of 48 pairings" in start
  assert "12 % against 38 %" in start
  tasks = _line(claims, "tasks by drop (points)")
  assert tasks.index("grammar") < tasks.index(" > ") < tasks.index("topic")
  # Where lower is better it is the same.
  assert "average is best" in _line(claims, "recover:", 1)
  assert "%" in _line(claims, "tasks by drop (%")


def test_no_effect_is_not_distinguishable():
  rows = make_rows(noise=0.01, pretrainings=("standard", "sampled"))
  for row in rows:
    # The recoveries' difference is taken out again.
    if row["kind"] == "cell" and row["recover"]:
      scale = TASKS.get(row["task"], -0.8)
      scale *= 0.5 if row["finetuning"] == "on" else 1
      row["value"] += RECOVERIES[row["recover"]] * scale
  claims = analysis.claims(rows)
  assert "are not distinguishable" in _line(claims, "recover:")
  assert "are not distinguishable" in _line(claims, "pretraining: sampled")
  assert "later is better" in _line(claims, "start:")


def test_a_few_pairings_show_nothing():
  rows = make_rows(noise=0, seeds=(0,))
  keep = lambda r: r["task"] == "topic" and r["start"] in (None, 2)
  few = [r for r in rows if keep(r) and r["finetuning"] == "off"]
  assert "of 3 pairings" in _line(analysis.claims(few), "pretraining:")
  two = [r for r in few if r["recover"] != "add"]
  assert "not distinguishable" in _line(analysis.claims(two), "pretraining:")


def test_what_a_pretraining_costs_without_the_funnel():
  rows = make_rows(noise=0, seeds=(0, 1, 2))
  for seed in (0, 1, 2):
    value = 0.8 + 0.02 * seed - 0.03
    rows.append(_row("cell", "topic", seed, value=value, pretraining="aware"))
  line = _line(analysis.claims(rows), "pretraining: aware costs")
  assert "drop +3.00, spread 0.00 points, 3 cells" in line


# --- What is missing ------------------------------------------------------


@pytest.mark.parametrize(
  "keep",
  [
    lambda r: False,
    lambda r: r["kind"] == "failure",
    lambda r: r["kind"] == "similarity",
    lambda r: r["funnel"] == "off",
    lambda r: r["inference"] == "on",
    lambda r: r["task"] == "prose",
    lambda r: r["recover"] in ("add", None) and r["start"] in (4, None),
  ],
  ids=[
    "nothing",
    "failures",
    "similarity",
    "baselines",
    "no baselines",
    "lower is better",
    "one funnel",
  ],
)
def test_parts_of_a_study(keep, tmp_path):
  rows = [row for row in make_rows() if keep(row)]
  paths = analysis.write(rows, tmp_path / "new", "t")
  for name in ("tables.md", "study.json", "report.html"):
    with open(paths[name]) as f:
      assert f.read()


def test_random_holes_and_several_stages():
  chance = random.Random(1)
  rows = make_rows()
  stages = "start=1,stop=4+start=2,stop=3"
  for seed in (0, 1):
    several = dict.fromkeys(("start", "stop", "stride", "pool", "recover"))
    several |= dict(funnel=stages, inference="on", value=0.5)
    rows.append(_row("cell", "topic", seed, **several))
  assert stages in _table(rows, 1).markdown()
  for _ in range(20):
    some = [row for row in rows if chance.random() < 0.3]
    analysis.claims(some)
    html_report.tables(analysis.organise(some))


def test_files_agree(tmp_path):
  rows = make_rows()
  paths = analysis.write(rows, tmp_path, "A <title>", {"seeds": 2})
  assert sorted(p.name for p in tmp_path.iterdir()) == sorted(paths)
  with open(paths["study.json"]) as f:
    content = json.load(f)
  assert content["claims"] == analysis.claims(rows)
  assert content["settings"] == {"seeds": 2}
  assert content["measured"]["git"] == ["59d0d6d"]
  assert content["measured"]["cells"] == sum(r["kind"] == "cell" for r in rows)
  with open(paths["tables.md"]) as f:
    markdown = f.read()
  assert all(f"- {claim}" in markdown for claim in content["claims"])
  assert "out of <memory>" in markdown
  for title in content["tables"]:
    assert f"## {title}" in markdown


def test_what_json_cannot_hold_writes_nothing(tmp_path):
  with pytest.raises(ValueError, match="study.json"):
    analysis.write(make_rows(), tmp_path, "t", {"x": float("nan")})
  assert not list(tmp_path.iterdir())
