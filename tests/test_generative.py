"""Tasks answered by a language model: metrics against sums taken by hand."""

import dataclasses
import json
import math
import pathlib
import re
import types

import numpy as np
import pytest
from tiny_language_model import make_model, train_tokenizer
import tiny_run

from gemma_funnel import evaluation, tasks
from gemma_funnel.config import format_funnel
from gemma_funnel.data.tokenizer import BOS_ID, EOS_ID
from gemma_funnel.decode import decoder as decoder_lib
from gemma_funnel.decode.decoder import Decoder
from gemma_funnel.evaluation import generative, load_for_eval, prompts, scoring
from gemma_funnel.evaluation.generative import Settings
from gemma_funnel.evaluation.scoring import Limits, Scorer
from gemma_funnel.tasks.task import (
  ChoiceExample,
  Document,
  GenerationExample,
  Task,
  TextExample,
)

LONGEST = 32
FUNNEL = "start=1,stride=2"
# One shape almost throughout: tests spend their time compiling.
SETTINGS = Settings(batch_size=4)
NEW = 16
CHOICES = (
  ChoiceExample("one two", (" three", " four five six", " ü"), 0, "a"),
  ChoiceExample("a cat", (" sat", " satsatsat"), 1, "b"),
  ChoiceExample("red green", (" blue", " grey", " blue"), 0, "b"),
  # A minimal pair has no prompt.
  ChoiceExample("", ("the cat sat", "cat the sat"), 0, "b"),
)


def make_task(kind, examples, train=(), metrics=()):
  splits = {"test": tuple(examples), "train": tuple(train)}
  return Task("my task", kind, (), metrics, splits)


@pytest.fixture(scope="module")
def model():
  return make_model(LONGEST, FUNNEL)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
  return train_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def log_likelihood(model, tokenizer, prompt, text):
  context = [BOS_ID, *tokenizer.encode(prompt)]
  rest = [BOS_ID, *tokenizer.encode(prompt + text)][len(context) :]
  [score] = Scorer(model, None, 4).loglikelihood([(context, rest)])
  return score.log_likelihood


def test_choices_are_told_by_log_likelihood(model, tokenizer):
  task = make_task("choice", CHOICES)
  records = generative.predict(task, model, tokenizer, SETTINGS)
  for record, example in zip(records, CHOICES, strict=True):
    expected = [
      log_likelihood(model, tokenizer, example.prompt, c)
      for c in example.choices
    ]
    assert record["log_likelihoods"] == pytest.approx(expected, rel=1e-4)
    assert record["chosen"] == np.argmax(expected)
    sizes = [len(c.lstrip().encode()) for c in example.choices]
    assert record["chosen_norm"] == np.argmax(np.divide(expected, sizes))
  found = generative.summarize("choice", records)
  right = [r["correct"] for r in records]
  assert found["accuracy"] == np.mean(right)
  assert found["groups"]["b"]["accuracy"] == np.mean(right[1:])
  assert found["groups"]["a"]["num_examples"] == 1
  assert found["num_examples"] == 4 and found["num_cut"] == 0


def choice_record(scores, choices, answer, group=""):
  example = ChoiceExample("p", choices, answer, group)
  return generative._choice_record(example, scores) | {"cut": False}


def test_ties_are_wrong_and_counted():
  records = [
    choice_record([-1.0, -2.0], ("aa", "bb"), 0),
    choice_record([-1.0, -1.0], ("aa", "aa"), 0),
    choice_record([-1.0, -2.0, -2.0], ("a", "b", "b"), 0),
  ]
  found = generative.summarize("choice", records)
  assert found["num_ties"] == 1
  assert found["accuracy"] == found["accuracy_norm"] == pytest.approx(2 / 3)
  assert "groups" not in found


@pytest.mark.parametrize("score, chosen", [(-7.9, 1), (-8.1, 0)])
def test_the_norm_is_of_bytes_without_the_space_before(score, chosen):
  # 4 characters, and of bytes 4 or 8; the space before would make them 5 or 9.
  record = choice_record([-4.0, score], (" abcd", " üüüü"), 1)
  assert (record["chosen"], record["chosen_norm"]) == (0, chosen)


def test_few_shots_come_first(model, tokenizer, monkeypatch):
  seen = []
  inner = scoring.encode_pair
  monkeypatch.setattr(
    generative, "encode_pair", lambda *a: seen.append(a[1:]) or inner(*a)
  )
  train = [ChoiceExample(p, (" no", " {yes}"), 1) for p in ("x{}", "y", "z")]
  task = make_task("choice", CHOICES[:1], train)
  settings = dataclasses.replace(
    SETTINGS,
    few_shot=2,
    shot_format="Q: {prompt}{answer}.",
    prompt_format="Q: {prompt}",
  )
  generative.evaluate(task, model, tokenizer, settings)
  assert seen[0] == ("Q: y {yes}.Q: z {yes}.Q: one two", " three")
  shots = {
    prompts.prompt_maker(
      task,
      dataclasses.replace(settings, split_seed=seed),
      lambda e: e.choices[e.answer],
    )(CHOICES[0])
    for seed in range(20)
  }
  assert len(shots) == 3  # Of three, two in their order.


def test_a_sample_is_of_all_and_of_its_seed():
  groups = [f"{n // 100}" for n in range(500)]
  found = Settings(max_examples=50).sample(groups)
  assert set(found) == set("01234") and list(found) == sorted(found)
  assert Settings(max_examples=50, split_seed=1).sample(groups) != found


def test_prompts_too_long_are_counted(model, tokenizer):
  long = dataclasses.replace(CHOICES[0], prompt="one two three " * 30)
  task = make_task("choice", [CHOICES[0], long])
  assert generative.evaluate(task, model, tokenizer, SETTINGS)["num_cut"] == 1


def test_perplexity_by_hand(model, tokenizer):
  texts = ["one two", "red grün blue " + "cat sat " * 40, "six"]
  task = make_task(
    "perplexity", map(Document, texts), metrics=("bits_per_byte",)
  )
  settings = Settings(batch_size=4, max_length=16)
  found = generative.evaluate(task, model, tokenizer, settings)
  total, tokens = 0.0, 0
  for text in texts:
    ids = tokenizer.encode(text)
    tokens += len(ids)
    for context, rest in scoring.windows(ids, 16):
      [score] = Scorer(model, None, 4, (16,)).loglikelihood([(context, rest)])
      total += score.log_likelihood
  size = sum(len(text.encode()) for text in texts)
  words = sum(len(re.split(r"\s+", text)) for text in texts)
  assert size > sum(map(len, texts))
  expected = {
    "loss": -total / tokens,
    "perplexity": math.exp(-total / tokens),
    "bits_per_byte": -total / math.log(2) / size,
    "word_perplexity": math.exp(-total / words),
    "num_tokens": tokens,
    "num_examples": 3,
    "num_cut": 0,
  }
  assert found == pytest.approx(expected, rel=1e-4)
  assert generative.main_metric(task) == "bits_per_byte"


@pytest.fixture(scope="module")
def decoder(model):
  """Makes a decoder of the model here, or gives one made before.

  One has programs of its own, and to compile them is most of what it takes.
  """
  made = {}

  def make(model, cache_length):
    key = format_funnel(model.stages), cache_length
    if key not in made:
      made[key] = Decoder(model, cache_length)
    return made[key]

  return make


@pytest.fixture(scope="module")
def written(model, tokenizer, decoder):
  """What the model writes after some prompts, the longest first."""
  prompts = sorted(("a cat sat on", "one two", "red"), key=len, reverse=True)
  ids = [[BOS_ID, *tokenizer.encode(prompt)] for prompt in prompts]
  results = decoder(model, len(ids[0]) + NEW).generate(
    ids, max_new_tokens=NEW, stop_ids=[EOS_ID]
  )
  texts = [tokenizer.decode(result.tokens) for result in results]
  assert len(set(texts)) == 3
  return dict(zip(prompts, texts, strict=True))


def test_generation_is_the_decoder_s(
  model, tokenizer, written, decoder, monkeypatch
):
  monkeypatch.setattr(decoder_lib, "Decoder", decoder)
  # Answered out of order: the shortest prompt is run last.
  items = list(reversed(written.items()))
  examples = [
    GenerationExample(p, (f" {t.upper()}\n" if n else "no",))
    for n, (p, t) in enumerate(items)
  ]
  task = make_task("generation", examples)
  settings = Settings(batch_size=3, max_new_tokens=NEW, lower_case=True)
  records = generative.predict(task, model, tokenizer, settings)
  assert [r["text"] for r in records] == [text for _, text in items]
  found = generative.summarize("generation", records)
  assert found["exact_match"] == pytest.approx(2 / 3)
  assert prompts.normalize(" A\n b", settings) == "a b"
  assert prompts.normalize(" A\n b", Settings()) == "A b"


def test_stop_strings_end_a_text(
  model, tokenizer, written, decoder, monkeypatch
):
  monkeypatch.setattr(decoder_lib, "Decoder", decoder)
  text = max(written.values(), key=len)
  stop = [text[6:9], text[3:5]]
  found = Scorer(model, tokenizer, 3).generate_until(
    [[BOS_ID, *tokenizer.encode(p)] for p in written], Limits(NEW, tuple(stop))
  )
  for whole, cut in zip(written.values(), found, strict=True):
    assert whole.startswith(cut) and not any(s in cut for s in stop)
    rest = whole[len(cut) :]
    assert not rest or any(rest.startswith(s) for s in stop)
  assert text not in found


@dataclasses.dataclass
class Spy:
  """In place of a decoder: notes what it is given, and writes nothing."""

  seen: list

  def __call__(self, model, cache_length):
    self.cache_length = cache_length
    return self

  def stream(self, prompts, **options):
    self.seen.append((prompts, options["first_row"]))
    yield [types.SimpleNamespace(tokens=[], stopped=True) for _ in prompts]


def test_a_long_prompt_is_cut_on_the_left(model, tokenizer, monkeypatch):
  spy = Spy([])
  monkeypatch.setattr(decoder_lib, "Decoder", spy)
  scorer = Scorer(model, tokenizer, 2, (20,))
  make = lambda count: [BOS_ID, *range(100, 99 + count)]
  ids = [make(5), make(12), make(13), make(40), make(1)]
  texts = scorer.generate_until(ids, Limits(8))
  assert texts == [""] * 5 and spy.cache_length == 20
  # 12 is what fits; the longest first, and the last one twice.
  cut = lambda ids: [BOS_ID, *ids[-11:]]
  [(first, at), (second, then), (third, last)] = spy.seen
  assert first == [ids[1], cut(ids[2])]
  assert second == [cut(ids[3]), ids[0]]
  assert third == [ids[4]] * 2
  assert (at, then, last) == (0, 2, 4)
  with pytest.raises(ValueError, match="max_new_tokens=20: expected less than"):
    scorer.generate_until(ids, Limits(20))
  assert scorer.generate_until([], Limits(8)) == []


@pytest.mark.parametrize(
  "text, pattern, found, right",
  [
    ("so 7\n#### 1,234.", r"#### (-?[0-9.,]+)", "1,234.", "1234"),
    ("so 7", r"#### (-?[0-9.,]+)", None, None),
    ("-5 or 6", r"-?\d+", "-5", "-5"),
    (" a,\n b ", None, " a,\n b ", "a, b"),
  ],
)
def test_answers_are_extracted(text, pattern, found, right):
  assert prompts.extract(text, pattern) == found
  if right is not None:
    settings = Settings(answer_pattern=pattern)
    assert prompts.normalize(found, settings) == right


@pytest.mark.parametrize(
  "changes, message",
  [
    (dict(batch_size=0), "batch_size=0: expected an integer >= 1"),
    (dict(few_shot=-1), "few_shot=-1: expected an integer >= 0"),
    (dict(max_length=1), "max_length=1: expected an integer >= 2"),
    (dict(split="valid"), "split='valid': expected one of"),
    (dict(stop="x"), "stop='x': expected a tuple"),
    (dict(stop=("",)), "none of them empty"),
    (dict(prompt_format="{text}"), "prompt_format='{text}': .*{prompt}"),
    (dict(shot_format="{prompt}"), "shot_format='{prompt}': .*{answer}"),
    (dict(shot_format="{prompt"), "shot_format='{prompt': expected a text"),
    (dict(answer_pattern="("), r"answer_pattern='\(' is no regular"),
  ],
)
def test_settings_out_of_range_are_named(changes, message):
  with pytest.raises(ValueError, match=message):
    Settings(**changes)


@pytest.mark.parametrize(
  "task, changes, message",
  [
    (
      make_task("classification", [TextExample("a", None, 0)]),
      {},
      "'classification', which a head is fine-tuned for",
    ),
    (make_task("choice", []), {}, "no examples in split='test'"),
    (make_task("choice", CHOICES), dict(few_shot=1), "has 0 examples in its"),
    (
      make_task("choice", CHOICES, CHOICES),
      dict(few_shot=1, split="train"),
      "would show answers",
    ),
    (make_task("perplexity", [Document("a")]), dict(few_shot=1), "no prompts"),
    (make_task("perplexity", [Document("")]), {}, "the texts have no tokens"),
    (make_task("choice", CHOICES, metrics=("f1",)), {}, "metrics=.'f1',."),
    (make_task("choice", CHOICES), dict(max_length=33), "model.max_length=32"),
    (
      make_task("choice", [ChoiceExample("a", ("", " b"), 0)]),
      {},
      "task my task, example 0: the continuation '' has no tokens",
    ),
  ],
)
def test_mistakes_are_named(model, tokenizer, task, changes, message):
  with pytest.raises(ValueError, match=message):
    generative.evaluate(
      task, model, tokenizer, dataclasses.replace(SETTINGS, **changes)
    )


@pytest.fixture
def config(model, tokenizer, tmp_path, monkeypatch):
  """configs/eval_task.py, whose checkpoint and task are those here."""
  config = tiny_run.load_config("eval_task")
  path = tmp_path / "run"
  path.mkdir()
  config.checkpoint, config.batch_size = str(path), 4
  config.out = str(tmp_path / "out")
  loaded = load_for_eval.EvalModel(str(path), model, tokenizer.name, None, 7)
  monkeypatch.setattr(load_for_eval, "load", lambda *a, **k: loaded)
  monkeypatch.setattr(tasks, "load", lambda c: make_task("choice", CHOICES))
  return config


def test_run_writes_a_table_and_predictions(config, model, tokenizer, capsys):
  config.funnels = ("trained", "off", FUNNEL)
  rows = evaluation.run(config)
  assert [row["funnel"] for row in rows] == ["as trained", "off"]
  task = make_task("choice", CHOICES)
  for row, funnel in zip(rows, (FUNNEL, "off"), strict=True):
    expected = generative.evaluate(
      task, model.with_funnel(funnel), tokenizer, SETTINGS
    )
    assert {k: row[k] for k in expected} == expected
    assert row["metric"] == "accuracy" and row["value"] == row["accuracy"]
  assert rows[0]["ideal_reduction"] > rows[1]["ideal_reduction"] == 0
  out = pathlib.Path(config.out)
  content = json.loads((out / "my_task.json").read_text())
  assert content["rows"] == rows and content["settings"]["step"] == 7
  assert content["settings"]["prompt_format"] == "{prompt}"
  lines = (out / "my_task.predictions.jsonl").read_text().splitlines()
  names = [json.loads(line)["funnel"] for line in lines]
  assert names == ["as trained"] * 4 + ["off"] * 4
  assert (out / "my_task.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
  assert "accuracy %" in capsys.readouterr().out


def test_run_of_a_generation_task(config, written, decoder, monkeypatch):
  monkeypatch.setattr(decoder_lib, "Decoder", decoder)
  examples = [GenerationExample(p, (t,)) for p, t in written.items()]
  task = make_task("generation", examples)
  monkeypatch.setattr(tasks, "load", lambda c: task)
  config.update(max_new_tokens=NEW, batch_size=3, funnels=("trained",))
  [row] = evaluation.run(config)
  assert row["exact_match"] == 1.0 and row["ideal_reduction"] is None


def test_defaults_of_the_configuration_are_those_of_settings():
  config = tiny_run.load_config("eval_task")
  assert generative._settings(config) == Settings()


@pytest.mark.parametrize(
  "changes, message",
  [
    (dict(funnels=("half",)), "funnels: 'half'"),
    (dict(funnels=("start=1,recover=none",)), "recover='none'"),
    (dict(stop="x"), "stop='x': expected a tuple"),
    (dict(few_shot=5), "few_shot=5: my task has 0"),
  ],
)
def test_run_names_mistakes_before_it_loads(
  config, changes, message, monkeypatch
):
  monkeypatch.setattr(load_for_eval, "load", None)
  with config.ignore_type():
    config.update(changes)
  with pytest.raises(ValueError, match=message):
    evaluation.run(config)
  del config.batch_size
  with pytest.raises(ValueError, match=r"lacks \['batch_size'\]"):
    evaluation.run(config)
