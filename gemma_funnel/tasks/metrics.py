"""Metrics by name; scikit-learn, SciPy and seqeval compute them.

They are imported when a metric is wanted: importing the package stays light.
"""

from collections.abc import Callable, Iterable, Sequence
import importlib
import math
import re
from typing import Any
import warnings

import numpy as np

from gemma_funnel.checks import require

Value = float | None
_SPAN_TAG = re.compile("O|[BI]-.+")


def check_names(names: Iterable[str], kind: str | None = None) -> None:
  """Raises ValueError on a metric that is unknown or not of the task's kind."""
  for name in names:
    require(
      name in _METRICS, f"metric {name!r}: expected one of {list(_METRICS)}"
    )
    fitting = [n for n, (kinds, _) in _METRICS.items() if kind in kinds]
    require(
      kind is None or name in fitting,
      f"metric {name!r}: not of kind={kind!r}; expected one of {fitting}",
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
    FloatingPointError: a number that is not finite.
  """
  names = tuple(names)
  check_names(names)
  require(
    len(predictions) == len(references) > 0,
    f"found {len(predictions)} predictions and {len(references)} references; "
    "expected as many of both, and at least one",
  )
  require(
    "f1" not in names or len(task_labels) == 2,
    f"metric 'f1': found {len(task_labels)} labels; expected two",
  )
  with warnings.catch_warnings():
    # Of a single class, of constant or nearly constant input.
    warnings.simplefilter("ignore", UserWarning)
    warnings.simplefilter("ignore", RuntimeWarning)
    return {name: _METRICS[name][1](predictions, references) for name in names}


def _call(module: str, function: str, *args, **options) -> Any:
  return getattr(importlib.import_module(module), function)(*args, **options)


def _of_labels(function: str, **options) -> Callable[..., Value]:
  """A metric of scikit-learn's."""
  return lambda predictions, references: float(
    _call("sklearn.metrics", function, references, predictions, **options)
  )


def _of_tokens(metric: Callable[..., Value]) -> Callable[..., Value]:
  def compute_one(predictions, references) -> Value:
    _check_sentences(predictions, references)
    flat = [[t for s in part for t in s] for part in (predictions, references)]
    require(bool(flat[0]), "sentences without words: expected a tag or more")
    return metric(*flat)

  return compute_one


def _of_numbers(function: str) -> Callable[..., Value]:
  def compute_one(predictions, references) -> Value:
    x, y = (np.asarray(v, np.float64) for v in (predictions, references))
    for what, values in (("prediction", x), ("reference", y)):
      if not np.isfinite(values).all():
        at = int(np.argmin(np.isfinite(values)))
        raise FloatingPointError(f"{what} {at} is {values[at]}")
    if len(x) < 2:
      return None
    value = float(_call("scipy.stats", function, x, y).statistic)
    return value if math.isfinite(value) else None

  return compute_one


def _of_spans(name: str) -> Callable[..., Value]:
  def compute_one(predictions, references) -> Value:
    _check_sentences(predictions, references)
    for tag in (t for s in (*predictions, *references) for t in s):
      require(
        bool(_SPAN_TAG.fullmatch(tag)),
        f"metric 'span_{name}': found the tag {tag!r}; expected BIO2 tags",
      )
    lists = [[*map(list, part)] for part in (references, predictions)]
    # A share of no spans is 0.
    score = _call("seqeval.metrics", f"{name}_score", *lists, zero_division=0)
    return float(score)

  return compute_one


def _check_sentences(predictions, references) -> None:
  for i, (ours, theirs) in enumerate(zip(predictions, references, strict=True)):
    require(
      not isinstance(ours, str) and not isinstance(theirs, str),
      f"sentence {i}: found a string; expected a list of tags",
    )
    require(
      len(ours) == len(theirs),
      f"sentence {i}: found {len(ours)} predicted tags; expected {len(theirs)}",
    )


def _exact_match(predictions, references) -> Value:
  right = 0
  for ours, theirs in zip(predictions, references, strict=True):
    answers = (theirs,) if isinstance(theirs, str) else theirs
    right += ours.strip() in {answer.strip() for answer in answers}
  return right / len(references)


_accuracy = _of_labels("accuracy_score")
_macro_f1 = _of_labels("f1_score", average="macro", zero_division=0)
# As an average over the one label: pos_label must occur, `labels` need not.
_f1 = _of_labels("f1_score", labels=[1], average="macro", zero_division=0)
_CLASSES = ("classification",)
_METRICS: dict[str, tuple[tuple[str, ...], Callable[..., Value]]] = {
  "accuracy": (("classification", "choice"), _accuracy),
  "f1": (_CLASSES, _f1),
  "macro_f1": (_CLASSES, _macro_f1),
  "matthews": (_CLASSES, _of_labels("matthews_corrcoef")),
  "pearson": (("regression",), _of_numbers("pearsonr")),
  "spearman": (("regression",), _of_numbers("spearmanr")),
  "span_f1": (("tagging",), _of_spans("f1")),
  "span_precision": (("tagging",), _of_spans("precision")),
  "span_recall": (("tagging",), _of_spans("recall")),
  "token_accuracy": (("tagging",), _of_tokens(_accuracy)),
  "token_macro_f1": (("tagging",), _of_tokens(_macro_f1)),
  "exact_match": (("generation",), _exact_match),
}
