"""Metrics equal values by hand and conlleval's spans, absent classes too."""

import math
import subprocess
import sys

import numpy as np
import pytest

from gemma_funnel.tasks import metrics

LABELS = ("a", "b", "c", "d")


def _compute(name, predictions, references, labels=LABELS):
  return metrics.compute([name], labels, predictions, references)[name]


@pytest.mark.parametrize(
  "name, predictions, references, expected",
  [
    ("accuracy", [0, 1, 1, 3], [0, 1, 2, 2], 1 / 2),
    # Of the labels that occur: a 1, b 2/3, c 0, d 0.
    ("macro_f1", [0, 1, 1, 3], [0, 1, 2, 2], (1 + 2 / 3) / 4),
    ("macro_f1", [0, 0], [0, 0], 1),
    # (tp tn - fp fn) / sqrt((tp + fp) (tp + fn) (tn + fp) (tn + fn)).
    ("matthews", [1, 1, 0, 0, 0], [1, 0, 0, 0, 1], 1 / 6),
    # (c s - sum p t) / sqrt((s^2 - sum p^2) (s^2 - sum t^2)): Gorodkin, 2004.
    ("matthews", [0, 1, 1, 3], [0, 1, 2, 2], (8 - 3) / math.sqrt(10 * 10)),
    ("matthews", [1, 1], [1, 0], 0),
    ("pearson", [1, 2, 4], [2, 1, 3], 6 / math.sqrt(84)),
    ("spearman", [1, 2, 40], [2, 1, 3], 1 / 2),
    ("spearman", [1, 1, 4], [1, 2, 3], math.sqrt(3) / 2),  # A tie: 1.5, 1.5.
  ],
)
def test_values_by_hand(name, predictions, references, expected):
  found = _compute(name, predictions, references)
  assert found == pytest.approx(expected)


@pytest.mark.parametrize(
  "predictions, references, expected",
  [
    ([1, 1, 0, 0], [1, 0, 0, 1], 1 / 2),
    ([1, 1, 1, 0], [0, 1, 0, 0], 1 / 2),
    ([0, 0], [0, 0], 0),
    ([0, 0], [1, 1], 0),
    ([1, 1], [1, 1], 1),
  ],
)
def test_f1_is_of_the_last_of_two_labels(predictions, references, expected):
  assert _compute("f1", predictions, references, ("no", "yes")) == expected
  with pytest.raises(ValueError, match="'f1': found 4 labels; expected two"):
    _compute("f1", [0], [0])


@pytest.mark.parametrize("name", ["pearson", "spearman"])
class TestUndefined:
  def test_constants_have_no_correlation(self, name):
    assert _compute(name, [2.0, 2.0, 2.0], [1.0, 2.0, 3.0], ()) is None
    assert _compute(name, [1.0, 2.0, 3.0], [0.0, 0.0, 0.0], ()) is None
    assert _compute(name, [1.0], [2.0], ()) is None

  def test_nearly_constant_is_a_number_or_none(self, name):
    values = [1.0, 1.0, 1.0 + 1e-15]
    found = _compute(name, values, [1.0, 2.0, 3.0], ())
    assert found is None or math.isfinite(found)

  @pytest.mark.parametrize("value", [math.nan, math.inf])
  def test_not_finite(self, name, value):
    with pytest.raises(FloatingPointError, match="prediction 1 is"):
      _compute(name, [1.0, value], [1.0, 2.0], ())
    with pytest.raises(FloatingPointError, match="reference 0 is"):
      _compute(name, [1.0, 2.0], [value, 2.0], ())


def _spans(tags):
  """As conlleval: B- starts a span, and I- does after another type."""
  spans, start, type_ = set(), 0, None
  for i, tag in enumerate([*tags, "O"]):
    continues = tag[0] == "I" and tag[2:] == type_
    if type_ is not None and not continues:
      spans.add((start, i, type_))
    if not continues:
      start, type_ = i, tag[2:] or None
  return spans


def test_spans_as_conlleval_counts_them():
  rng = np.random.default_rng(3)
  tags = ("O", "O", "B-A", "I-A", "B-B", "I-B")
  for _ in range(60):
    sizes = rng.integers(1, 9, 3)
    ours, theirs = (
      [rng.choice(tags, n).tolist() for n in sizes] for _ in range(2)
    )
    hit = said = true = 0
    for a, b in zip(map(_spans, ours), map(_spans, theirs), strict=True):
      hit, said, true = hit + len(a & b), said + len(a), true + len(b)
    found = metrics.compute(
      ["span_f1", "span_precision", "span_recall"], tags, ours, theirs
    )
    assert found == pytest.approx(
      {
        "span_f1": 2 * hit / (said + true) if said + true else 0.0,
        "span_precision": hit / said if said else 0.0,
        "span_recall": hit / true if true else 0.0,
      }
    )


def test_no_spans_at_all():
  assert _compute("span_f1", [["O", "O"]], [["O", "O"]]) == 0.0
  assert _compute("span_f1", [["O"]], [["B-A"]]) == 0.0


def test_tokens():
  ours, theirs = [["a", "b"], ["c"]], [["a", "a"], ["b"]]
  assert _compute("token_accuracy", ours, theirs) == pytest.approx(1 / 3)
  # a: 2/3, b: 0, c: 0.
  assert _compute("token_macro_f1", ours, theirs) == pytest.approx(2 / 9)


def test_exact_match():
  found = _compute("exact_match", [" 18", "2", "x"], ["18", ("1", "2 "), "X"])
  assert found == pytest.approx(2 / 3)


@pytest.mark.parametrize(
  ("name", "predictions", "references", "message"),
  [
    ("bleu", [0], [0], "metric 'bleu': expected one of .*'span_f1'"),
    ("accuracy", [], [], "found 0 predictions and 0 references"),
    ("accuracy", [0], [0, 1], "found 1 predictions and 2 references"),
    ("span_f1", [["O"]], [["O", "O"]], "sentence 0: found 1 .* expected 2"),
    ("span_f1", [["PER"]], [["O"]], "'span_f1': found the tag 'PER'"),
    ("token_accuracy", ["ab"], [["a", "b"]], "sentence 0: found a string"),
    ("token_accuracy", [[]], [[]], "sentences without words"),
  ],
)
def test_bad_input(name, predictions, references, message):
  with pytest.raises(ValueError, match=message):
    _compute(name, predictions, references)


def test_names_fit_kinds():
  metrics.check_names(["accuracy", "matthews"], "classification")
  with pytest.raises(ValueError, match="'pearson': not of kind='tagging'"):
    metrics.check_names(["pearson"], "tagging")


def test_libraries_are_imported_when_wanted():
  program = (
    "import sys; import gemma_funnel.tasks\n"
    "heavy = {'sklearn', 'scipy.stats', 'seqeval', 'tensorflow_datasets', "
    "'tensorflow'}\n"
    "print(heavy & set(sys.modules))"
  )
  found = subprocess.run(
    [sys.executable, "-c", program], check=True, capture_output=True, text=True
  ).stdout
  assert found == "set()\n"


def test_f1_is_of_two_labels():
  metrics.check_names(["f1"], "classification", ("a", "b"))
  with pytest.raises(ValueError, match="'f1': found 3 labels; expected two"):
    metrics.check_names(["f1"], "classification", ("a", "b", "c"))
