"""One run from end to end: train, measure on held-out text, time the funnel."""

import functools

from flax import nnx
import jax
import ml_collections

from gemma_funnel.config import total_stride
from gemma_funnel.data import pipeline
from gemma_funnel.evaluation import accuracy, latency, plots, report, timing
from gemma_funnel.model import Transformer
from gemma_funnel.training import pretrain


def run(config: ml_collections.ConfigDict) -> None:
  """Trains on text as `pretrain.train` does, or on a task as `finetune.run`.

  A finished run is measured whole. On text, this prints a table of held-out
  bits per byte and, of a run of one process, one of latency with the funnel and
  without; heldout.* and latency.* in the run's folder hold the same.

  Raises:
    ValueError, FloatingPointError: see there.
  """
  if "task" in config:
    from gemma_funnel.evaluation import finetuned

    finetuned.run(config)
    return
  result = pretrain.train(config, _sampled_evaluator)
  if not result.finished:
    return
  if config.objective != "masked":  # Its table would be of next tokens.
    _report_heldout(config, result)
  alone = jax.process_count() == 1  # Or one device has not the whole model.
  if alone and config.latency.repeats and result.model.stages:
    _report_latency(config, result.model)


def _heldout(config, corpus, align, gap, max_documents) -> pipeline.HeldOut:
  return pipeline.heldout_batches(
    corpus.heldout,
    corpus.tokenizer,
    batch_size=config.batch_size,
    length=config.length,
    segment_alignment=align,
    segment_padding=gap,
    max_documents=max_documents,
  )


def _sampled_evaluator(corpus: pipeline.Corpus, setup: pretrain.Setup):
  """Measures a sample of the held-out documents while training."""
  config = setup.config
  heldout = _heldout(
    config, corpus, setup.funnels.align, setup.gap, config.eval_documents
  )
  settings = dict(heldout=heldout, chunk=config.loss_chunk)
  if config.objective == "masked":
    return functools.partial(
      accuracy.evaluate_masked, rate=config.mask_rate, **settings
    )
  return functools.partial(accuracy.evaluate, **settings)


def _report_heldout(config, result: pretrain.Result) -> None:
  align = total_stride(result.model.stages)
  heldout = _heldout(config, result.corpus, align, 0, config.heldout_documents)
  rows = accuracy.measure(
    result.model, (accuracy.TRAINED,), heldout, config.loss_chunk
  )
  if jax.process_index() != 0:
    return
  report.write(
    config.workdir,
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


def _report_latency(config, model: Transformer) -> None:
  rows = latency.measure(
    _on_one_device(model),
    (config.funnel,),
    batch_sizes=(config.latency.batch_size,),
    lengths=(config.latency.length,),
    protocol=timing.Protocol(config.latency.repeats, 2, config.seed),
  )
  report.write(
    config.workdir,
    "latency",
    rows,
    latency.COLUMNS,
    "Latency of the trained model",
    plots.latency,
  )


def _on_one_device(model: Transformer) -> Transformer:
  return nnx.merge(
    nnx.graphdef(model), jax.device_put(nnx.state(model), jax.devices()[0])
  )
