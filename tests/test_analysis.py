"""What is said of results that are made up: truths are planted."""

import json
import math

import pytest
import tiny_run
from tiny_study import RECOVERIES, TASKS, make_row, make_rows, with_funnel

from gemma_funnel.study import analysis


def _claims(rows):
  return analysis.claims(analysis.organise(rows))


def _line(claims, start, number=0):
  found = [line for line in claims if line.startswith(start)]
  assert found, claims
  return found[number]


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
    make_row("cell", "topic", 0, value=0.9),
    make_row("cell", "topic", 1, value=0.5),
    make_row("cell", "topic", 0, value=0.8, **with_funnel(2, "add")),
    make_row("cell", "topic", 1, value=0.6, **with_funnel(2, "add")),
    make_row("cell", "topic", 2, value=0.6, **with_funnel(2, "add")),
    make_row("cell", "prose", 0, value=2.0),
    make_row("cell", "prose", 0, value=2.1, **with_funnel(2, "add")),
    make_row("cell", "topic", 0, value=0.7, finetuning="on"),
    make_row("cell", "topic", 0, value=0.6, pretraining="aware"),
  ]
  results = analysis.organise(rows)
  drops = [cell["drop"] for cell in results.compared()]
  assert drops == pytest.approx([10, -10, 5])
  units = [cell["unit"] for cell in results.compared()]
  assert units == [analysis.POINTS, analysis.POINTS, analysis.PERCENT]
  # Trained otherwise, without a funnel at inference: not a baseline.
  plain = [c["drop"] for c in results.compared("plain")]
  assert plain == pytest.approx([20, 30])


def test_later_rows_replace_earlier_ones_and_failures_nothing():
  cell = lambda value: make_row("cell", "topic", 0, value=value)
  failed = make_row("failure", "topic", 0, error="no")
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
  row = make_row("cell", "topic", 0)
  with pytest.raises(ValueError, match=r"row 2 \(cell\) has no \['value'\]"):
    analysis.organise([make_row("cell", "topic", 0, value=1.0), row])


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
    make_row("cell", "topic", 0, value=1.0, **with_funnel(2, r))
    for r in RECOVERIES
  ]
  apart[1]["funnel"] += ",keep_first=true"
  assert [len(g) for g in analysis.pairings(apart, "recover")] == [2]


# --- Verdicts -------------------------------------------------------------


def test_claims_find_what_was_planted():
  claims = _claims(make_rows())
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
  claims = _claims(rows)
  assert "are not distinguishable" in _line(claims, "recover:")
  assert "are not distinguishable" in _line(claims, "pretraining: sampled")
  assert "later is better" in _line(claims, "start:")


def test_a_few_pairings_show_nothing():
  rows = make_rows(noise=0, seeds=(0,))
  keep = lambda r: r["task"] == "topic" and r["start"] in (None, 2)
  few = [r for r in rows if keep(r) and r["finetuning"] == "off"]
  assert "of 3 pairings" in _line(_claims(few), "pretraining:")
  two = [r for r in few if r["recover"] != "add"]
  assert "not distinguishable" in _line(_claims(two), "pretraining:")


def test_what_a_pretraining_costs_without_thewith_funnel():
  rows = make_rows(noise=0, seeds=(0, 1, 2))
  for seed in (0, 1, 2):
    value = 0.8 + 0.02 * seed - 0.03
    rows.append(
      make_row("cell", "topic", seed, value=value, pretraining="aware")
    )
  line = _line(_claims(rows), "pretraining: aware costs")
  assert "drop +3.00, spread 0.00 points, 3 cells" in line


@pytest.mark.parametrize("name", ["study", "study_quick"])
def test_published_results_say_what_was_published(name):
  """They are of version 0.1, which called `reduce` `pool`."""
  folder = tiny_run.ROOT / "docs" / name
  lines = (folder / "results.jsonl").read_text().splitlines()
  published = (folder / "tables.md").read_text().splitlines()
  said = [line.removeprefix("- ") for line in published if line[:2] == "- "]
  assert _claims(map(json.loads, lines)) == said
