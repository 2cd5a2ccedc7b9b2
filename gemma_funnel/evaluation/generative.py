"""Tasks that a language model answers by itself, with each of its funnels.

Kinds: "choice", the likeliest of some continuations; "perplexity", how likely
texts are; "generation", what the model writes, against the right answers.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import json
import math
import re
import statistics
from typing import Any

from gemma_funnel import atomic, flops, tasks
from gemma_funnel.checks import require
from gemma_funnel.data.tokenizer import Tokenizer
from gemma_funnel.decode import decoder as decoder_lib
from gemma_funnel.evaluation import (
  finetuned,
  load_for_eval,
  plots,
  prompts,
  report,
)
from gemma_funnel.evaluation import funnels as funnels_lib
from gemma_funnel.evaluation.prompts import Settings, check, main_metric
from gemma_funnel.evaluation.scoring import (
  Limits,
  Scorer,
  bucket_lengths,
  encode_pair,
)
from gemma_funnel.model import Transformer
from gemma_funnel.tasks.task import Task

Row = dict[str, Any]
_RECOVERS = "a task that a language model answers"


def evaluate(
  task: Task, model: Transformer, tokenizer: Tokenizer, settings: Settings
) -> Row:
  """Metrics of a task of one of GENERATIVE_KINDS, with the model's funnel.

  Returns:
    `num_examples`, and `num_cut`, how many lost the beginning of their prompt.
    What is not finite is None. By kind:
    "choice": `accuracy` by summed log-likelihoods; `accuracy_norm` by those a
      byte of the choice without the spaces before it (lm_eval's acc_bytes);
      `num_ties` of the likeliest, which count as wrong; `groups`, the same by
      group.
    "perplexity": `loss` in nats a token; `perplexity`, its exponential;
      `bits_per_byte` of UTF-8; `word_perplexity` (words as lm_eval's: pieces
      between spaces, empty ones at either end included); `num_tokens`.
    "generation": `exact_match`, of answers as `prompts.normalize` has them; and
      `num_found`, answers that `answer_pattern` found.

  Raises:
    ValueError: a task of another kind, no examples, a setting that does not
      fit, or a funnel that does not recover.
    FloatingPointError: a log-likelihood that is not finite.
  """
  return summarize(task.kind, predict(task, model, tokenizer, settings))


def predict(
  task: Task, model: Transformer, tokenizer: Tokenizer, settings: Settings
) -> list[Row]:
  """What a model makes of each example, as JSON values; see `evaluate`."""
  check(task, settings)
  longest, most = settings.max_length, model.config.max_length
  require(
    longest is None or longest <= most,
    f"max_length={longest}: expected at most model.max_length={most}",
  )
  lengths = bucket_lengths(longest or most)
  scorer = Scorer(model, tokenizer, settings.batch_size, lengths)
  examples = settings.sample(task.splits[settings.split])
  return _PREDICTORS[task.kind](task, examples, scorer, settings)


def _predict_choices(task, examples, scorer: Scorer, settings) -> list[Row]:
  prompt_of = prompts.prompt_maker(
    task, settings, lambda e: e.choices[e.answer]
  )
  pairs = []
  for number, e in enumerate(examples):
    try:
      prompt = prompt_of(e)
      pairs.append(
        [encode_pair(scorer.tokenizer, prompt, c) for c in e.choices]
      )
    except ValueError as error:
      raise ValueError(
        f"task {task.name}, example {number}: {error}"
      ) from error
  scores = iter(scorer.loglikelihood([p for same in pairs for p in same]))
  records = []
  for example, same in zip(examples, pairs, strict=True):
    record = _choice_record(
      example, [next(scores).log_likelihood for _ in same]
    )
    num_fed = max(len(a) + len(b) - 1 for a, b in same)
    cut = num_fed > scorer.max_length
    records.append(record | {"num_fed": num_fed, "cut": cut})
  return records


def _choice_record(example, scores: Sequence[float]) -> Row:
  sizes = [max(1, len(c.lstrip().encode())) for c in example.choices]
  per_byte = [s / n for s, n in zip(scores, sizes, strict=True)]
  record = {
    "prompt": example.prompt,
    "choices": list(example.choices),
    "answer": example.answer,
    "group": example.group,
    "log_likelihoods": scores,
    "tied": scores.count(max(scores)) > 1,
  }
  for suffix, values in (("", scores), ("_norm", per_byte)):
    chosen, tied = values.index(max(values)), values.count(max(values)) > 1
    record[f"chosen{suffix}"] = chosen
    record[f"correct{suffix}"] = chosen == example.answer and not tied
  return record


def _predict_texts(task, examples, scorer: Scorer, settings) -> list[Row]:
  del task, settings
  texts = [example.text for example in examples]
  ids = [scorer.tokenizer.encode(text) for text in texts]
  found = scorer.rolling(ids)
  return [
    {
      "log_likelihood": total,
      "num_tokens": len(tokens),
      "num_bytes": len(text.encode()),
      "num_words": len(re.split(r"\s+", text)),
      "num_fed": min(1 + len(tokens), scorer.max_length),
      "cut": False,
    }
    for text, tokens, total in zip(texts, ids, found, strict=True)
  ]


def _predict_generated(task, examples, scorer: Scorer, settings) -> list[Row]:
  prompt_of = prompts.prompt_maker(task, settings, lambda e: e.answers[0])
  bos, encode = scorer.tokenizer.bos_id, scorer.tokenizer.encode
  ids = [[bos, *encode(prompt_of(e))] for e in examples]
  room = scorer.prompt_room(settings.max_new_tokens)
  limits = Limits(settings.max_new_tokens, settings.stop)
  texts = scorer.generate_until(ids, limits)
  normal = lambda text: prompts.normalize(text, settings)
  records = []
  for example, prompt, text in zip(examples, ids, texts, strict=True):
    found = prompts.extract(text, settings.answer_pattern)
    right = {normal(answer) for answer in example.answers}
    records.append(
      {
        "prompt": example.prompt,
        "answers": list(example.answers),
        "text": text,
        "found": found,
        "correct": found is not None and normal(found) in right,
        "num_fed": min(len(prompt), room),
        "cut": len(prompt) > room,
      }
    )
  return records


_PREDICTORS = {
  "choice": _predict_choices,
  "perplexity": _predict_texts,
  "generation": _predict_generated,
}


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
      nll, tokens = -total("log_likelihood"), total("num_tokens")
      require(tokens > 0, "the texts have no tokens: expected one at least")
      return counts | {
        "loss": nll / tokens,
        "perplexity": load_for_eval.perplexity(nll / tokens),
        "bits_per_byte": nll / math.log(2) / total("num_bytes"),
        "word_perplexity": load_for_eval.perplexity(nll / total("num_words")),
        "num_tokens": tokens,
      }
  return counts | {
    "exact_match": total("correct") / len(records),
    "num_found": sum(record["found"] is not None for record in records),
  }


def _rates(records: Sequence[Row]) -> Row:
  count = len(records)
  return {
    "accuracy": sum(r["correct"] for r in records) / count,
    "accuracy_norm": sum(r["correct_norm"] for r in records) / count,
    "num_ties": sum(r["tied"] for r in records),
    "num_examples": count,
  }


COLUMNS = report.columns(
  "funnel",
  "resolved",
  report.percent("accuracy", "accuracy", ".2f"),
  report.percent("accuracy_norm", "a byte,", ".2f"),
  report.Column("num_ties", "ties", "d"),
  report.percent("exact_match", "exact match", ".2f"),
  report.Column("num_found", "answers found", "d"),
  "loss",
  "perplexity",
  "bits_per_byte",
  report.Column("word_perplexity", "word perplexity", ".3f"),
  report.Column("num_cut", "cut", "d"),
  "ideal_reduction",
)
_SETTINGS = tuple(field.name for field in dataclasses.fields(Settings))
KEYS = (*"checkpoint tokenizer dtype funnels task out".split(), *_SETTINGS)


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
  """
  metric = main_metric(task)
  if task.kind == "generation":
    # Otherwise each funnel's decoder would hold a copy of all layers.
    model = decoder_lib.unstacked(model)
  predictions = []

  def measure_one(stages):
    records = predict(task, model.with_funnel(stages), tokenizer, settings)
    predictions.append(records)
    found, saved = summarize(task.kind, records), None
    if task.kind != "generation":
      length = max(1, round(statistics.fmean(r["num_fed"] for r in records)))
      saved = flops.ideal_reduction(model.config, stages, 1, length)
    about = {"metric": metric, "value": found[metric]}
    return found | about | {"ideal_reduction": saved}

  rows = funnels_lib.measure_each(f"task {task.name}", funnels, measure_one)
  return rows, [
    {"funnel": name, **record}
    for name, records in zip(funnels, predictions, strict=True)
    for record in records
  ]


def run(config: Any) -> list[Row]:
  """Runs configs/eval_task.py; returns the rows of `measure`.

  Writes TASK.json, .md, .png and TASK.predictions.jsonl to `config.out`. A
  fine-tuned run is measured on what its head is for: see `finetuned.evaluate`.

  Raises:
    ValueError, FloatingPointError: see `evaluate`.
  """
  settings = _settings(config)
  if finetuned.find_runs(config.checkpoint):
    return finetuned.evaluate(config, settings)
  # What can be said before a checkpoint is read.
  funnels_lib.resolve(config.funnels, own=(), recovers=_RECOVERS)
  task = tasks.load(config.task)
  check(task, settings)
  loaded = load_for_eval.load(config, dtype=config.dtype)
  model = load_for_eval.on_this_device(loaded.model)
  named = funnels_lib.resolve_for(model, config.funnels, recovers=_RECOVERS)
  tokenizer = loaded.load_tokenizer()
  out = config.out or load_for_eval.default_out(config.checkpoint)
  name = report.file_name(task.name)
  of = dict(checkpoint=config.checkpoint, task=tasks.read_from(config.task))
  report.claim(out, name, of)
  rows, predictions = measure(task, model, named, tokenizer, settings)
  report.write(
    out,
    name,
    rows,
    COLUMNS,
    loaded.title(task.name),
    plots.task,
    settings={
      **loaded.settings(),
      "model": model.config.to_dict(),  # As it ran here.
      "task": config.task.to_dict(),
      "skipped": dict(task.skipped),
      **dataclasses.asdict(settings),
    },
    notes=[f"{rows[0]['num_examples']} examples of split {settings.split}."],
  )
  lines = [json.dumps(p, ensure_ascii=False) + "\n" for p in predictions]
  atomic.write_text(f"{out}/{name}.predictions.jsonl", "".join(lines))
  return rows


def _settings(config: Any) -> Settings:
  """Settings of a configuration; what is unset is as `Settings` has it."""
  values = {name: config[name] for name in _SETTINGS}
  return Settings(**{k: v for k, v in values.items() if v is not None})
