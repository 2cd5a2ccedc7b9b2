"""Plots of a study: what is drawn, and that it can be told apart."""

import itertools
import random

from matplotlib.backends import backend_agg
import pytest
from tiny_study import make_row, make_rows, with_funnel

from gemma_funnel.study import analysis, plots


def _drawn(rows):
  drawn = plots.draw(analysis.organise(rows))
  return {name: (figure, caption, alt) for name, figure, caption, alt in drawn}


def _axes(figure):
  return [axes for axes in figure.axes if axes.axison]


def _of_label(axes, label):
  lines = dict(zip(*axes.get_legend_handles_labels()[::-1], strict=True))
  return lines[label]


@pytest.fixture(scope="module")
def drawn():
  return _drawn(make_rows())


def test_what_is_drawn(drawn):
  assert list(drawn) == ["tradeoff.png", "start.png", "depth.png"]
  titles = {
    name: [axes.get_title() for axes in _axes(figure)]
    for name, (figure, _, _) in drawn.items()
  }
  assert titles["tradeoff.png"] == ["grammar", "topic", "prose"]
  assert titles["start.png"] == [
    f"{task}, {kind} pretraining"
    for task in ("grammar", "topic", "prose")
    for kind in ("standard", "aware")
  ]
  assert titles["depth.png"] == ["layers 2 to 7, stride 2, mean"]
  for _, caption, alt in drawn.values():
    assert caption and "plots of" in alt


def test_nothing_is_drawn_of_nothing():
  assert not _drawn([])
  assert not _drawn([make_row("cell", "topic", 0, value=1.0)])


def test_pareto_against_its_definition():
  chance = random.Random(0)
  for _ in range(100):
    points = [
      (chance.randrange(5), chance.randrange(5))
      for _ in range(chance.randrange(1, 9))
    ]
    for sign in (1, -1):
      beaten = lambda p: any(
        q != p and q[0] >= p[0] and sign * q[1] >= sign * p[1]  # noqa: B023
        for q in points  # noqa: B023
      )
      want = sorted(p for p in set(points) if not beaten(p))
      assert plots.pareto(points, sign == 1) == want


def test_the_front_and_the_baseline_are_where_they_should_be(drawn):
  axes = _axes(drawn["tradeoff.png"][0])[2]
  star = _of_label(axes, "baseline")
  assert list(star.get_xdata()) == [0]
  assert star.get_ydata()[0] == pytest.approx(0.81)
  front = _of_label(axes, "Pareto front")
  # Lower is better: the baseline, and with each start the best recovery.
  assert list(front.get_xdata()) == pytest.approx([0, 12.5, 25, 37.5])
  assert sorted(front.get_ydata()) == list(front.get_ydata())
  assert "lower" in axes.get_ylabel()


def test_measured_reductions_are_used_where_all_have_one():
  rows = make_rows()
  label = lambda rows: _axes(_drawn(rows)["tradeoff.png"][0])[0].get_xlabel()
  assert "FLOPs" in label(rows)
  for row in rows:
    row["reduction"] = 0.1 if row["inference"] == "on" else None
  assert "time" in label(rows)
  cell = next(r for r in rows if r["kind"] == "cell" and r["recover"])
  cell["reduction"] = None
  assert len({r["seed"] for r in rows}) > 1
  assert "FLOPs" in label(rows)


def test_error_bars_are_of_the_change_by_seed():
  """Seeds differ by 0.2 without a funnel, and by 0.04 in what it costs."""
  rows = []
  for seed, start in itertools.product((0, 1), (2, 4)):
    base = 0.6 + 0.2 * seed
    rows.append(make_row("cell", "topic", seed, value=base))
    value = base - 0.1 - 0.04 * seed
    rows.append(
      make_row("cell", "topic", seed, value=value, **with_funnel(start, "add"))
    )
  [axes] = _axes(_drawn(rows)["start.png"][0])
  [container] = axes.containers
  _, _, [bars] = container
  [low, high] = bars.get_segments()[0][:, 1]
  assert high - low == pytest.approx(2 * 0.04 / 2**0.5)
  assert (low + high) / 2 == pytest.approx(0.7 - 0.12)


def test_the_stage_is_shaded_and_the_recovery_marked(drawn):
  [axes] = _axes(drawn["depth.png"][0])
  [patch] = axes.patches
  assert (patch.get_x(), patch.get_width()) == (1.5, 6.0)
  lines = [line for line in axes.lines if len(line.get_xdata()) == 9]
  assert len(lines) == 6
  assert list(lines[0].get_xdata()) == [0, 1, 2, 3, 4, 5, 6, 7, 7.5]
  crosses = [line for line in axes.lines if line.get_marker() == "x"]
  assert all(list(line.get_xdata()) == [7.5] for line in crosses)
  looks = {(line.get_color(), line.get_linestyle()) for line in lines}
  assert len(looks) == 6


def test_many_panels_are_several_figures():
  rows = []
  for number, row in itertools.product(range(11), make_rows(seeds=(0,))):
    if row["task"] == "topic" and row["kind"] == "cell":
      rows.append(row | {"task": f"{number} {'long name ' * 6}"})
  drawn = _drawn([r for r in rows if r["start"] in (None, 2)])
  assert list(drawn)[:2] == ["tradeoff_1.png", "tradeoff_2.png"]
  shown = [len(_axes(figure)) for figure, _, _ in drawn.values()]
  assert shown[:2] == [9, 2] and sum(shown[2:]) == 22
  assert max(shown) <= 10


def _overlaps(boxes):
  return [(a, b) for a, b in itertools.combinations(boxes, 2) if a.overlaps(b)]


@pytest.mark.parametrize("long", [False, True])
def test_no_text_lies_on_other_text(long):
  rows = make_rows()
  if long:
    change = lambda task: f"{task} of a very long name indeed, twice over"
    rows = [r | {"task": r["task"] and change(r["task"])} for r in rows]
  for name, (figure, _, _) in _drawn(rows).items():
    canvas = backend_agg.FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    boxes = [figure.legends[0].get_window_extent(renderer)]
    for axes in _axes(figure):
      texts = [axes.title, axes.xaxis.label, axes.yaxis.label]
      low, high = axes.get_xlim()
      ticks = zip(axes.get_xticks(), axes.get_xticklabels(), strict=True)
      texts += [text for x, text in ticks if low <= x <= high]
      boxes += [t.get_window_extent(renderer) for t in texts if t.get_text()]
    assert not _overlaps(boxes), name
    width, height = figure.get_size_inches() * figure.dpi
    for box in boxes:
      assert 0 <= box.x0 and box.x1 <= width, name
      assert 0 <= box.y0 and box.y1 <= height, name
