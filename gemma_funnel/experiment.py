"""One run from end to end: train, measure on held-out text, time the funnel."""

import functools

from flax import nnx
import jax
import ml_collections

from gemma_funnel.checks import require
from gemma_funnel.config import total_stride
from gemma_funnel.data import pipeline
from gemma_funnel.evaluation import (
  accuracy,
  finetuned,
  latency,
  plots,
  report,
  timing,
)
from gemma_funnel.parallel import processes
from gemma_funnel.training import metric_writer, pretrain, trainer
from gemma_funnel.training.spec import RunSpec


def run(config: ml_collections.ConfigDict) -> None:
  """Trains on text, or on a task as `finetuned.run` does.

  A finished run is measured whole. On text, this prints a table of held-out
  bits per byte and, of a run of one process, one of latency with the funnel and
  without; heldout.* and latency.* in the run's folder hold the same.

  Raises:
    ValueError: a mistake in the configuration, the data or the folder.
    FloatingPointError: see `trainer.train`.
  """
  require(
    isinstance(config.workdir, str) and config.workdir != "",
    f"workdir={config.workdir!r}: expected a folder",
  )
  if project := config.get("wandb"):
    metric_writer.import_wandb(project)  # Before data are read.
  # Before anything that one process alone may find wrong.
  processes.assert_same_config(config)
  if "task" in config:
    finetuned.run(config)
    return
  spec = pretrain.resolve(config)
  result = trainer.train(spec, _evaluate_sample)
  if not result.finished:
    return
  if spec.task.causal:  # The table is of next tokens.
    _report_heldout(spec, result)
  alone = jax.process_count() == 1  # Or one device has not the whole model.
  if alone and spec.task.latency.repeats and spec.stages:
    _report_latency(spec, result.model)


def _heldout(
  spec: RunSpec, corpus, align: int, gap: int, max_documents: int | None
) -> pipeline.HeldOut:
  return pipeline.heldout_batches(
    corpus.heldout,
    corpus.tokenizer,
    batch_size=spec.batch_size,
    length=spec.length,
    segment_alignment=align,
    segment_padding=gap,
    max_documents=max_documents,
  )


def _evaluate_sample(corpus: pipeline.Corpus, spec: RunSpec):
  """Measures a sample of the held-out documents while training."""
  align, task = spec.funnels.segment_alignment, spec.task
  heldout = _heldout(
    spec, corpus, align, spec.segment_padding, task.eval_documents
  )
  settings = dict(heldout=heldout, chunk=task.loss_chunk)
  if task.objective == "masked":
    return functools.partial(
      accuracy.evaluate_masked, rate=task.mask_rate, **settings
    )
  return functools.partial(accuracy.evaluate, **settings)


def _report_heldout(spec: RunSpec, result: trainer.Result) -> None:
  align, task = total_stride(spec.stages), spec.task
  heldout = _heldout(spec, result.data, align, 0, task.heldout_documents)
  rows = accuracy.measure(
    result.model, (accuracy.TRAINED,), heldout, task.loss_chunk
  )
  if jax.process_index() != 0:
    return
  report.write(
    spec.workdir,
    "heldout",
    rows,
    accuracy.COLUMNS,
    f"Held-out text after {result.steps} steps",
    plots.accuracy,
    notes=[
      f"{heldout.num_documents} documents, {heldout.num_bytes:,} bytes. "
      "Unigram: the least that token frequencies alone allow."
    ],
  )


def _report_latency(spec: RunSpec, model: nnx.Module) -> None:
  shape = spec.task.latency
  on_one_device = nnx.merge(
    nnx.graphdef(model), jax.device_put(nnx.state(model), jax.devices()[0])
  )
  rows = latency.measure(
    on_one_device,
    (spec.task.funnel,),
    batch_sizes=(shape.batch_size,),
    lengths=(shape.length,),
    protocol=timing.Protocol(shape.repeats, 2, spec.seed),
  )
  report.write(
    spec.workdir,
    "latency",
    rows,
    latency.COLUMNS,
    "Latency of the trained model",
    plots.latency,
  )
