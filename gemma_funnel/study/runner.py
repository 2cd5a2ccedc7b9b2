"""The study: what funnels cost and save, as one grid of trainings.

  python -m gemma_funnel.study --config=configs/ablation_quick.py

Stages are shared: one pretraining serves all its fine-tunings, and one of those
all the funnels that it is measured with. Each result is a line of results.jsonl
as soon as it is there; the same command goes on where it was interrupted.
"""

from collections.abc import Iterable, Mapping
import functools
import itertools
import json
import os
import pathlib
import shutil
import sys
import time
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from gemma_funnel import cli, convert, flops
from gemma_funnel.config import OFF, TransformerConfig, parse_funnel
from gemma_funnel.data import pipeline
from gemma_funnel.data.tokenizer import Tokenizer
from gemma_funnel.evaluation import generative, latency, report, timing
from gemma_funnel.study import analysis, grid, layer_similarity
from gemma_funnel.study.grid import Cell, Pretraining, Tuning
from gemma_funnel.training import finetune, metric_writer, pretrain, workdir

RESULTS = "results.jsonl"
# What a stage may fail with, and the study go on without it.
_FAILURES = (ValueError, FloatingPointError, RuntimeError, MemoryError)
# Metrics of which less is better.
_LOWER = ("loss", "bits_per_byte", "perplexity", "word_perplexity")


def run(config: ml_collections.ConfigDict) -> None:
  """Runs what is left of a study, and writes its tables, plots and report.

  Args:
    config: as in configs/ablation_quick.py.

  Raises:
    ValueError: a configuration that cannot be, before anything is trained.
  """
  if not jax.config.jax_compilation_cache_dir:
    # Trainings that differ by a seed or by their data share programs.
    folder = os.path.join(config.workdir, "programs")
    jax.config.update("jax_compilation_cache_dir", folder)
  study_plan = grid.make(config)
  runner = Runner(config, study_plan)
  print(study_plan.describe(runner.done, _rate(config)), flush=True)
  if config.dry_run:
    return
  runner.run()
  rows = runner.rows()
  paths = analysis.write(
    rows,
    config.workdir,
    config.title,
    settings={"config": config.to_dict(), "git": report.revision()},
  )
  print("\n".join(["", *(f"- {line}" for line in analysis.claims(rows))]))
  print(f"\nwritten: {', '.join(paths.values())}", flush=True)


def _rate(config: Any) -> float:
  """FLOP/s of training the study's first model here, measured in seconds."""
  sizes = TransformerConfig.from_dict(config.models[config.axes.model[0]])
  model = latency.random_model(sizes)
  batch, length = config.pretrain.batch_size, config.pretrain.length
  graphdef, params = nnx.split(model)
  tokens = np.ones((batch, length), np.int32)

  def loss(params):
    return jnp.mean(nnx.merge(graphdef, params)(tokens).astype(jnp.float32))

  program = timing.compile_program(jax.grad(loss), params)
  times, _ = timing.time_interleaved(
    {"step": program.call}, timing.Protocol(repeats=2, warmup=1)
  )
  work = 3 * flops.forward(sizes, None, batch, length)
  return work / min(times["step"])


class Results:
  """results.jsonl: what is there, and more lines."""

  def __init__(self, workdir: str):
    self._path = pathlib.Path(workdir) / RESULTS
    self.lines: list[dict[str, Any]] = []
    text = self._path.read_text() if self._path.exists() else ""
    for number, line in enumerate(text.splitlines(), 1):
      try:
        self.lines.append(json.loads(line))
      except json.JSONDecodeError as error:
        # The last line may have been cut short by a kill.
        if number < len(text.splitlines()):
          raise ValueError(f"{self._path}, line {number}: {error}") from error
        text = "".join(text.splitlines(keepends=True)[:-1])
        self._path.write_text(text)
    if text and not text.endswith("\n"):
      # Cut between a line and its end: the next one is not to go on with it.
      self._path.write_text(text + "\n")

  def add(self, line: Mapping[str, Any]) -> None:
    """Writes a line; it is on disk when this returns."""
    self._path.parent.mkdir(parents=True, exist_ok=True)
    encoded = json.dumps(line, allow_nan=False)
    with self._path.open("a") as f:
      f.write(encoded + "\n")
      f.flush()
      os.fsync(f.fileno())
    self.lines.append(dict(line))


class Runner:
  """Runs the stages of a plan that have no result yet."""

  def __init__(self, config: ml_collections.ConfigDict, study_plan: grid.Plan):
    self._config, self._plan = config, study_plan
    self._folder = pathlib.Path(config.workdir)
    self._results = Results(config.workdir)
    self._start = time.monotonic()
    self._trained: set[Pretraining] = set()
    self._common = {"git": report.revision(), "device": report.device()}

  @functools.cached_property
  def done(self) -> set[str]:
    """Hashes of the cells that have a result, or have failed."""
    kinds = ("cell",) if self._config.retry else ("cell", "failure")
    return {
      line["hash"] for line in self._results.lines if line["kind"] in kinds
    }

  def rows(self) -> list[dict[str, Any]]:
    """Lines of the plan's own cells; a failure that was mended is left out."""
    wanted = {cell.hash for cell in self._plan.cells} | {
      p.hash for p in self._plan.pretrainings
    }
    lines = [x for x in self._results.lines if x["hash"] in wanted]
    good = {x["hash"] for x in lines if x["kind"] == "cell"}
    return [x for x in lines if x["kind"] != "failure" or x["hash"] not in good]

  def run(self) -> None:
    """Runs what is left; a failure leaves out the cells that depend on it."""
    total = self._plan.work(self.done, ())
    for stage, cells, tunings in self._plan.by_pretraining():
      left = self._left([*cells, *itertools.chain(*tunings.values())])
      if not left:
        continue
      path = self._guarded(left, self._pretrained, stage)
      if path is None:
        continue
      for cell in self._left(cells):
        self._guarded([cell], self._generative, cell, path)
      self._say(total)
      for tuning, own in tunings.items():
        if left := self._left(own):
          # Whatever is left of them, it is the same training: one folder.
          folder = f"{pathlib.Path(path).name}-{own[0].hash}"
          self._guarded(left, self._tuned, tuning, left, path, folder)
          self._say(total)

  def _left(self, cells: Iterable[Cell]) -> list[Cell]:
    return [cell for cell in cells if cell.hash not in self.done]

  def _say(self, total: float) -> None:
    spent = time.monotonic() - self._start
    share = 1 - self._plan.work(self.done, self._trained) / total
    eta = metric_writer.duration(spent * (1 - share) / share) if share else "?"
    print(f"study: {share:.0%} of the training done, ETA {eta}", flush=True)

  def _guarded(self, cells: list[Cell], function, *args):
    """What `function` gives; None where it fails, which `cells` then have."""
    try:
      return function(*args)
    except _FAILURES as error:
      text = f"{type(error).__name__}: {error}".splitlines()[0][:500]
      print(f"failed, and left out: {text}", flush=True)
      for cell in self._left(cells):
        self._add(cell, {"kind": "failure", "error": text})
      return None

  def _add(self, cell: Cell, values: Mapping[str, Any]) -> None:
    self._results.add({**cell.to_dict(), **self._common, **values})
    self.done.add(cell.hash)

  def _pretrained(self, stage: Pretraining) -> str:
    """The folder of a pretraining, which is run if need be."""
    config = stage.config(self._config, self._config.workdir)
    if stage in self._trained:  # A teacher has several students.
      return config.workdir
    if stage.kind == "distilled":
      config.init_from = self._pretrained(self._plan.teacher(stage))
    self._give_tokenizer(config)
    print(
      f"pretraining {stage.model}, {stage.kind}: {stage.funnel}", flush=True
    )
    result = pretrain.train(config, _no_evaluator)
    if not result.finished:
      raise KeyboardInterrupt  # SIGTERM: the same command goes on.
    self._similarity(stage, result)
    self._trained.add(stage)
    return config.workdir

  def _give_tokenizer(self, config: Any) -> None:
    """Puts the study's own tokenizer, trained once, where a run has one."""
    if config.data.tokenizer is not None:
      return
    vocab_size = config.model.vocab_size
    kept = pathlib.Path(grid.tokenizer_path(self._config.workdir, vocab_size))
    if not kept.exists():
      kept.parent.mkdir(parents=True, exist_ok=True)
      pipeline.load_corpus(config.data, vocab_size, kept.parent)
    workdir.init_workdir(pretrain.make_setup(config).config)
    own = pathlib.Path(config.workdir) / workdir.TOKENIZER
    if not own.exists():
      shutil.copyfile(kept, own)

  def _similarity(self, stage: Pretraining, result: pretrain.Result) -> None:
    """How far each funnel moves the states of this model, by layer."""
    have = {x["hash"] for x in self._results.lines if x["kind"] == "similarity"}
    settings, model = self._config.similarity, result.model
    if not settings.rows or stage.hash in have:
      return
    names = (stage.funnel,)
    if stage.funnel == OFF:
      names = self._plan.funnels()[stage.model]
    heldout = pipeline.heldout_batches(
      result.corpus.heldout,
      result.corpus.tokenizer,
      align=1,
      batch_size=settings.rows,
      length=settings.length,
      max_documents=4 * settings.rows,
    )
    batch = heldout.batches[0]
    # A document a row: nothing is packed, whatever the funnel.
    segment = (batch["segment"] == 1).astype(np.int32)
    for name in names:
      if name == OFF:
        continue
      layers = layer_similarity.by_depth(
        model, name, batch["tokens"], segment, causal=True
      )
      (funnel,) = parse_funnel(name)
      axes = {axis: getattr(funnel, axis) for axis in grid.FUNNEL_AXES}
      self._results.add(
        {
          "kind": "similarity",
          "hash": stage.hash,
          "model": stage.model,
          "pretraining": stage.kind,
          "finetuning": None,
          "funnel": name,
          **axes,
          **self._common,
          "layers": layers,
        }
      )

  def _generative(self, cell: Cell, path: str) -> None:
    """Measures a cell of a task that needs no fine-tuning."""
    task = self._plan.tasks[cell.task]
    model = convert.load(path, cell.measured_with)
    tokenizer = Tokenizer.load(convert.describe(path).tokenizer_path)
    settings = generative.Settings(**self._config.generative)
    found = generative.evaluate(task, model, tokenizer, settings)
    metric = generative.main_metric(task)
    metrics = {k: v for k, v in found.items() if isinstance(v, float)}
    self._measured(cell, metric, metrics, len(task.splits[settings.split]), {})

  def _tuned(
    self, tuning: Tuning, cells: list[Cell], path: str, name: str
  ) -> None:
    """Fine-tunes, and measures with each cell's funnel."""
    task = self._plan.tasks[tuning.task]
    folder = self._folder / "finetune" / name
    config = self._plan.finetune_config(
      cells[0].pretraining, tuning, path, str(folder)
    )
    setup = finetune.make_setup(config, task)
    start = time.monotonic()
    result = finetune.train(setup)
    if not result.finished:
      raise KeyboardInterrupt
    train_s = time.monotonic() - start

    def measure(cell: Cell) -> None:
      found = finetune.measure(
        result.encoder.with_funnel(cell.measured_with),
        task,
        "test",
        setup.rows["test"],
        batch_size=setup.config.batch_size,
        length=setup.config.length,
      )
      self._measured(
        cell,
        task.metrics[0],
        found,
        len(task.splits["test"]),
        {"train_s": train_s, "steps": result.steps},
      )

    for cell in cells:
      self._guarded([cell], measure, cell)
    if not self._config.keep_finetuned:
      shutil.rmtree(folder)

  def _measured(self, cell, metric, metrics, num_test, more) -> None:
    """Writes the line of a cell."""
    value = metrics[metric]
    if value is None:
      raise FloatingPointError(f"{metric} of {cell.task} is undefined")
    model = TransformerConfig.from_dict(
      self._config.models[cell.pretraining.model]
    )
    settings, funnel = self._config.latency, cell.measured_with
    shape = settings.batch_size, settings.length
    timed = self._latencies.get((cell.pretraining.model, funnel), {})
    self._add(
      cell,
      {
        "kind": "cell",
        "metric": metric,
        "value": value,
        "metrics": metrics,
        "higher_is_better": metric not in _LOWER,
        "num_test": num_test,
        "ideal_reduction": flops.ideal_reduction(
          model, funnel, *shape, head=False, causal=False
        ),
        "flops": flops.forward(model, funnel, *shape, head=False, causal=False),
        "latency_s": timed.get("latency_s"),
        "reduction": 0.0 if funnel == OFF else timed.get("reduction"),
        **more,
      },
    )

  @functools.cached_property
  def _latencies(self) -> dict[tuple[str, str], dict[str, Any]]:
    """Rows of `latency.measure` by (model, funnel)."""
    settings, found = self._config.latency, {}
    if not settings.repeats:
      return found
    for name, funnels in self._plan.funnels().items():
      model_config = TransformerConfig.from_dict(self._config.models[name])
      measured = latency.measure(
        latency.random_model(model_config),
        tuple(funnels),
        batch_sizes=(settings.batch_size,),
        lengths=(settings.length,),
        causal=False,
        head=(False,),
        protocol=timing.Protocol(settings.repeats, 2, 0),
      )
      by_name = {row["funnel"]: row for row in measured}
      for funnel in funnels:
        found[name, funnel] = by_name.get(funnel, by_name[OFF])
    return found


def _no_evaluator(corpus, setup):
  """Pretrainings are judged by what is measured of them later."""
  del corpus, setup
  return lambda model: {}


def main() -> None:
  """The command; --dry-run prints the plan and ends there."""
  sys.argv = [
    "--config.dry_run" if given == "--dry-run" else given for given in sys.argv
  ]
  cli.main(run)
