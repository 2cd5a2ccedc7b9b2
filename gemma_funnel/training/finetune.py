"""Fine-tuning a model with a head on the labels of a task."""

from collections.abc import Mapping, Sequence
import dataclasses
import functools
import json
import math
from typing import Any

from etils import epath
from flax import nnx
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

from gemma_funnel import convert, tasks
from gemma_funnel import lora as lora_lib
from gemma_funnel.config import Funnel, TransformerConfig, format_funnel
from gemma_funnel.data.tokenizer import Tokenizer
from gemma_funnel.heads import Encoder, Head, HeadConfig
from gemma_funnel.model import Transformer
from gemma_funnel.parallel import processes, sharding
from gemma_funnel.parallel.mesh import TOKENS
from gemma_funnel.tasks import encode, metrics
from gemma_funnel.tasks.task import ENCODER_KINDS, Task
from gemma_funnel.training import checkpoint as checkpoint_lib
from gemma_funnel.training import (
  loop,
  objectives,
  pretrain,
  schedules,
  start,
  workdir,
)
from gemma_funnel.training import optimizer as optimizer_lib

HEAD_FILE = "head.json"
CLASS_WEIGHTS = ("none", "balanced")


@dataclasses.dataclass(frozen=True)
class Setup:
  """What a fine-tuning's configuration amounts to; made before it starts.

  Attributes:
    config: with what it leaves open filled in.
    model_config: of the trunk.
    funnels: which funnel each step runs with.
    task: with "train", "dev" and "test".
    rows: of each split.
    head: what is put on the trunk.
    class_weights: of the loss; None is 1 for all.
    steps: of the whole training.
  """

  config: ml_collections.ConfigDict
  model_config: TransformerConfig
  funnels: schedules.FunnelSchedule
  task: Task
  rows: Mapping[str, Sequence[encode.Row]]
  head: HeadConfig
  class_weights: tuple[float, ...] | None
  steps: int
  mesh: jax.sharding.Mesh
  optimizer: optax.GradientTransformation
  schedule: optax.Schedule
  lora: lora_lib.LoraConfig | None


@dataclasses.dataclass(frozen=True)
class Result:
  """How a call of `train` ended: see `loop.Result`."""

  encoder: Encoder
  steps: int
  finished: bool


def make_setup(
  config: ml_collections.ConfigDict, task: Task | None = None
) -> Setup:
  """Checks a configuration whole, and reads the task.

  Args:
    config: as in configs/finetune.py, of one seed.
    task: instead of reading `config.task`.

  Raises:
    ValueError: a value that cannot be, or a task that is not as it should be.
  """
  config, model_config = pretrain.with_model(config)
  if config.funnel is None:
    found = config.init_from and convert.describe(config.init_from).stages
    config.funnel = format_funnel(found or ())
  ones = ("batch_size", "length", "patience")
  pretrain.check_numbers(config, {**dict.fromkeys(ones, 1), "seed": 0})
  pretrain.check_lengths({"length": config.length}, model_config)
  mesh = sharding.make_mesh(config.mesh)
  pretrain.check_batch(config, mesh)
  if mesh.shape[TOKENS] > 1:
    raise ValueError(
      f"mesh.sequence={mesh.shape[TOKENS]}: fine-tuning splits rows, which are "
      "short, and no tokens; leave it 1"
    )
  config.tokenizer = _find_tokenizer(config)
  tokenizer = Tokenizer.load(config.tokenizer)
  if tokenizer.vocab_size > model_config.vocab_size:
    raise ValueError(
      f"{tokenizer.name} has {tokenizer.vocab_size} pieces, the model "
      f"{model_config.vocab_size}"
    )
  task = check_task(task or tasks.load(config.task))
  head = HeadConfig(
    outputs=len(task.labels) or 1,
    per_token=task.kind == "tagging",
    **config.head,
  )
  needs_all = "a label for every token" if head.per_token else None
  funnels = schedules.make_schedule(config, model_config.num_layers, needs_all)
  rows = {
    split: encode.encode(
      task, task.splits[split], tokenizer, config.length, config.long
    )
    for split in ("train", "dev", "test")
  }
  epoch = encode.steps_of_epoch(len(rows["train"]), config.batch_size)
  steps = num_steps(config, len(rows["train"]))
  if config.eval_every is None:
    config.eval_every = min(epoch, steps)
  config.checkpoint_every = config.eval_every
  loop.check_config(config)
  optimizer, schedule = optimizer_lib.make_optimizer(config.optimizer, steps)
  return Setup(
    config,
    model_config,
    funnels,
    task,
    rows,
    head,
    _class_weights(config.class_weights, task),
    steps,
    mesh,
    optimizer,
    schedule,
    pretrain.make_lora(config),
  )


def num_steps(config: Any, num_rows: int) -> int:
  """Steps of `config.epochs` epochs of so many rows.

  Raises:
    ValueError: no positive number of epochs.
  """
  if not 0 < config.epochs < math.inf:
    raise ValueError(f"epochs={config.epochs}: expected > 0")
  epoch = encode.steps_of_epoch(num_rows, config.batch_size)
  return max(1, math.ceil(config.epochs * epoch))


def check_task(task: Task) -> Task:
  """Checks that a head can be trained for it.

  Raises:
    ValueError: a task of another kind, or without a split.
  """
  if task.kind not in ENCODER_KINDS:
    raise ValueError(
      f"task {task.name} is of kind {task.kind!r}: expected one of "
      f"{list(ENCODER_KINDS)} for fine-tuning; eval.py measures the others"
    )
  for split in ("train", "dev", "test"):
    if not task.splits.get(split):
      raise ValueError(f"task {task.name} has no {split} examples")
  return task


def _find_tokenizer(config: Any) -> str:
  if config.tokenizer is not None:
    return config.tokenizer
  if config.init_from is None:
    raise ValueError(
      "tokenizer is missing: expected its path, or init_from, a checkpoint "
      "that has one"
    )
  return convert.describe(config.init_from).tokenizer_path


def _class_weights(wanted: str, task: Task) -> tuple[float, ...] | None:
  """Of the loss; "balanced" gives every class the same sum."""
  if wanted == "none":
    return None
  if task.kind == "regression":
    raise ValueError(
      f"class_weights={wanted!r}: expected 'none', {task.name} is a regression"
    )
  count = len(task.labels)
  if wanted == "balanced":
    labels = np.concatenate(
      [np.atleast_1d(_labels_of(e, task)) for e in task.splits["train"]]
    )
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


def _labels_of(example, task: Task):
  return example.tags if task.kind == "tagging" else example.label


def _make_init(setup: Setup):
  """As `start.make_init`, of the trunk and a fresh head on it."""
  mean = 0.0
  if setup.task.kind == "regression":
    mean = float(np.mean([e.label for e in setup.task.splits["train"]]))

  def head_of(rngs):
    head = Head(setup.model_config.embed_dim, setup.head, rngs=rngs)
    weights = nnx.to_pure_dict(nnx.state(head))
    # A regression starts from what predicts best without looking.
    return weights | {"bias": weights["bias"] + mean}

  return start.make_init(setup, lambda rngs: {"head": head_of(rngs)})


def _make_loss(setup: Setup):
  models = {
    stages: Transformer.abstract(setup.model_config, stages)
    for stages in setup.funnels.members
  }
  own = nnx.to_pure_dict(nnx.state(models[setup.funnels.funnel]))
  for model in models.values():
    pretrain.restrict(own, model)
  head_def = nnx.graphdef(_abstract_head(setup.model_config, setup.head))
  class_weights = setup.class_weights

  def loss(stages, weights, frozen, batch, key):
    params = start.params_of(setup, weights, frozen)
    encoder = Encoder(
      pretrain.restrict(params, models[stages]),
      nnx.merge(head_def, weights["head"]),
      causal=setup.config.causal,
    )
    outputs = encoder(batch["tokens"], batch["segment"], key)
    weight_C = class_weights and jnp.asarray(class_weights, jnp.float32)
    return objectives.labelled(outputs, batch, weight_C)

  return loss


def _abstract_head(config: TransformerConfig, head: HeadConfig) -> Head:
  return nnx.eval_shape(lambda: Head(config.embed_dim, head, rngs=nnx.Rngs(0)))


def train(setup: Setup) -> Result:
  """Fine-tunes, or goes on with, the run in `setup.config.workdir`.

  The result has the weights that did best on the development split.

  Raises:
    ValueError: the folder holds something else.
    FloatingPointError: see `loop.run`.
  """
  config, task = setup.config, setup.task
  processes.assert_same_config(config)
  init, abstract = _make_init(setup)
  loss = _make_loss(setup)
  workdir.init_workdir(config)
  if jax.process_index() == 0:
    _write_files(setup)
  model = Transformer.abstract(setup.model_config, setup.funnels.funnel)
  head = _abstract_head(setup.model_config, setup.head)
  frozen = start.load_frozen(setup)
  encoder_of = lambda weights: Encoder(
    nnx.merge(nnx.graphdef(model), start.params_of(setup, weights, frozen)),
    nnx.merge(nnx.graphdef(head), weights["head"]),
    causal=config.causal,
  )

  def evaluate(weights):
    return measure(
      encoder_of(weights),
      task,
      "dev",
      setup.rows["dev"],
      batch_size=config.batch_size,
      length=config.length,
    )

  part, parts = sharding.row_share(setup.mesh)
  batches = encode.TrainBatches(
    setup.rows["train"],
    batch_size=config.batch_size,
    length=config.length,
    seed=config.seed,
    num_steps=setup.steps,
    process_index=part,
    process_count=parts,
  )
  result = loop.run(
    loop.Job(
      config=config,
      about=f"{task.name}, {len(setup.rows['train']):,} rows, funnel "
      f"{format_funnel(setup.funnels.funnel)}, seed {config.seed}",
      steps=setup.steps,
      mesh=setup.mesh,
      optimizer=setup.optimizer,
      schedule=setup.schedule,
      abstract=abstract,
      init=lambda seed: init(seed, frozen),
      loss=loss,
      frozen=frozen,
      member=setup.funnels.at,
      data=encode.train_iterator(batches),
      evaluate=evaluate,
      stopping=loop.Stopping(task.metrics[0], True, config.patience),
    )
  )
  return Result(encoder_of(result.weights), result.steps, result.finished)


def _write_files(setup: Setup) -> None:
  """What `load` needs besides the configuration, and the tokenizer."""
  folder = workdir.path_of(setup.config.workdir)
  head = dataclasses.asdict(setup.head)
  said = {"labels": list(setup.task.labels), "head": head}
  (folder / HEAD_FILE).write_text(json.dumps(said, indent=1) + "\n")
  tokenizer = epath.Path(setup.config.tokenizer)
  suffix = ".json" if tokenizer.suffix == ".json" else ".model"
  copy = folder / f"tokenizer{suffix}"
  if not copy.exists():
    tokenizer.copy(copy)


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
    said = json.loads((workdir.path_of(path) / HEAD_FILE).read_text())
    head = HeadConfig(**said["head"])
    labels = tuple(said["labels"])
  except (OSError, ValueError, KeyError, TypeError) as error:
    raise ValueError(
      f"{path} is no fine-tuned run: {HEAD_FILE}: {error}"
    ) from error

  def extra(model_config: TransformerConfig):
    abstract = _abstract_head(model_config, head)
    return {"head": nnx.to_pure_dict(nnx.state(abstract))}

  run = checkpoint_lib.load_run(path, funnel, extra=extra)
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
  """The task's metrics on a split.

  Args:
    encoder: with the funnel to run it with.
    task: what `rows` are of.
    split: "dev" or "test".
    rows: of that split, from `encode.encode`.
    batch_size: rows at a time.
    length: tokens of a row at most.
  """
  predicted = predict(
    encoder, task, split, rows, batch_size=batch_size, length=length
  )
  examples = task.splits[split]
  if task.kind == "tagging":
    truth = [[task.labels[tag] for tag in e.tags] for e in examples]
  else:
    truth = [e.label for e in examples]
  return metrics.compute(task.metrics, task.labels, predicted, truth)
