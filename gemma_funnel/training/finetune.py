"""Fine-tuning a model with a head on the labels of a task."""

from collections.abc import Mapping, Sequence
import dataclasses
import functools
import hashlib
import json
import math
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from gemma_funnel import atomic, checks, cli, convert, tasks
from gemma_funnel.config import Funnel, TransformerConfig, format_funnel
from gemma_funnel.convert.tensor_io import peek_json, read_json
from gemma_funnel.data.tokenizer import FILES, Tokenizer
from gemma_funnel.heads import Encoder, Head, HeadConfig
from gemma_funnel.model import Transformer
from gemma_funnel.parallel import sharding
from gemma_funnel.parallel.mesh import TOKENS
from gemma_funnel.tasks import encode, metrics
from gemma_funnel.tasks.task import ENCODER_KINDS, Task
from gemma_funnel.training import init_state, objectives, schedules, workdir
from gemma_funnel.training import spec as spec_lib
from gemma_funnel.training.spec import RunSpec

HEAD_FILE = "head.json"
CLASS_WEIGHTS = ("none", "balanced")


@dataclasses.dataclass(frozen=True)
class LabelTask(spec_lib.RunTask):
  """Labels of a task, predicted by a head on the model."""

  task: Task
  rows: Mapping[str, Sequence[encode.Row]]  # Of each split.
  head: HeadConfig
  class_weights: tuple[float, ...] | None  # Of the loss; None is 1 for all.
  causal: bool
  tokenizer: str  # Path of what `rows` were encoded with.
  stopping: spec_lib.StoppingSpec

  def describe(self, spec: RunSpec, num_params: int) -> str:
    return (
      f"{self.task.name}, {len(self.rows['train']):,} rows, funnel "
      f"{format_funnel(spec.stages)}, seed {spec.seed}"
    )

  def init_head(self, spec: RunSpec, rngs: nnx.Rngs) -> dict[str, Any]:
    head = Head(spec.model_config.embed_dim, self.head, rngs=rngs)
    params = nnx.to_pure_dict(nnx.state(head))
    mean = 0.0
    if self.task.kind == "regression":
      # It starts from what predicts best without looking.
      mean = float(np.mean([e.label for e in self.task.splits["train"]]))
    return {"head": params | {"bias": params["bias"] + mean}}

  def make_loss(self, spec: RunSpec):
    models = init_state.variant_models(spec)

    def loss(stages, params, frozen_params, batch, key):
      trunk = init_state.model_params(spec, params, frozen_params)
      model = init_state.select_params(trunk, models[stages])
      encoder = self.assemble(spec, model, params)
      outputs = encoder(batch["tokens"], batch["segment"], key)
      weights = self.class_weights
      weight_C = weights and jnp.asarray(weights, jnp.float32)
      return objectives.labelled(outputs, batch, weight_C)

    return loss

  def load_data(self, spec: RunSpec) -> None:
    """Writes what `load` needs besides the configuration, and the tokenizer."""
    if jax.process_index() != 0:
      return
    folder, tokenizer = workdir.path_of(spec.workdir), self.tokenizer
    about = {
      "labels": list(self.task.labels),
      "head": dataclasses.asdict(self.head),
    }
    path = folder / HEAD_FILE
    begun = (folder / workdir.FOLDER).exists()
    there = peek_json(path) if begun else {}
    checks.require(
      there in ({}, json.loads(json.dumps(about))),
      f"workdir={spec.workdir} was trained on other labels, or another head: "
      f"{path} has {there.get('labels')} and {there.get('head')}, this has "
      f"{about['labels']} and {about['head']}. Name another workdir, or remove "
      "that one",
    )
    if not there:
      atomic.write_text(path, json.dumps(about, indent=1) + "\n")
    if not any((folder / name).exists() for name in FILES.values()):
      Tokenizer.load(tokenizer).save(folder)

  def fingerprints(self, spec: RunSpec) -> dict[str, str]:
    found = {}
    for split, rows in self.rows.items():
      digest = hashlib.sha256()
      for row in rows:
        digest.update(row.tokens.tobytes())
        digest.update(np.asarray(row.label).tobytes())
      found[f"task:{split}"] = f"{len(rows)}:sha256:{digest.hexdigest()}"
    return found

  def batches(self, spec: RunSpec, data: None):
    part, parts = sharding.row_share(spec.mesh)
    rows = encode.TrainBatches(
      self.rows["train"],
      batch_size=spec.batch_size,
      length=spec.length,
      seed=spec.seed,
      num_steps=spec.steps,
      process_index=part,
      process_count=parts,
    )
    return encode.train_iterator(rows)

  def assemble(self, spec: RunSpec, model: Transformer, params) -> Encoder:
    head = _abstract_head(spec.model_config, self.head)
    head = nnx.merge(nnx.graphdef(head), params["head"])
    return Encoder(model, head, causal=self.causal)

  def make_evaluate(self, data: None, spec: RunSpec) -> spec_lib.Evaluate:
    sizes = dict(batch_size=spec.batch_size, length=spec.length)
    return lambda encoder: measure(
      encoder, self.task, "dev", self.rows["dev"], **sizes
    )


def resolve(
  config: ml_collections.ConfigDict, task: Task | None = None
) -> RunSpec:
  """Checks a configuration whole, and reads the task.

  Args:
    config: as in configs/finetune.py, of one seed; it is copied.
    task: instead of reading `config.task`.

  Raises:
    ValueError: a value that cannot be, or a task that is not as it should be.
  """
  opened = spec_lib.open_run(config)
  config, base, sizes = opened.config, opened.base, opened.model_config
  if opened.mesh.shape[TOKENS] > 1:
    raise ValueError(
      f"mesh.sequence={opened.mesh.shape[TOKENS]}: fine-tuning splits rows, "
      "which are short, and no tokens; leave it 1"
    )
  if config.patience is not None:
    checks.require_int("patience", config.patience, 1)
  if config.funnel is None:
    config.funnel = format_funnel(base.stages if base else ())
  if config.tokenizer is None:
    if base is None:
      raise ValueError(
        "tokenizer is missing: expected its path, or init_from, a checkpoint "
        "that has one"
      )
    config.tokenizer = base.tokenizer_path
  tokenizer = Tokenizer.load(config.tokenizer)
  if tokenizer.vocab_size > sizes.vocab_size:
    raise ValueError(
      f"{tokenizer.name} has {tokenizer.vocab_size} pieces, the model "
      f"{sizes.vocab_size}"
    )
  task = check_task(task or tasks.load(config.task))
  tagging = task.kind == "tagging"
  head = HeadConfig(len(task.labels) or 1, per_token=tagging, **config.head)
  funnels = schedules.make_schedule(
    config,
    sizes.num_layers,
    "a label for every token" if tagging else None,
    causal=config.causal,
  )
  # Every word of what is measured has a row.
  rows = {
    split: encode.encode(
      task, task.splits[split], tokenizer, config.length, long
    )
    for split, long in (
      ("train", config.long),
      ("dev", "window"),
      ("test", "window"),
    )
  }
  for split, found in rows.items():
    if cut := sum(row.num_cut for row in found):
      cli.say(
        f"{split}: {cut:,} {'words' if tagging else 'texts'} are cut at length="
        f"{config.length} tokens"
      )
  steps = num_steps(config, len(rows["train"]))
  if config.eval_every is None:
    epoch = encode.steps_of_epoch(len(rows["train"]), config.batch_size)
    config.eval_every = min(epoch, steps)
  config.checkpoint_every = config.eval_every
  label_task = LabelTask(
    task=task,
    rows=rows,
    head=head,
    class_weights=_class_weights(config.class_weights, task),
    causal=config.causal,
    tokenizer=config.tokenizer,
    stopping=spec_lib.StoppingSpec(task.metrics[0], config.patience),
  )
  return opened.finish(funnels, label_task, steps)


def num_steps(config: Any, num_rows: int) -> int:
  """Steps of `config.epochs` epochs of so many rows."""
  checks.require_positive("epochs", config.epochs)
  epoch = encode.steps_of_epoch(num_rows, config.batch_size)
  return max(1, math.ceil(config.epochs * epoch))


def check_task(task: Task) -> Task:
  """The task; raises ValueError where no head can be trained for it."""
  if task.kind not in ENCODER_KINDS:
    raise ValueError(
      f"task {task.name} is of kind {task.kind!r}: expected one of "
      f"{list(ENCODER_KINDS)} for fine-tuning; eval.py measures the others"
    )
  for split in ("train", "dev", "test"):
    if not task.splits.get(split):
      raise ValueError(f"task {task.name} has no {split} examples")
  return task


def _class_weights(wanted: str, task: Task) -> tuple[float, ...] | None:
  """Weights of the loss; "balanced" gives every class the same sum."""
  if wanted == "none":
    return None
  if task.kind == "regression":
    raise ValueError(
      f"class_weights={wanted!r}: expected 'none', {task.name} is a regression"
    )
  count = len(task.labels)
  if wanted == "balanced":
    label_of = lambda e: e.tags if task.kind == "tagging" else e.label
    labels = [np.atleast_1d(label_of(e)) for e in task.splits["train"]]
    labels = np.concatenate(labels)
    found = np.bincount(labels, minlength=count)
    return tuple(len(labels) / (count * np.maximum(found, 1)))
  try:
    weights = tuple(map(float, wanted.split(",")))
  except ValueError:
    weights = ()
  valid = all(0 <= w < math.inf for w in weights) and any(weights)
  if len(weights) != count or not valid:
    raise ValueError(
      f"class_weights={wanted!r}: expected one of {list(CLASS_WEIGHTS)}, or a "
      f"number >= 0 for each of the {count} labels of {task.name}, as '1,2.5'"
    )
  return weights


def _abstract_head(config: TransformerConfig, head: HeadConfig) -> Head:
  return nnx.eval_shape(lambda: Head(config.embed_dim, head, rngs=nnx.Rngs(0)))


def load(
  path: str, funnel: Funnel = None
) -> tuple[Encoder, tuple[str, ...], ml_collections.ConfigDict]:
  """Reads a fine-tuned run: (encoder, labels, configuration).

  Args:
    path: the run's folder.
    funnel: instead of its own; "off" is none.

  Raises:
    ValueError: no readable run there, or none that was fine-tuned.
  """
  try:
    about = read_json(workdir.path_of(path) / HEAD_FILE)
    head = HeadConfig(**about["head"])
    labels = tuple(about["labels"])
  except (ValueError, KeyError, TypeError) as error:
    raise ValueError(
      f"{path} is no fine-tuned run: {HEAD_FILE}: {error}"
    ) from error

  def extra(model_config: TransformerConfig):
    abstract = _abstract_head(model_config, head)
    return {"head": nnx.to_pure_dict(nnx.state(abstract))}

  run = convert.load_run(path, funnel, extra=extra)
  head_def = nnx.graphdef(_abstract_head(run.model.config, head))
  encoder = Encoder(
    run.model, nnx.merge(head_def, run.extra["head"]), causal=run.config.causal
  )
  return encoder, labels, run.config


@functools.partial(jax.jit, static_argnums=0)
def _outputs(graphdef, state, tokens_BT, segment_BT):
  return nnx.merge(graphdef, state)(tokens_BT, segment_BT)


def predict(
  encoder: Encoder,
  task: Task,
  split: str,
  rows: Sequence[encode.Row],
  *,
  batch_size: int,
  length: int,
) -> list[Any]:
  """Predictions of a split's examples, in order.

  Returns:
    Label indices (classification), numbers (regression), or a list of tags for
    each example (tagging).
  """
  graphdef, state = nnx.split(encoder)
  found: list[Any] = [None] * len(rows)
  for chosen, batch in encode.eval_batches(rows, batch_size, length):
    outputs = np.asarray(
      _outputs(graphdef, state, batch["tokens"], batch["segment"])
    )
    for at, index in enumerate(chosen):
      found[index] = outputs[at]
  if task.kind == "regression":
    return [float(x[0]) for x in found]
  best = [np.argmax(x, axis=-1) for x in found]
  if task.kind == "classification":
    return [int(x) for x in best]
  labels = [x[: len(row.tokens)] for x, row in zip(best, rows, strict=True)]
  return encode.join_words(task, rows, labels, task.splits[split])


def measure(
  encoder: Encoder,
  task: Task,
  split: str,
  rows: Sequence[encode.Row],
  *,
  batch_size: int,
  length: int,
) -> dict[str, float | None]:
  """The task's metrics on a split, of its rows."""
  predicted = predict(
    encoder, task, split, rows, batch_size=batch_size, length=length
  )
  examples = task.splits[split]
  if task.kind == "tagging":
    truth = [[task.labels[tag] for tag in e.tags] for e in examples]
  else:
    truth = [e.label for e in examples]
  return metrics.compute(task.metrics, task.labels, predicted, truth)
