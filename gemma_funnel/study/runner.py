"""Runs a study: what funnels cost and save, as one grid of trainings.

Trainings are shared: one pretraining serves all its fine-tunings, and each of
those all funnels that it is measured with. Each result is a line of
results.jsonl as soon as it is there; the same command resumes a study.
"""

from collections.abc import Mapping
import functools
import hashlib
import json
import os
import pathlib
import shutil
import time
from typing import Any
import warnings

from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from gemma_funnel import atomic, cli, convert, flops, inputs, locks
from gemma_funnel.config import OFF, TransformerConfig, parse_funnel
from gemma_funnel.convert.tensor_io import read_json
from gemma_funnel.data import pipeline
from gemma_funnel.data.tokenizer import Tokenizer
from gemma_funnel.evaluation import generative, latency, report, timing
from gemma_funnel.study import analysis, grid, html_report, layer_similarity
from gemma_funnel.study.grid import Branch, Cell, Pretraining, Tuning
from gemma_funnel.study.results import Results
from gemma_funnel.training import (
  finetune,
  metric_writer,
  pretrain,
  trainer,
  workdir,
)
from gemma_funnel.training.spec import RunSpec

# What a training may fail with, and the study go on without it.
_FAILURES = (ValueError, FloatingPointError, RuntimeError, MemoryError)
# Keys of a training whose values are paths within the study.
_PATHS = (("workdir",), ("init_from",), ("tokenizer",), ("data", "tokenizer"))
_LOWER_IS_BETTER = ("loss", "bits_per_byte", "perplexity", "word_perplexity")


def run(config: ml_collections.ConfigDict) -> None:
  """Runs what is left of a study, and writes its tables, plots and report.

  A result is kept with all that it depends on: text, tasks and configuration.
  Where one of these has changed since, its cells are measured anew, and a line
  says so; results of two texts are never in one table.

  Raises:
    ValueError: a configuration that cannot be, before anything is trained;
      another process runs the study; the text changes while it runs.
    OSError: the disk is full, or cannot be written to. The same command goes
      on when it can.
  """
  made = grid.make(config)
  if not jax.config.jax_compilation_cache_dir:
    # Trainings that differ by a seed or by their data share programs.
    folder = os.path.join(config.workdir, "programs")
    jax.config.update("jax_compilation_cache_dir", folder)
    # On a full disk: the program is compiled again.
    about = "Error (reading|writing) persistent compilation cache"
    warnings.filterwarnings("ignore", about)
  if config.dry_run:
    _say(*made.describe(Runner(made).done, _rate(config)))
    return
  with workdir.hold(config.workdir):
    try:
      _run(made)
    except OSError as error:
      error.filename = error.filename or config.workdir
      if cli.disk_error(error):
        raise
      text = f"{error.filename}: {error.strerror}"
      raise StudyError(f"the study cannot go on: {text}") from error


def _run(made: grid.Grid) -> None:
  config, runner = made.study, Runner(made)
  _say(*made.describe(runner.done, _rate(config)))
  runner.run()
  results = analysis.organise(runner.rows())
  settings = {"config": config.to_dict(), "git": report.revision()}
  paths = html_report.write(results, config.workdir, config.title, settings)
  _say("", *(f"- {line}" for line in analysis.claims(results)))
  _say("", f"written: {', '.join(paths.values())}")


def _say(*lines: str) -> None:
  # Names of tasks and models are whatever a configuration has.
  for line in lines:
    cli.tell(line)


def _rate(config: Any) -> float:
  """FLOP/s of training the study's first model here, measured in seconds."""
  sizes = TransformerConfig.from_dict(config.models[config.axes.model[0]])
  batch, length = config.pretrain.batch_size, config.pretrain.length
  graphdef, params = nnx.split(latency.random_model(sizes))
  tokens = np.ones((batch, length), np.int32)

  def loss(params):
    return jnp.mean(nnx.merge(graphdef, params)(tokens).astype(jnp.float32))

  program = timing.compile_program(jax.grad(loss), params)
  protocol = timing.Protocol(repeats=2, warmup=1)
  times, _ = timing.time_interleaved({"step": program.call}, protocol)
  return 3 * flops.forward(sizes, None, batch, length) / min(times["step"])


class StudyError(ValueError):
  """What ends a study; other errors end a cell."""


class Runner:
  """Runs the trainings and measurements of a grid that have no result yet."""

  def __init__(self, study_grid: grid.Grid):
    self._grid, self._config = study_grid, study_grid.study
    self._folder = pathlib.Path(self._config.workdir)
    self._results = Results(self._config.workdir)
    # What tells the parameters of each that was trained from others.
    self._trained: dict[Pretraining, str] = {}
    self._bases: dict[str, str] = {}  # That, by the hash of a cell.
    self._common = {"git": report.revision(), "device": report.device()}
    # Of cells that have a result, or have failed.
    kinds = ("cell",) if self._config.retry else ("cell", "failure")
    self.done = self._results.hashes(*kinds)

  def rows(self) -> list[dict[str, Any]]:
    """Lines of the grid's own cells; a failure that was mended is left out."""
    made = (*self._grid.cells, *self._grid.pretrainings)
    wanted, good = {x.hash for x in made}, self._results.hashes("cell")
    is_of = lambda line, base: line.get("base", base) == base
    return [
      line
      for line in self._results.lines
      if line["hash"] in wanted
      and is_of(line, self._bases.get(line["hash"], line.get("base")))
      and (line["kind"] != "failure" or line["hash"] not in good)
    ]

  def run(self) -> None:
    """Runs what is left; a failure leaves out the cells that depend on it."""
    self._note_inputs()
    total, start = self._grid.work(self.done), time.monotonic()

    def say():
      share = 1 - self._grid.work(self.done, self._trained) / total
      share = max(0.0, share)  # Some may be measured anew.
      spent = time.monotonic() - start
      eta = (
        metric_writer.duration(spent * (1 - share) / share) if share else "?"
      )
      _say(f"study: {share:.0%} of the training done, ETA {eta}")

    def run_branch(branch: Branch) -> None:
      path = self._pretrained(branch.pretraining)
      left = self._of_model(branch)
      for cell in left.generative:
        self._guarded([cell], self._generative, cell, path)
      say()
      for tuning, cells in left.tunings.items():
        # Whatever is left of them, it is the same training: one folder.
        first = branch.tunings[tuning][0]
        folder = f"{pathlib.Path(path).name}-{first.hash}"
        self._guarded(cells, self._tuned, tuning, cells, path, folder)
        say()

    for branch in self._grid.branches:
      if cells := branch.left(self.done).cells:
        self._guarded(cells, run_branch, branch)

  def _of_model(self, branch: Branch) -> Branch:
    """What is left of a branch; results of another model than its are not."""
    mine = self._trained[branch.pretraining]
    self._bases |= {cell.hash: mine for cell in branch.cells}
    others = {
      line["hash"]
      for line in self._results.lines
      if line.get("base", mine) != mine
    } - {x["hash"] for x in self._results.lines if x.get("base") == mine}
    others &= {cell.hash for cell in branch.cells}
    if others & self.done:
      cli.say(
        f"warning: the {branch.pretraining.kind} pretraining of "
        f"{branch.pretraining.model} is there anew, with other parameters than "
        f"those that {len(others)} results are of: they are measured anew"
      )
      self.done -= others
    return branch.left(self.done)

  def _guarded(self, cells: list[Cell], function, *args) -> None:
    """Calls `function`; where it fails, so do those of `cells` not done."""
    try:
      function(*args)
    except _FAILURES as error:
      if isinstance(error, (StudyError, locks.HeldError)):
        raise
      if (found := cli.disk_error(error)) is not None:
        raise found from error
      text = cli.clean(f"{type(error).__name__}: {error}", 500)
      _say(f"failed, and left out: {text}")
      for cell in cells:
        if cell.hash not in self.done:
          self._add(cell, {"kind": "failure", "error": text})

  def _note_inputs(self) -> None:
    """Keeps what results depend on, and says what has changed."""
    now, kept = self._grid.inputs, {}
    for line in self._results.lines:
      if line["kind"] == "inputs":
        kept |= line["fingerprints"]
    if changed := [
      name for name in now if kept.get(name, now[name]) != now[name]
    ]:
      cli.say(
        f"warning: {', '.join(changed)} changed since the study in "
        f"{self._folder} was last run: what depends on it is measured anew"
      )
    if kept | now != kept:
      about = dict(kind="inputs", hash=grid.hash_of(now))
      self._results.add({**about, "fingerprints": dict(now)})

  def _require_text(self, folder: str) -> None:
    """Raises StudyError where the text is another than that of the grid."""
    if (
      grid.hash_of_text(self._config.pretrain.data) != self._grid.inputs["text"]
    ):
      raise StudyError(
        f"the text of pretrain.data changed while the study ran: remove {folder} "
        "if it is there, and run the same command again, which measures what "
        "depends on the text anew"
      )

  def _add(self, cell: Cell, values: Mapping[str, Any]) -> None:
    base = self._trained.get(cell.pretraining)
    base = {"base": base} if base else {}
    self._results.add({**cell.axes, **self._common, **base, **values})
    self.done.add(cell.hash)

  def _pretrained(self, pretraining: Pretraining) -> str:
    """The folder of a pretraining, which is run if need be."""
    config = pretraining.config(self._config, self._config.workdir)
    if pretraining in self._trained:  # A teacher has several students.
      return config.workdir
    if pretraining.kind == "distilled":
      config.init_from = self._pretrained(self._grid.teacher(pretraining))
    self._require_text(config.workdir)
    self._give_tokenizer(config)
    about = f"{pretraining.model}, {pretraining.kind}: {pretraining.funnel}"
    _say(f"pretraining {about}")
    spec = pretrain.resolve(config)
    _give_paths(config.workdir, spec)
    result = trainer.train(spec)
    self._require_text(config.workdir)
    if not result.finished:
      raise KeyboardInterrupt  # SIGTERM: the same command goes on.
    self._trained[pretraining] = _digest(result.model)
    self._similarity(pretraining, result)
    return config.workdir

  def _give_tokenizer(self, config: Any) -> None:
    """Puts the study's own tokenizer, trained once, where a run has one."""
    if config.data.tokenizer is not None:
      return
    content = self._tokenizer(config)
    spec = pretrain.resolve(config)
    _give_paths(config.workdir, spec)
    workdir.init_workdir(spec.config)
    run = pathlib.Path(config.workdir)
    if not (run / workdir.FOLDER).exists():
      atomic.write_bytes(run / workdir.TOKENIZER, content)

  def _tokenizer(self, config: Any) -> bytes:
    """The tokenizer of a text, trained once for each number of pieces."""
    pieces = config.model.vocab_size
    key = grid.hash_of(pieces, config.data.to_dict(), self._grid.inputs["text"])
    kept = self._folder / f"tokenizer_{pieces}_{key}" / workdir.TOKENIZER
    for line in reversed(self._results.lines):
      if (line["kind"], line["hash"]) == ("tokenizer", key):
        try:
          if inputs.fingerprint(kept) == line["fingerprint"]:
            return inputs.read_bytes(kept, inputs.MAX_TOKENIZER)
          found = f"{kept} has another content than it was written with"
        except ValueError as error:
          found = str(error)
        cli.say(f"warning: {found}; it is trained again")
        break
    kept.parent.mkdir(parents=True, exist_ok=True)
    kept.unlink(missing_ok=True)
    pipeline.load_corpus(config.data, pieces, kept.parent)
    about = dict(kind="tokenizer", hash=key)
    self._results.add({**about, "fingerprint": inputs.fingerprint(kept)})
    return inputs.read_bytes(kept, inputs.MAX_TOKENIZER)

  def _similarity(
    self, pretraining: Pretraining, result: trainer.Result
  ) -> None:
    """How far each funnel moves the states of this model, by layer."""
    settings, mine = self._config.similarity, self._trained[pretraining]
    self._bases[pretraining.hash] = mine
    have = {
      line["hash"]
      for line in self._results.lines
      if line["kind"] == "similarity" and line.get("base", mine) == mine
    }
    if not settings.rows or pretraining.hash in have:
      return
    names = (pretraining.funnel,)
    if pretraining.funnel == OFF:
      names = self._grid.funnels()[pretraining.model]
    heldout = pipeline.heldout_batches(
      result.data.heldout,
      result.data.tokenizer,
      segment_alignment=1,
      batch_size=settings.rows,
      length=settings.length,
      max_documents=4 * settings.rows,
    )
    batch = heldout.batches[0]
    # A document a row: nothing is packed, whatever the funnel.
    tokens, segment = batch["tokens"], (batch["segment"] == 1).astype(np.int32)
    about = dict(kind="similarity", hash=pretraining.hash, finetuning=None)
    about["base"] = mine
    about |= dict(model=pretraining.model, pretraining=pretraining.kind)
    for name in names:
      if name != OFF:
        axes = grid.funnel_axes(parse_funnel(name)[0])
        layers = layer_similarity.by_depth(
          result.model, name, tokens, segment, causal=True
        )
        self._results.add({**about, **axes, **self._common, "layers": layers})

  def _generative(self, cell: Cell, path: str) -> None:
    """Measures a cell of a task that needs no fine-tuning."""
    task = self._grid.tasks[cell.task]
    model = convert.load(path, cell.measured_with)
    tokenizer = Tokenizer.load(convert.describe(path).tokenizer_path)
    settings = generative.Settings(**self._config.generative)
    found = generative.evaluate(task, model, tokenizer, settings)
    metrics = {k: v for k, v in found.items() if isinstance(v, float)}
    more = {"num_test": len(task.splits[settings.split])}
    self._measured(cell, generative.main_metric(task), metrics, more)

  def _tuned(
    self, tuning: Tuning, cells: list[Cell], path: str, name: str
  ) -> None:
    """Fine-tunes, and measures with each cell's funnel."""
    task = self._grid.tasks[tuning.task]
    folder = self._folder / "finetune" / name
    config = self._grid.finetune_config(
      cells[0].pretraining, tuning, path, str(folder)
    )
    spec = finetune.resolve(config, task)
    _give_paths(config.workdir, spec)
    start = time.monotonic()
    result = trainer.train(spec)
    if not result.finished:
      raise KeyboardInterrupt
    more = {"num_test": len(task.splits["test"]), "steps": result.steps}
    more["train_s"] = time.monotonic() - start

    def measure(cell: Cell) -> None:
      model, rows = result.model, spec.task.rows["test"]
      model = model.with_funnel(cell.measured_with)
      shape = dict(batch_size=spec.batch_size, length=spec.length)
      metrics = finetune.measure(model, task, "test", rows, **shape)
      self._measured(cell, task.metrics[0], metrics, more)

    for cell in cells:
      self._guarded([cell], measure, cell)
    if not self._config.keep_finetuned:
      shutil.rmtree(folder)

  def _measured(self, cell: Cell, metric: str, metrics, more) -> None:
    """Writes the line of a cell."""
    value = metrics[metric]
    if value is None:
      raise FloatingPointError(f"{metric} of {cell.task} is undefined")
    name, funnel = cell.pretraining.model, cell.measured_with
    model = TransformerConfig.from_dict(self._config.models[name])
    settings = self._config.latency
    shape = funnel, settings.batch_size, settings.length
    encoder = dict(head=False, causal=False)
    timed = self._latencies.get((name, funnel), {})
    row = dict(kind="cell", metric=metric, value=value, metrics=metrics)
    row["higher_is_better"] = metric not in _LOWER_IS_BETTER
    row["ideal_reduction"] = flops.ideal_reduction(model, *shape, **encoder)
    row["flops"] = flops.forward(model, *shape, **encoder)
    row["latency_s"] = timed.get("latency_s")
    row["reduction"] = 0.0 if funnel == OFF else timed.get("reduction")
    self._add(cell, {**row, **more})

  @functools.cached_property
  def _latencies(self) -> dict[tuple[str, str], dict[str, Any]]:
    """Rows of `latency.measure` by (model, funnel)."""
    settings, found = self._config.latency, {}
    if not settings.repeats:
      return found
    for name, funnels in self._grid.funnels().items():
      sizes = TransformerConfig.from_dict(self._config.models[name])
      measured = latency.measure(
        latency.random_model(sizes),
        funnels,
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


def _digest(model: nnx.Module) -> str:
  """Tells parameters from others, be they of the same training elsewhere."""
  found = hashlib.sha256()
  for leaf in jax.tree.leaves(nnx.to_pure_dict(nnx.state(model))):
    found.update(np.asarray(leaf).tobytes())
  return found.hexdigest()[:12]


def _give_paths(folder: str, spec: RunSpec) -> None:
  """Writes into the configuration of a run that was begun where it is now.

  A study may have been moved since. The name of the run's folder tells what
  the run is, so that of a configuration that is damaged all is written anew.
  """
  path = workdir.path_of(folder) / workdir.CONFIG
  if os.path.lexists(folder) and not os.path.isdir(folder):
    raise StudyError(f"{folder} is no folder: expected a run; remove it")
  if not path.exists():
    return
  keep = dict(keep_empty_nodes=True)
  here = flatten_dict(json.loads(spec.config.to_json()), **keep)
  try:
    there = flatten_dict(read_json(path), **keep)
  except ValueError as error:
    cli.say(f"warning: {error}; it is written anew")
    there = here
  given = {key: value for key, value in here.items() if key in _PATHS}
  if there is here or there | given != there:
    text = json.dumps(unflatten_dict(there | given), indent=2)
    atomic.write_text(path, f"{text}\n")
