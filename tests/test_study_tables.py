"""Tables of made-up results."""

import random

import pytest
from tiny_study import COLUMNS, ROWS, make_row, make_rows, with_funnel

from gemma_funnel.study import analysis, tables


def _table(rows, number):
  made = tables.make_tables(analysis.organise(rows))
  return next(t for t in made if t.title.startswith(f"{number}"))


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
      yield make_row("cell", "topic", seed, value=0.8)
      for tuned, lost in (("off", drop), ("on", drop / 2)):
        yield make_row(
          "cell",
          "topic",
          seed,
          value=0.8 - lost,
          finetuning=tuned,
          **with_funnel(2, "add"),
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


def test_random_holes_and_several_stages():
  chance = random.Random(1)
  rows = make_rows()
  stages = "start=1,stop=4+start=2,stop=3"
  for seed in (0, 1):
    several = dict.fromkeys(("start", "stop", "stride", "reduce", "recover"))
    several |= dict(funnel=stages, inference="on", value=0.5)
    rows.append(make_row("cell", "topic", seed, **several))
  assert stages in _table(rows, 1).markdown()
  for _ in range(20):
    some = [row for row in rows if chance.random() < 0.3]
    tables.make_tables(analysis.organise(some))


def test_a_table_as_markdown():
  table = tables.Table("A & B", COLUMNS, ROWS, "a note <b>")
  assert table.markdown().splitlines() == [
    "## A & B",
    "",
    "a note <b>",
    "",
    "| na\\<me    | value (%) |         drop |",
    "|-----------|----------:|-------------:|",
    "| a\\|b \\<i> |      50.0 | -1.20 ± 0.30 |",
    "| 2nd       |         - |  10.00 (n=1) |",
  ]
  empty = tables.Table("Failures", COLUMNS, (), "None.")
  assert empty.markdown() == "## Failures\n\nNone."
