"""Metrics by name; scikit-learn, SciPy and seqeval compute them.

They are imported when a metric is wanted: importing the package stays light.
"""

from collections.abc import Iterable, Sequence
import math
import re
from typing import Any
import warnings

import numpy as np

from gemma_funnel.checks import require

_SPAN_TAG = re.compile("O|[BI]-.+")
_CLASSES, _TAGS = ("classification",), ("tagging",)
_NUMBERS = ("regression",)
# The kinds of tasks that each is of.
_KINDS = {
  "accuracy": ("classification", "choice"),
  "f1": _CLASSES,
  "macro_f1": _CLASSES,
  "matthews": _CLASSES,
  "pearson": _NUMBERS,
  "spearman": _NUMBERS,
  "span_f1": _TAGS,
  "span_precision": _TAGS,
  "span_recall": _TAGS,
  "token_accuracy": _TAGS,
  "token_macro_f1": _TAGS,
  "exact_match": ("generation",),
}


def check_names(
  names: Iterable[str],
  kind: str | None = None,
  labels: Sequence[str] | None = None,
) -> None:
  """Raises ValueError on a metric that is unknown, or not of such a task."""
  for name in names:
    require(name in _KINDS, f"metric {name!r}: expected one of {list(_KINDS)}")
    fitting = [n for n, kinds in _KINDS.items() if kind in kinds]
    require(
      kind is None or name in fitting,
      f"metric {name!r}: not of kind={kind!r}; expected one of {fitting}",
    )
    require(
      name != "f1" or labels is None or len(labels) == 2,
      f"metric 'f1': found {len(labels or ())} labels; expected two",
    )
    is_spans = kind == "tagging" and name.startswith("span_")
    for tag in labels or () if is_spans else ():
      require(
        bool(_SPAN_TAG.fullmatch(tag)),
        f"metric {name!r}: found the tag {tag!r}; expected BIO2 tags",
      )


def compute(
  names: Iterable[str],
  task_labels: Sequence[str],
  predictions: Sequence[Any],
  references: Sequence[Any],
) -> dict[str, float | None]:
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
  check_names(names, labels=task_labels)
  require(
    len(predictions) == len(references) > 0,
    f"found {len(predictions)} predictions and {len(references)} references; "
    "expected as many of both, and at least one",
  )
  with warnings.catch_warnings():
    # Of a single class, of constant or nearly constant input.
    warnings.simplefilter("ignore", UserWarning)
    warnings.simplefilter("ignore", RuntimeWarning)
    return {name: _compute(name, predictions, references) for name in names}


def _compute(name: str, predictions, references) -> float | None:
  match name.split("_"):
    case ["pearson" | "spearman"]:
      return _correlation(name, predictions, references)
    case ["exact", "match"]:
      answers = [(r,) if isinstance(r, str) else r for r in references]
      pairs = zip(predictions, answers, strict=True)
      right = [p.strip() in {a.strip() for a in some} for p, some in pairs]
      return sum(right) / len(right)
    case ["span", which]:
      from seqeval import metrics as seqeval

      _check_sentences(predictions, references)
      for tag in (t for s in (*predictions, *references) for t in s):
        require(
          bool(_SPAN_TAG.fullmatch(tag)),
          f"metric {name!r}: found the tag {tag!r}; expected BIO2 tags",
        )
      score = getattr(seqeval, f"{which}_score")
      tags = [[*map(list, part)] for part in (references, predictions)]
      return float(score(*tags, zero_division=0))  # A share of no spans is 0.
    case ["token", *_]:
      _check_sentences(predictions, references)
      predictions = [tag for tags in predictions for tag in tags]
      references = [tag for tags in references for tag in tags]
      require(bool(references), "sentences without words: expected a tag")
  from sklearn import metrics as sklearn

  match name.removeprefix("token_"):
    case "accuracy":
      return float(sklearn.accuracy_score(references, predictions))
    case "matthews":
      return float(sklearn.matthews_corrcoef(references, predictions))
  # An average over the one label 1: pos_label must occur, `labels` need not.
  labels = [1] if name == "f1" else None
  options = dict(labels=labels, average="macro", zero_division=0)
  return float(sklearn.f1_score(references, predictions, **options))


def _correlation(name: str, predictions, references) -> float | None:
  from scipy import stats

  arrays = [np.asarray(v, np.float64) for v in (predictions, references)]
  for what, values in zip(("prediction", "reference"), arrays, strict=True):
    if not np.isfinite(values).all():
      at = int(np.argmin(np.isfinite(values)))
      raise FloatingPointError(f"{what} {at} is {values[at]}")
  if len(predictions) < 2:
    return None
  value = float(getattr(stats, f"{name}r")(*arrays).statistic)
  return value if math.isfinite(value) else None


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
