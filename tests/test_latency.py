"""Latency: rows that agree with themselves, their FLOPs and a planted clock."""

import json
import pathlib

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run

from gemma_funnel import convert, evaluation, flops
from gemma_funnel.config import (
  PRESETS,
  FunnelConfig,
  TransformerConfig,
  parse_funnel,
  resolve_funnel,
)
from gemma_funnel.evaluation import decoding, funnels, latency, plots, timing
from gemma_funnel.model import Transformer

TINY = TransformerConfig.preset("tiny")
FUNNELS = ("start=1,stride=2", "start=1,stop=3,stride=3,recover=add")


def get_config(preset="tiny", **changes):
  config = tiny_run.load_config("eval_latency", preset)
  config.update(changes)
  return config


@pytest.fixture(scope="module")
def model():
  return latency.random_model(TINY)


class FakeDevice:
  """Stands in for the compiler: programs of given costs on a planted clock."""

  def __init__(self, monkeypatch, cost):
    self.now = 0.0
    self.functions = []

    def compile_program(function, *args, clock):
      del clock
      self.functions.append((function, args))
      # Functions are partial(_forward, graphdef, head, ...).
      graphdef, head = function.args[:2]
      stages = nnx.merge(graphdef, args[0]).stages
      seconds = cost(stages, head, args[1].shape)

      def call():
        self.now += seconds
        return jnp.zeros(())

      return timing.Program(call, 0.0, 100)

    monkeypatch.setattr(timing, "compile_program", compile_program)

  def measure(
    self,
    model,
    funnels=FUNNELS[:1],
    batch_sizes=(1,),
    lengths=(8,),
    repeats=1,
    **options,
  ):
    protocol = timing.Protocol(
      repeats, clock=lambda: self.now, log=lambda line: None
    )
    return latency.measure(
      model,
      funnels,
      batch_sizes=batch_sizes,
      lengths=lengths,
      protocol=protocol,
      **options,
    )


def test_a_planted_clock_gives_its_rows(model, monkeypatch):
  def cost(stages, head, shape):
    stride = stages[0].stride if stages else 1
    return shape[0] * shape[1] / stride + (100 if head else 0)

  device = FakeDevice(monkeypatch, cost)
  rows = device.measure(
    model,
    ("off", *FUNNELS, FunnelConfig(1, 4, 2)),  # Each is measured once.
    batch_sizes=(2,),
    lengths=(12, 24),
    head=(False, True, False),
    repeats=3,
  )
  assert [(r["length"], r["head"], r["funnel"]) for r in rows] == [
    (length, head, funnel)
    for length in (12, 24)
    for head in (False, True)
    for funnel in ("off", *FUNNELS)
  ]
  for row in rows:
    slots, head = 2 * row["length"], 100 * row["head"]
    stride = {"off": 1, FUNNELS[0]: 2, FUNNELS[1]: 3}[row["funnel"]]
    seconds = slots / stride + head
    assert row["latency_s"] == pytest.approx(seconds)
    assert row["reduction"] == pytest.approx(1 - seconds / (slots + head))
    assert row["tokens_per_s"] == pytest.approx(slots / seconds)
    assert row["peak_bytes"] == 100 and row["error"] is None
  figure = plots.latency(rows)
  assert len(figure.axes) == 4
  assert len(figure.axes[0].patches) == 4  # Two funnels at two lengths.
  assert len(figure.axes[2].lines) == 3


def test_rows_agree_with_themselves_and_with_flops(model):
  rows = latency.measure(
    model,
    FUNNELS[1:],
    batch_sizes=(2,),
    lengths=(33,),
    causal=False,
    protocol=timing.Protocol(repeats=3, warmup=1, log=lambda line: None),
  )
  assert len(rows) == 2 * 2
  off = {
    (r["batch"], r["length"], r["head"]): r
    for r in rows
    if r["funnel"] == "off"
  }
  for row in rows:
    shape = row["batch"], row["length"], row["head"]
    funnel = parse_funnel(row["funnel"])
    times, plain = np.array(row["times_s"]), np.array(off[shape]["times_s"])
    assert len(times) == 3 and times.min() > 0
    assert row["latency_s"] == pytest.approx(np.median(times))
    assert row["reduction"] == pytest.approx(1 - np.median(times / plain))
    assert row["reduction_of_medians"] == pytest.approx(
      1 - row["latency_s"] / off[shape]["latency_s"]
    )
    assert row["flops"] == flops.forward(TINY, funnel, *shape, False)
    assert row["flops_per_s"] == pytest.approx(row["flops"] / row["latency_s"])
    ideal = flops.ideal_reduction(TINY, funnel, *shape, False)
    assert row["ideal_reduction"] == ideal
    if not funnel:
      assert row["resolved"] == "off"
      assert row["reduction"] == ideal == 0
      assert row["measured_over_ideal"] is None
    else:
      assert parse_funnel(row["resolved"]) == resolve_funnel(funnel, 4)
      assert row["measured_over_ideal"] == pytest.approx(
        row["reduction"] / ideal
      )
    assert row["peak_bytes"] > 4 * flops.parameters(TINY).total
  json.dumps(rows, allow_nan=False)


def test_a_context_is_dropped_and_its_ideal_is_the_formula(model, monkeypatch):
  """(L - r)/L * span/length, of what layers compute for each token."""
  funnel, length, span = "start=1,reduce=context", 32, 24
  # XLA counts the body of a loop over layers once.
  config = TransformerConfig.preset("tiny", scan_layers=False)
  model = nnx.merge(
    nnx.graphdef(Transformer.abstract(config)), nnx.state(model)
  )
  device = FakeDevice(monkeypatch, lambda *_: 1.0)
  options = dict(batch_sizes=(2,), lengths=(length,), head=(False,))
  rows = device.measure(model, (funnel,), context_length=span, **options)
  off, row = (r["flops"] for r in rows)
  assert off == flops.forward(TINY, None, 2, length, head=False)
  L, r = TINY.num_layers, 1
  ideal = (L - r) / L * span / length
  assert rows[1]["ideal_reduction"] == 1 - row / off
  assert rows[1]["ideal_reduction"] == pytest.approx(ideal, rel=0.03)

  function, args = device.functions[1]
  slots = np.arange(length)
  context = np.broadcast_to((slots >= 1) & (slots <= span), args[1].shape)
  expected = model.with_funnel(funnel).encode(
    args[1], causal=True, context_BT=context, context_length=span
  )
  found = jax.jit(function)(*args)
  np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-5)
  # The compiled program is as much shorter.
  counts = [
    jax.jit(f).lower(*a).compile().cost_analysis()["flops"]
    for f, a in device.functions
  ]
  assert 1 - counts[1] / counts[0] == pytest.approx(ideal, rel=0.15)


@pytest.mark.parametrize("span", [0, 16, -1])
def test_a_context_that_cannot_be_is_named(model, span):
  with pytest.raises(ValueError, match=f"context_length={span}.*1?5"):
    latency.measure(
      model,
      ("start=1,reduce=context",),
      batch_sizes=(1,),
      lengths=(32, 16),
      context_length=span,
    )


def test_a_variant_that_fails_has_its_error_in_its_row(model, monkeypatch):
  def cost(stages, head, shape):
    del shape
    if not stages and head:
      raise RuntimeError("RESOURCE_EXHAUSTED: out of memory")
    return 1.0 if stages else 2.0

  device = FakeDevice(monkeypatch, cost)
  rows = device.measure(model, repeats=2)
  plain, funnelled, plain_head, funnelled_head = rows
  assert plain["error"] is None and funnelled["reduction"] == 0.5
  assert "out of memory" in plain_head["error"]
  assert plain_head["tokens_per_s"] is None
  assert funnelled_head["latency_s"] == 1
  assert funnelled_head["reduction"] is None
  assert funnelled_head["measured_over_ideal"] is None
  plots.latency(rows)


@pytest.mark.parametrize(
  "changes, message",
  [
    (dict(funnels=("stride=2",)), "funnels: 'stride=2'.*start is missing"),
    (dict(funnels=("trained",)), "funnels: 'trained'.*not key=value"),
    (dict(funnels=("start=1,speed=2",)), "no field .*speed"),
    (dict(funnels=("start=3,stop=3",)), "start=3 must be below .*stop=3"),
    (dict(funnels=("start=1,stop=5",)), "stop=5 is past .* 4 layers"),
    (dict(funnels=("start=4",)), "start=4 must be below"),
    (dict(funnels=()), r"funnels=\(\): expected a tuple"),
    (dict(funnels="off"), "funnels='off': expected a tuple"),
    (dict(lengths=(16, 257)), "found 257, expected at most .*=256"),
    (dict(lengths=()), r"lengths=\(\): expected one value at least"),
    (dict(lengths=(0,)), "lengths=0: expected an integer >= 1"),
    (dict(batch_sizes=()), r"batch_sizes=\(\)"),
    (dict(batch_sizes=(1, -1)), "batch_sizes=-1"),
    (dict(batch_sizes=(True,)), "batch_sizes=True"),
    (dict(head=()), r"head=\(\): expected one or both"),
    (dict(head=(1,)), r"head=\(1,\): expected one or both"),
  ],
)
def test_bad_arguments_are_named(model, changes, message):
  arguments = dict(funnels=FUNNELS, batch_sizes=(1,), lengths=(16,)) | changes
  with pytest.raises(ValueError, match=message):
    latency.measure(model, arguments.pop("funnels"), **arguments)


def test_a_kernel_that_cannot_is_found_before_anything_runs(model, monkeypatch):
  config = TransformerConfig.preset("tiny", kernel="splash")
  model = nnx.merge(
    nnx.graphdef(Transformer.abstract(config)), nnx.state(model)
  )
  device = FakeDevice(monkeypatch, lambda *_: 1.0)
  with pytest.raises(ValueError, match="splash"):
    device.measure(model, FUNNELS, lengths=(16,))
  assert not device.functions


def test_random_model_is_a_model_in_its_dtype(model):
  config = TransformerConfig.preset(
    "tiny", num_layers=2, param_dtype="bfloat16"
  )
  made = nnx.state(latency.random_model(config, seed=3))
  shapes = nnx.state(Transformer.abstract(config))
  assert jax.tree.structure(made) == jax.tree.structure(shapes)
  leaves = jax.tree.leaves(made), jax.tree.leaves(shapes)
  for a, b in zip(*leaves, strict=True):
    assert a.shape == b.shape and a.dtype == b.dtype == jnp.bfloat16
  assert model.config == TINY and model.stages == ()
  # See the initialisation of Gemma.
  assert np.std(model.embedding[...]) == pytest.approx(32**-0.5, rel=0.1)


def test_layer_kinds():
  rows = latency.measure_layer_kinds(
    TINY,
    batch_sizes=(2,),
    lengths=(64,),
    protocol=timing.Protocol(repeats=2, warmup=1, log=lambda line: None),
  )
  assert [(r["length"], r["kind"], r["window"]) for r in rows] == [
    (64, "global", None),
    (64, "local", 8),
  ]
  for row in rows:
    assert row["latency_s"] == pytest.approx(np.median(row["times_s"]))
    one_layer = TransformerConfig.preset(
      "tiny", num_layers=1, attention_pattern=(row["kind"],)
    )
    assert row["flops"] == flops.forward(
      one_layer, None, 2, row["length"], head=False
    )
    saved = 1 - row["flops"] / rows[0]["flops"]
    assert row["ideal_reduction"] == pytest.approx(saved)
  assert rows[1]["ideal_reduction"] > 0.1
  plots.layer_kinds(rows)


@pytest.fixture
def quick(tmp_path):
  return dict(
    funnels=FUNNELS[:1],
    lengths=(16,),
    warmup=0,
    repeats=2,
    out=str(tmp_path / "out"),
    decode=dict(batch_sizes=(1,), prompts=(8,), new_tokens=4),
  )


def test_run_writes_what_it_returns(quick, tmp_path, capsys):
  config = get_config(**quick)
  rows = evaluation.run(config)
  written = {path.name for path in (tmp_path / "out").iterdir()}
  assert written == {
    f"{name}.{kind}"
    for name in ("latency", "layer_kinds", "decode")
    for kind in ("json", "md", "png")
  }
  content = json.loads((tmp_path / "out" / "latency.json").read_text())
  assert content["rows"] == rows
  assert TransformerConfig.from_dict(content["settings"]["model"]) == TINY
  out = capsys.readouterr().out
  for text in (
    "compiling start=1,stride=2, with the head",
    "| latency reduction, measured % |",
    "| first token ms |",
  ):
    assert text in out
  decoded = json.loads((tmp_path / "out" / "decode.json").read_text())["rows"]
  assert [row["funnel"] for row in decoded] == ["off", *FUNNELS[:1]]
  png = (tmp_path / "out" / "latency.png").read_bytes()
  assert png[:8] == b"\x89PNG\r\n\x1a\n" and len(png) > 10_000


def test_run_with_a_checkpoint(quick, monkeypatch, model):
  calls = []

  def load(path, funnel, dtype):
    calls.append((path, funnel, dtype))
    return model

  monkeypatch.setattr(convert, "load", load)
  # Sizes are the checkpoint's, how it runs is configured.
  config = get_config(
    "quickstart",
    **quick,
    checkpoint="somewhere",
    head=(False,),
    layer_kinds=False,
  )
  config.decode.new_tokens = 0
  config.model.kernel = "reference"
  config.model.param_dtype = "bfloat16"
  evaluation.run(config)
  assert calls == [("somewhere", "off", "bfloat16")]
  content = json.loads((pathlib.Path(config.out) / "latency.json").read_text())
  used = content["settings"]["model"]
  assert used["num_layers"] == TINY.num_layers
  assert used["kernel"] == "reference"
  assert content["settings"]["checkpoint"] == "somewhere"


def test_run_fails_if_nothing_could_run(quick, monkeypatch, model):
  def fail(*args, **kwargs):
    raise RuntimeError("no device")

  monkeypatch.setattr(latency, "random_model", lambda config, seed: model)
  monkeypatch.setattr(timing, "compile_program", fail)
  config = get_config(**quick, layer_kinds=False)
  config.decode.new_tokens = 0
  with pytest.raises(RuntimeError, match="no variant could run.*no device"):
    evaluation.run(config)
  assert (pathlib.Path(config.out) / "latency.json").exists()


@pytest.mark.parametrize(
  "changes, message",
  [
    (dict(evaluator="speed"), "evaluator='speed': expected one of"),
    (dict(causal=False), "encoder.* decode.new_tokens=0, found"),
    ({"decode.new_tokens": 500}, "decode: a prompt of 8 tokens and 500"),
    ({"model.num_heads": 3}, "model.num_heads=3"),
    (dict(lengths=None), r"lacks \['lengths'\]"),
    (dict(funnels=("start=1,recover=none",)), "recover='none'"),
    (dict(funnels=("half",)), "funnels: 'half'"),
  ],
)
def test_mistakes_are_named_before_a_checkpoint_is_read(
  quick, monkeypatch, changes, message
):
  checkpoint = None
  if "funnels" in changes:
    monkeypatch.setattr(convert, "load", None)
    checkpoint = "somewhere"
  config = get_config(**quick, checkpoint=checkpoint)
  if "lengths" in changes:
    del config.lengths
  else:
    config.update_from_flattened_dict(changes)
  with pytest.raises(ValueError, match=message):
    evaluation.run(config)


@pytest.mark.parametrize("preset", PRESETS)
def test_the_configuration_of_every_preset_is_valid(preset):
  config = get_config(preset)
  model = TransformerConfig.from_dict(config.model)
  assert max(config.lengths) <= model.max_length
  assert decoding.check(model, config.funnels, **config.decode)
  assert funnels.resolve(config.funnels, model.num_layers)
  if preset not in ("bench", "quickstart", "tiny"):
    assert model.param_dtype == model.dtype == "bfloat16"
  assert config.layer_kinds == (
    set(model.attention_kinds) == {"local", "global"}
  )
  # A cap can be set and taken away on the command line.
  config.model.attn_softcap = 20.0
  assert TransformerConfig.from_dict(config.model).attn_softcap == 20


def test_known_names_stand_for_funnels():
  several = "start=0+start=2"
  named = funnels.resolve(
    (
      "trained",
      "off",
      "start=1,stride=3",
      "start=2",
      several,
      (FunnelConfig(2), FunnelConfig(0)),
      (FunnelConfig(3),),
    ),
    4,
    own=FunnelConfig(1, stride=3),
  )
  assert named == {
    "as trained": (FunnelConfig(1, 4, 3),),
    "off": (),
    "start=2": (FunnelConfig(2, 4),),
    several: (FunnelConfig(0, 4), FunnelConfig(2, 4)),
    "start=3,stride=2,reduce=mean,recover=average": (FunnelConfig(3, 4),),
  }


LEARNED = "start=0,stride=3,recover=gate+start=1,pool=attention,recover=attend"


@pytest.mark.parametrize("head", [False, True])
def test_variants_are_the_model_with_what_they_learn(
  model, monkeypatch, capsys, head
):
  learned = model.with_funnel(LEARNED)
  for part in (
    learned.funnel[0].recovery.gate,
    learned.funnel[1].recovery.attend.attn.out,
  ):
    part[...] = jnp.full(part.shape, 0.1)
  capsys.readouterr()
  device = FakeDevice(monkeypatch, lambda *_: 1.0)
  device.measure(
    learned, (LEARNED,), batch_sizes=(2,), lengths=(16,), head=(head,)
  )
  assert capsys.readouterr().out == ""  # Nothing is made afresh.
  run = nnx.jit(lambda m, x: (m if head else m.encode)(x, causal=True))
  outputs = []
  for (function, args), funnel in zip(
    device.functions, ("off", LEARNED), strict=True
  ):
    # The model itself is in memory once.
    assert args[0]["embedding"][...] is model.embedding[...]
    outputs.append(jax.jit(function)(*args))
    variant = learned.with_funnel(funnel)
    expected = run(variant, args[1])
    np.testing.assert_allclose(outputs[-1], expected, rtol=2e-5, atol=2e-5)
  fresh = run(model.with_funnel(LEARNED), args[1])
  assert np.max(np.abs(outputs[1] - fresh)) > 1e-3


def test_without_recovery_only_the_encoder_is_measured(model, monkeypatch):
  device = FakeDevice(monkeypatch, lambda *_: 1.0)
  funnels_ = ("start=1,recover=none",)
  with pytest.raises(ValueError, match=r"recover='none'.*head=\(False,\)"):
    device.measure(model, funnels_)
  assert not device.functions
  rows = device.measure(model, funnels_, lengths=(9,), head=(False,))
  assert [row["error"] for row in rows] == [None, None]
  function, args = device.functions[1]
  assert jax.eval_shape(function, *args).shape == (1, 5, TINY.embed_dim)
