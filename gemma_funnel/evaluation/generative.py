"""Tasks that a language model answers by itself, with each of its funnels.

"choice": the likeliest of some continuations. "perplexity": how likely texts
are. "generation": what the model writes, against the answers that are right.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import json
import math
import os
import re
from typing import Any

import numpy as np

from gemma_funnel import flops, generate, tasks
from gemma_funnel.config import check_recovers, format_funnel
from gemma_funnel.data import tokenizer as tokenizer_lib
from gemma_funnel.data.tokenizer import BOS_ID, EOS_ID, Tokenizer
from gemma_funnel.decode import decoder as decoder_lib
from gemma_funnel.decode.sampling import GREEDY, Sampling
from gemma_funnel.evaluation import asking, finetuned, plots, report, scoring
from gemma_funnel.evaluation import funnels as funnels_lib
from gemma_funnel.evaluation import subject as subject_lib
from gemma_funnel.evaluation.asking import Settings, check, main_metric
from gemma_funnel.model import Transformer
from gemma_funnel.tasks.task import Task

Row = dict[str, Any]
TRAINED = "trained"
_MAX_EXPONENT = 709.0
# Tokens between looks for a stop string.
_CHUNK = 16


def evaluate(
  task: Task, model: Transformer, tokenizer: Tokenizer, settings: Settings
) -> Row:
  """Metrics of a task.

  Args:
    task: of one of GENERATIVE_KINDS.
    model: with the funnel to run it with.
    tokenizer: the model's.
    settings: how to put the task.

  Returns:
    `num_examples`; `num_cut`, how many of them lost the beginning of their
    prompt; and of "choice", `accuracy` by summed log-likelihoods,
    `accuracy_norm` by those a byte of the choice without the spaces before it
    (lm_eval's acc_bytes), `num_ties`, examples whose likeliest choices are
    equally likely, which count as wrong, and `groups`, the same by group; of
    "perplexity", `loss` in nats a token, `perplexity`, its exponential,
    `bits_per_byte` of UTF-8, `word_perplexity` (words as lm_eval counts them:
    pieces between spaces, empty ones at either end included) and `num_tokens`;
    of "generation", `exact_match` after spaces were made one and stripped, and
    `num_found`, answers that `answer_pattern` found. What is not finite is None.

  Raises:
    ValueError: a task of another kind, no examples, a setting that does not
      fit, or a funnel that does not recover.
    FloatingPointError: a log-likelihood that is not finite.
  """
  return summarize(task.kind, predict(task, model, tokenizer, settings))


def predict(
  task: Task, model: Transformer, tokenizer: Tokenizer, settings: Settings
) -> list[Row]:
  """What a model makes of each example; JSON values, in order.

  Args and errors are those of `evaluate`.
  """
  check(task, settings)
  check_recovers(model.stages, f"the task {task.name}")
  longest = model.config.max_length
  if settings.max_length is not None:
    if settings.max_length > longest:
      raise ValueError(
        f"max_length={settings.max_length}: expected at most "
        f"model.max_length={longest}"
      )
    longest = settings.max_length
  examples = task.splits[settings.split][: settings.max_examples]
  function = _PREDICTORS[task.kind]
  return function(task, examples, model, tokenizer, settings, longest)


def _predict_choices(task, examples, model, tokenizer, settings, longest):
  prompt_of = asking.prompt_maker(task, settings, lambda e: e.choices[e.answer])
  requests = []
  for number, example in enumerate(examples):
    prompt = prompt_of(example)
    for choice in example.choices:
      requests.append(_pair(task, number, tokenizer, prompt, choice))
  scores = iter(
    scoring.log_likelihoods(
      model,
      requests,
      batch_size=settings.batch_size,
      lengths=scoring.bucket_lengths(longest),
    )
  )
  fed = iter([len(a) + len(b) - 1 for a, b in requests])
  return [
    _choice_record(
      example,
      [next(scores).log_likelihood for _ in example.choices],
      [next(fed) for _ in example.choices],
      longest,
    )
    for example in examples
  ]


def _pair(task, number, tokenizer, prompt, choice):
  try:
    return scoring.encode_pair(tokenizer, prompt, choice)
  except ValueError as error:
    raise ValueError(f"task {task.name}, example {number}: {error}") from error


def _choice_record(example, scores, fed, longest) -> Row:
  sizes = [max(1, len(c.lstrip().encode())) for c in example.choices]
  chosen, tied = _best(scores)
  per_byte = [s / n for s, n in zip(scores, sizes, strict=True)]
  chosen_norm, tied_norm = _best(per_byte)
  return {
    "prompt": example.prompt,
    "choices": list(example.choices),
    "answer": example.answer,
    "group": example.group,
    "log_likelihoods": scores,
    "chosen": chosen,
    "tied": tied,
    "correct": chosen == example.answer and not tied,
    "chosen_norm": chosen_norm,
    "correct_norm": chosen_norm == example.answer and not tied_norm,
    "num_fed": max(fed),
    "cut": max(fed) > longest,
  }


def _best(scores: Sequence[float]) -> tuple[int, bool]:
  """(the first of the highest, whether there are several)."""
  highest = max(scores)
  return scores.index(highest), scores.count(highest) > 1


def _predict_texts(task, examples, model, tokenizer, settings, longest):
  del task
  texts = [tokenizer.encode(example.text) for example in examples]
  totals = scoring.rolling(
    model,
    texts,
    batch_size=settings.batch_size,
    lengths=scoring.bucket_lengths(longest),
  )
  return [
    {
      "log_likelihood": total,
      "num_tokens": len(ids),
      "num_bytes": len(example.text.encode()),
      "num_words": len(re.split(r"\s+", example.text)),
      "num_fed": min(1 + len(ids), longest),
      "cut": False,
    }
    for example, ids, total in zip(examples, texts, totals, strict=True)
  ]


def _predict_generated(task, examples, model, tokenizer, settings, longest):
  prompt_of = asking.prompt_maker(task, settings, lambda e: e.answers[0])
  prompts = [
    [BOS_ID, *tokenizer.encode(prompt_of(example))] for example in examples
  ]
  texts = continuations(
    model,
    tokenizer,
    prompts,
    stop=settings.stop,
    longest=longest,
    max_new_tokens=settings.max_new_tokens,
    batch_size=settings.batch_size,
  )
  room = longest - settings.max_new_tokens
  records = []
  for example, ids, text in zip(examples, prompts, texts, strict=True):
    found = asking.extract(text, settings.answer_pattern)
    normal = lambda text: asking.normalize(text, settings)
    right = {normal(answer) for answer in example.answers}
    records.append(
      {
        "prompt": example.prompt,
        "answers": list(example.answers),
        "text": text,
        "found": found,
        "correct": found is not None and normal(found) in right,
        "num_fed": min(len(ids), room),
        "cut": len(ids) > room,
      }
    )
  return records


def continuations(
  model: Transformer,
  tokenizer: Tokenizer,
  prompts: Sequence[Sequence[int]],
  *,
  stop: Sequence[str],
  max_new_tokens: int,
  batch_size: int,
  longest: int,
  sampling: Sampling = GREEDY,
  seed: int = 0,
) -> list[str]:
  """Texts that go on from prompts, up to EOS or the first stop string.

  Args:
    model: with the funnel to decode with.
    tokenizer: the model's.
    prompts: token ids, BOS first. One too long loses tokens after BOS.
    stop: strings that end a text, and are no part of it.
    max_new_tokens: of each.
    batch_size: prompts that run together.
    longest: tokens of a prompt and its continuation at most.
    sampling: how tokens are drawn.
    seed: of what is drawn.

  Raises:
    ValueError: no room for a prompt beside `max_new_tokens`, or see `Decoder`.
  """
  room = longest - max_new_tokens
  if room < 1:
    raise ValueError(
      f"max_new_tokens={max_new_tokens}: expected less than the {longest} "
      "tokens that a prompt and its continuation may have"
    )
  if not prompts:
    return []
  cut = lambda ids: [*ids[:1], *ids[1:][max(0, len(ids) - room) :]]
  prompts = [cut(list(ids)) for ids in prompts]
  order = sorted(range(len(prompts)), key=lambda n: -len(prompts[n]))
  cache_length = len(prompts[order[0]]) + max_new_tokens
  decoder = decoder_lib.Decoder(model, cache_length)
  texts = [""] * len(prompts)
  size = min(batch_size, len(prompts))
  for start in range(0, len(order), size):
    batch = order[start : start + size]
    # A batch that is not full would be compiled for anew.
    full = batch + batch[-1:] * (size - len(batch))
    for results in decoder.stream(
      [prompts[n] for n in full],
      max_new_tokens=max_new_tokens,
      sampling=sampling,
      stop_ids=[EOS_ID],
      seed=seed,
      first_row=start,
      chunk=_CHUNK,
    ):
      whole = [generate.decode(tokenizer, r.tokens) for r in results]
      done = [
        r.stopped or any(s in text for s in stop)
        for r, text in zip(results, whole, strict=True)
      ]
      if all(done):
        break
    for number, text in zip(batch, whole, strict=False):
      texts[number] = _before(text, stop)
  return texts


def _before(text: str, stop: Sequence[str]) -> str:
  """What comes before the first of the stop strings."""
  return text[: min([len(text), *(text.find(s) for s in stop if s in text)])]


def summarize(kind: str, records: Sequence[Row]) -> Row:
  """Metrics of the records of `predict`; see `evaluate`."""
  total = lambda key: sum(record[key] for record in records)
  counts = {"num_examples": len(records), "num_cut": total("cut")}
  match kind:
    case "choice":
      groups = {}
      for record in records:
        groups.setdefault(record["group"], []).append(record)
      if len(groups) > 1:
        counts["groups"] = {k: _rates(v) for k, v in sorted(groups.items())}
      return _rates(records) | counts
    case "perplexity":
      return (
        _perplexities(
          *map(
            total, ("log_likelihood", "num_tokens", "num_bytes", "num_words")
          )
        )
        | counts
      )
  found = sum(record["found"] is not None for record in records)
  rate = total("correct") / len(records)
  return {"exact_match": rate, "num_found": found} | counts


def _rates(records) -> Row:
  count = len(records)
  return {
    "accuracy": sum(r["correct"] for r in records) / count,
    "accuracy_norm": sum(r["correct_norm"] for r in records) / count,
    "num_ties": sum(r["tied"] for r in records),
    "num_examples": count,
  }


def _perplexities(log_likelihood, tokens, num_bytes, words) -> Row:
  if not tokens:
    raise ValueError("the texts have no tokens: expected one at least")
  power = lambda x: math.exp(x) if x < _MAX_EXPONENT else None
  return {
    "loss": -log_likelihood / tokens,
    "perplexity": power(-log_likelihood / tokens),
    "bits_per_byte": -log_likelihood / math.log(2) / num_bytes,
    "word_perplexity": power(-log_likelihood / words),
    "num_tokens": tokens,
  }


_PREDICTORS = {
  "choice": _predict_choices,
  "perplexity": _predict_texts,
  "generation": _predict_generated,
}
COLUMNS = (
  report.Column("funnel", "funnel"),
  report.Column("resolved", "in full"),
  report.Column("accuracy", "accuracy %", ".2f", 100),
  report.Column("accuracy_norm", "a byte, %", ".2f", 100),
  report.Column("num_ties", "ties", "d"),
  report.Column("exact_match", "exact match %", ".2f", 100),
  report.Column("num_found", "answers found", "d"),
  report.Column("loss", "loss (nats/token)", ".4f"),
  report.Column("perplexity", "perplexity", ".3f"),
  report.Column("bits_per_byte", "bits/byte", ".4f"),
  report.Column("word_perplexity", "word perplexity", ".3f"),
  report.Column("num_cut", "cut", "d"),
  report.Column("ideal_reduction", "FLOPs saved %", ".1f", 100),
)
_SETTINGS = tuple(field.name for field in dataclasses.fields(Settings))
KEYS = (
  "checkpoint",
  "tokenizer",
  "dtype",
  "funnels",
  "task",
  "out",
  *_SETTINGS,
)


def measure(
  task: Task,
  model: Transformer,
  funnels: Mapping[str, funnels_lib.Stages],
  tokenizer: Tokenizer,
  settings: Settings,
) -> tuple[list[Row], list[Row]]:
  """Evaluates a model on a task with each of several funnels.

  Returns:
    A row for each funnel: what `evaluate` returns, `funnel`, `resolved`,
    `metric` and `value`, the main one, and `ideal_reduction`, the share of a
    pass's FLOPs saved at the examples' mean length, head included (None for
    "generation"). And what `predict` returns, with `funnel`.

  Raises:
    ValueError, FloatingPointError: see `evaluate`.
  """
  check(task, settings)
  config, metric = model.config, main_metric(task)
  if task.kind == "generation":
    # Otherwise each funnel's decoder would hold a copy of all layers.
    model = decoder_lib.unstacked(model)
  rows, predictions = [], []
  for name, stages in funnels.items():
    print(f"task {task.name}: {name}", flush=True)
    records = predict(task, model.with_funnel(stages), tokenizer, settings)
    found = summarize(task.kind, records)
    saved = None
    if task.kind != "generation":
      length = max(1, round(float(np.mean([r["num_fed"] for r in records]))))
      saved = flops.ideal_reduction(config, stages, 1, length)
    row = {"funnel": name, "resolved": format_funnel(stages), **found}
    row |= {"metric": metric, "value": found[metric], "ideal_reduction": saved}
    rows.append(row)
    predictions += [{"funnel": name, **record} for record in records]
  return rows, predictions


def run(config: Any) -> list[Row]:
  """Puts a task to a checkpoint, and writes a table, a plot and predictions.

  Writes TASK.json, .md, .png and TASK.predictions.jsonl to `config.out`. A
  fine-tuned run is measured on what its head is for: see `finetuned.evaluate`.

  Args:
    config: a ConfigDict with the keys of configs/eval_task.py.

  Returns:
    The rows of `measure`.

  Raises:
    ValueError: a key that is missing, or a value out of range.
    FloatingPointError: a log-likelihood that is not finite.
  """
  missing = [key for key in KEYS if key not in config]
  if missing:
    raise ValueError(f"the configuration lacks {missing}")
  settings = _settings(config)
  if finetuned.find_runs(config.checkpoint):
    return finetuned.evaluate(config, settings)
  # What can be said before a checkpoint is read.
  _require_recovery(funnels_lib.parse(config.funnels, {TRAINED: ()}))
  task = tasks.load(config.task)
  check(task, settings)
  subject = subject_lib.load(config, dtype=config.dtype)
  model = subject_lib.on_this_device(subject.model)
  path = subject.tokenizer_path
  tokenizer = tokenizer_lib.find_tokenizer(path, path, model.config.vocab_size)
  named = funnels_lib.resolve(
    config.funnels, model.config.num_layers, {TRAINED: model.stages}
  )
  _require_recovery(named)
  rows, predictions = measure(task, model, named, tokenizer, settings)
  out = config.out or subject_lib.folder(config.checkpoint)
  name = re.sub(r"[^\w.-]", "_", task.name)
  kept = dict(
    checkpoint=config.checkpoint,
    step=subject.step,
    task=config.task.to_dict(),
    skipped=dict(task.skipped),
    model=model.config.to_dict(),
    **dataclasses.asdict(settings),
  )
  step = "" if subject.step is None else f", step {subject.step}"
  note = f"{rows[0]['num_examples']} examples of split {settings.split}."
  report.write(
    out,
    name,
    rows,
    COLUMNS,
    f"{task.name}: {config.checkpoint}{step}",
    plots.task,
    settings=kept,
    notes=[note],
  )
  lines = [json.dumps(p, ensure_ascii=False) + "\n" for p in predictions]
  report.write_atomically(
    os.path.join(out, f"{name}.predictions.jsonl"), "".join(lines).encode()
  )
  return rows


def _settings(config: Any) -> Settings:
  values = {name: config[name] for name in _SETTINGS}
  if values["stop"] is not None and not isinstance(values["stop"], str):
    values["stop"] = tuple(values["stop"])
  # What is unset is as `Settings` has it.
  return Settings(**{k: v for k, v in values.items() if v is not None})


def _require_recovery(named: Mapping[str, funnels_lib.Stages]) -> None:
  for stages in named.values():
    check_recovers(stages, "a task that a language model answers")
