"""Metrics by name; scikit-learn, SciPy and seqeval compute them.

They are imported when a metric is wanted: importing the package stays light.
"""

from collections.abc import Callable, Iterable, Sequence
import math
import re
from typing import Any
import warnings

import numpy as np

Value = float | None
_SPAN_TAG = re.compile("O|[BI]-.+")


def check_names(names: Iterable[str], kind: str) -> None:
  """Raises ValueError on a metric that is unknown or not of the task's kind."""
  for name in names:
    if name not in _METRICS:
      raise ValueError(f"metric {name!r}: expected one of {list(_METRICS)}")
    if kind not in _METRICS[name][0]:
      fitting = [n for n, (kinds, _) in _METRICS.items() if kind in kinds]
      raise ValueError(
        f"metric {name!r}: not of kind={kind!r}; expected one of {fitting}"
      )


def compute(
  names: Iterable[str],
  task_labels: Sequence[str],
  predictions: Sequence[Any],
  references: Sequence[Any],
) -> dict[str, Value]:
  """Metrics of predictions.

  Args:
    names: accuracy; f1, of the last of two labels (as GLUE's); macro_f1 over
      the labels that occur; matthews; pearson; spearman; span_f1,
      span_precision and span_recall of conlleval (micro averages); span tags
      are B-, I- and O; token_accuracy and token_macro_f1; exact_match, blanks
      at the ends aside.
    task_labels: names of the labels; () where there are none.
    predictions: label indices (classification, choice), numbers (regression),
      a list of tags a sentence (tagging) or strings (generation).
    references: the same; strings or lists of them for generation.

  Returns:
    A value for each name; shares are of 1. A correlation that is undefined,
    because the predictions or the references are all equal, is None.

  Raises:
    ValueError: an unknown name, no examples, unequal numbers of them, or a
      metric that does not fit the labels or tags.
    FloatingPointError: a prediction or reference that is not finite.
  """
  names = tuple(names)
  for name in names:
    if name not in _METRICS:
      raise ValueError(f"metric {name!r}: expected one of {list(_METRICS)}")
  if len(predictions) != len(references) or not len(references):
    raise ValueError(
      f"found {len(predictions)} predictions and {len(references)} "
      "references; expected as many of both, and at least one"
    )
  return {
    name: _METRICS[name][1](task_labels, predictions, references)
    for name in names
  }


def _accuracy(labels, predictions, references) -> Value:
  return float(np.mean(np.asarray(predictions) == np.asarray(references)))


def _f1(labels, predictions, references) -> Value:
  from sklearn import metrics

  if len(labels) != 2:
    raise ValueError(
      f"metric 'f1': found {len(labels)} labels; expected two (see 'macro_f1')"
    )
  # As an average over the one label: pos_label must occur, `labels` need not.
  return float(
    metrics.f1_score(
      references, predictions, labels=[1], average="macro", zero_division=0
    )
  )


def _macro_f1(labels, predictions, references) -> Value:
  from sklearn import metrics

  return float(
    metrics.f1_score(references, predictions, average="macro", zero_division=0)
  )


def _matthews(labels, predictions, references) -> Value:
  from sklearn import metrics

  with warnings.catch_warnings():
    # Of one label alone, which gives 0.
    warnings.simplefilter("ignore", UserWarning)
    value = metrics.matthews_corrcoef(references, predictions)
  return float(value)


def _correlation(name: str) -> Callable[..., Value]:
  def compute_one(labels, predictions, references) -> Value:
    from scipy import stats

    x = np.asarray(predictions, np.float64)
    y = np.asarray(references, np.float64)
    for what, values in (("prediction", x), ("reference", y)):
      if not np.isfinite(values).all():
        at = int(np.argmin(np.isfinite(values)))
        raise FloatingPointError(f"{what} {at} is {values[at]}")
    if len(x) < 2:
      return None
    with warnings.catch_warnings():
      # Of constant input, which gives NaN, and of nearly constant input.
      warnings.simplefilter("ignore", RuntimeWarning)
      value = float(getattr(stats, name)(x, y).statistic)
    return value if math.isfinite(value) else None

  return compute_one


def _span(name: str) -> Callable[..., Value]:
  def compute_one(labels, predictions, references) -> Value:
    from seqeval import metrics

    _check_sentences(predictions, references)
    for sentence in (*predictions, *references):
      for tag in sentence:
        if not _SPAN_TAG.fullmatch(tag):
          raise ValueError(
            f"metric 'span_{name}': found the tag {tag!r}; expected BIO2 tags"
          )
    score = getattr(metrics, f"{name}_score")
    lists = [[*map(list, part)] for part in (references, predictions)]
    # zero_division is of a share of none; a share without a span is 0.
    return float(score(*lists, zero_division=0))

  return compute_one


def _on_tokens(metric: Callable[..., Value]) -> Callable[..., Value]:
  def compute_one(labels, predictions, references) -> Value:
    _check_sentences(predictions, references)
    flat = [[t for s in part for t in s] for part in (predictions, references)]
    if not flat[0]:
      raise ValueError("found sentences without words; expected a tag or more")
    return metric(labels, *flat)

  return compute_one


def _check_sentences(predictions, references) -> None:
  for i, (ours, theirs) in enumerate(zip(predictions, references, strict=True)):
    if isinstance(ours, str) or isinstance(theirs, str):
      raise ValueError(f"sentence {i}: found a string; expected a list of tags")
    if len(ours) != len(theirs):
      raise ValueError(
        f"sentence {i}: found {len(ours)} predicted tags; expected "
        f"{len(theirs)}"
      )


def _exact_match(labels, predictions, references) -> Value:
  right = 0
  for ours, theirs in zip(predictions, references, strict=True):
    answers = (theirs,) if isinstance(theirs, str) else theirs
    right += ours.strip() in {answer.strip() for answer in answers}
  return right / len(references)


_CLASSES = ("classification",)
_METRICS: dict[str, tuple[tuple[str, ...], Callable[..., Value]]] = {
  "accuracy": (("classification", "choice"), _accuracy),
  "f1": (_CLASSES, _f1),
  "macro_f1": (_CLASSES, _macro_f1),
  "matthews": (_CLASSES, _matthews),
  "pearson": (("regression",), _correlation("pearsonr")),
  "spearman": (("regression",), _correlation("spearmanr")),
  "span_f1": (("tagging",), _span("f1")),
  "span_precision": (("tagging",), _span("precision")),
  "span_recall": (("tagging",), _span("recall")),
  "token_accuracy": (("tagging",), _on_tokens(_accuracy)),
  "token_macro_f1": (("tagging",), _on_tokens(_macro_f1)),
  "exact_match": (("generation",), _exact_match),
}
