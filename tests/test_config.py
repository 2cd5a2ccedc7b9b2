"""Every mistake of configuration is a ValueError that names the field."""

import dataclasses
import math

import ml_collections
import pytest

from gemma_funnel.config import (
  PRESETS,
  FunnelConfig,
  LayerSpec,
  RopeScaling,
  TransformerConfig,
  check_recovers,
  format_funnel,
  parse_funnel,
  resolve_funnel,
  total_stride,
)


@pytest.mark.parametrize(
  "fields,message",
  [
    (dict(start=-1), r"funnel.start=-1: expected an integer >= 0"),
    (dict(start=1.5), r"funnel.start=1.5"),
    (dict(start=True), r"funnel.start=True: expected an integer"),
    (dict(start=3, stop=3), r"funnel.start=3 must be below funnel.stop=3"),
    (dict(start=4, stop=2), r"funnel.start=4 must be below funnel.stop=2"),
    (dict(start=1, stop=2.5), r"funnel.stop=2.5: expected an integer >= 0"),
    (dict(start=1, stride=0), r"funnel.stride=0: expected an integer >= 1"),
    (dict(start=1, stride=True), r"funnel.stride=True"),
    (
      dict(start=1, reduce="median"),
      r"funnel.reduce='median': expected one of",
    ),
    (dict(start=1, recover="avg"), r"funnel.recover='avg': expected one of"),
    (dict(start=1, position="end"), r"funnel.position='end': expected one of"),
    (dict(start=1, keys="all"), r"funnel.keys='all': expected one of"),
    (dict(start=1, keep_first="no"), r"funnel.keep_first='no': .* a bool"),
    (
      dict(start=1, reduce="strided", position="first"),
      "funnel.position='first' has no effect",
    ),
    (
      dict(start=1, reduce="strided", position="mean"),
      "funnel.position='mean' has no effect",
    ),
  ],
)
def test_funnel_fields(fields, message):
  with pytest.raises(ValueError, match=message):
    FunnelConfig(**fields)


# Stages as strings, and what is wrong with them in a model of 6 layers.
@pytest.mark.parametrize(
  "funnel,message",
  [
    ("start=1,stop=7", "funnel.stop=7 is past the model's 6 layers"),
    (
      "start=6",
      r"funnel.start=6 must be below funnel.stop=6 \(the model has 6",
    ),
    (
      "start=0,stop=3+start=2,stop=4",
      r"funnel stages \[0, 3\) and \[2, 4\) cross: expected one within",
    ),
    (
      "start=3,stop=5+start=0,stop=4",  # In whatever order they are written.
      r"funnel stages \[0, 4\) and \[3, 5\) cross",
    ),
    (
      "start=0,stop=6+start=1,stop=3+start=2,stop=4",
      r"funnel stages \[1, 3\) and \[2, 4\) cross",
    ),
    (
      "start=2,stop=4+start=2",
      "two funnel stages start at layer 2: expected one of a larger stride",
    ),
    (
      "start=1,stop=5,recover=none",
      "funnel.recover='none' with stop=5: .* expected stop=6, or another",
    ),
    (
      "start=1+start=2,recover=none",
      "funnel.recover='none' at layer 2 is within a stage that recovers",
    ),
    (
      "start=0,recover=none+start=1+start=2,recover=none",
      "funnel.recover='none' at layer 2 is within a stage that recovers",
    ),
  ],
)
def test_stages_that_do_not_fit(funnel, message):
  with pytest.raises(ValueError, match=message):
    resolve_funnel(funnel, 6)


@pytest.mark.parametrize(
  "funnel,spans",
  [
    ("off", []),
    (None, []),
    ((), []),
    ("start=1", [(1, 6)]),
    ("start=1,stop=3", [(1, 3)]),
    (FunnelConfig(5), [(5, 6)]),
    ("start=4+start=1,stop=3", [(1, 3), (4, 6)]),
    ("start=0,stop=2+start=2,stop=4+start=4", [(0, 2), (2, 4), (4, 6)]),
    ([FunnelConfig(1), FunnelConfig(0)], [(0, 6), (1, 6)]),
    ("start=0,recover=none+start=3,recover=none", [(0, 6), (3, 6)]),
    ("start=0,recover=none+start=1+start=2,stop=4", [(0, 6), (1, 6), (2, 4)]),
    ("start=0,stop=2+start=3,recover=none", [(0, 2), (3, 6)]),
  ],
  ids=str,
)
def test_stages_that_fit_are_in_order(funnel, spans):
  stages = resolve_funnel(funnel, 6)
  assert [(stage.start, stage.stop) for stage in stages] == spans
  assert resolve_funnel(stages, 6) == stages


STAGES = [
  FunnelConfig(2),
  FunnelConfig(0, 3, 4),
  FunnelConfig(1, 7, 3, "max", "add"),
  FunnelConfig(0, None, 2, "attention", "gate", "first", None, True, "mean"),
  FunnelConfig(3, 9, 1, "strided", "attend", keep_first=True),
  FunnelConfig(3, reduce="context"),
  FunnelConfig(3, 5, reduce="all", layers=(3, 4, 4, 0), keys="none"),
  FunnelConfig(3, reduce="last_queries", keep=0.25, keys="before"),
  FunnelConfig(3, reduce="tail", last=4),
  FunnelConfig(3, reduce="boundary", stride=3, threshold=0.125),
  FunnelConfig(3, reduce="first", recover="none", position="first"),
]


@pytest.mark.parametrize("stage", STAGES, ids=str)
def test_a_stage_round_trips(stage):
  assert FunnelConfig.parse(str(stage)) == stage
  assert parse_funnel(stage) == (stage,)


@pytest.mark.parametrize("count", range(len(STAGES) + 1))
def test_funnels_round_trip(count):
  stages = tuple(STAGES[:count])
  text = format_funnel(stages)
  assert parse_funnel(text) == stages
  assert parse_funnel(list(stages)) == stages
  assert text.count("+") == max(count - 1, 0)


def test_strings_say_what_differs_from_the_defaults():
  assert str(FunnelConfig(2, 8)) == (
    "start=2,stop=8,stride=2,reduce=mean,recover=average"
  )
  assert str(FunnelConfig(2, keys="first")) == (
    "start=2,stride=2,reduce=mean,recover=average,keys=first"
  )
  spaced = " start = 2 , keep_first = true + start=3 "
  assert parse_funnel(spaced) == (
    FunnelConfig(2, keep_first=True),
    FunnelConfig(3),
  )
  assert FunnelConfig.parse("start=2,keep_first=false") == FunnelConfig(2)


def test_the_names_of_version_0_1_are_read():
  assert FunnelConfig.parse("start=2,pool=max") == FunnelConfig(2, reduce="max")
  assert FunnelConfig.parse("start=2,pool=every").reduce == "strided"
  old = FunnelConfig.parse("start=2,pool_query_only=true")
  assert old == FunnelConfig(2, keys="first")
  assert FunnelConfig.parse("start=2,pool_query_only=false").keys == "own"
  with pytest.raises(ValueError, match="reduce is given twice"):
    FunnelConfig.parse("start=2,pool=max,reduce=max")


@pytest.mark.parametrize("funnel", ["off", "", " off ", None, (), []])
def test_off_is_no_funnel(funnel):
  assert parse_funnel(funnel) == ()
  assert format_funnel(parse_funnel(funnel)) == "off"


@pytest.mark.parametrize(
  "text,message",
  [
    ("2", "'2' is not key=value"),
    ("start=", "'start=' is not key=value"),
    ("stride=2", "start is missing"),
    ("start=1,start=2", "start is given twice"),
    ("start=1,strid=2", r"has no field \['strid'\]"),
    ("start=one", "funnel.start='one': expected an integer"),
    ("start=1,keep_first=yes", "funnel.keep_first='yes': expected a bool"),
    ("start=1,stride=true", "funnel.stride=True: expected an integer"),
    ("start=1,reduce=1", "funnel.reduce=1: expected one of"),
    ("start=1+", "'' is not key=value"),
    ("start=1+off", "'off' is not key=value"),
    ("start=1+stride=2", "'stride=2': start is missing"),
  ],
)
def test_funnel_strings_that_are_none(text, message):
  with pytest.raises(ValueError, match=message):
    parse_funnel(text)


@pytest.mark.parametrize("funnel", [["start=1"], [None], (FunnelConfig(1), 2)])
def test_stages_that_are_none(funnel):
  with pytest.raises(ValueError, match="expected a FunnelConfig"):
    parse_funnel(funnel)


@pytest.mark.parametrize(
  "funnel,stride",
  [
    ("off", 1),
    ("start=1,stride=3", 3),
    ("start=0,stride=3+start=2,stride=4", 12),
    ("start=0,stride=3+start=2,stop=4,stride=4+start=4,stride=2", 12),
    ("start=0,stop=2,stride=4+start=2,stride=6", 12),
    ("start=0,stop=2,stride=4+start=1,stop=2,stride=2+start=3,stride=3", 24),
    ("start=0,stride=2+start=1,stride=2+start=2,stride=2", 8),
  ],
)
def test_total_stride(funnel, stride):
  stages = resolve_funnel(funnel, 6)
  assert total_stride(stages) == stride
  # By its definition: every stage's groups begin anew, whatever is around it.
  for stage in stages:
    around = [s for s in stages if s.start <= stage.start < s.stop]
    assert stride % math.prod(s.stride for s in around) == 0


def test_what_needs_every_token_back():
  check_recovers(resolve_funnel("start=1", 6), "a tagger")
  check_recovers((), "a tagger")
  with pytest.raises(
    ValueError, match="recover='none' leaves .* but a tagger needs a state"
  ):
    check_recovers(
      resolve_funnel("start=1,stop=2+start=3,recover=none", 6), "a tagger"
    )


@pytest.mark.parametrize(
  "changes,message",
  [
    (dict(num_layers=0), r"model.num_layers=0: expected an integer from 1"),
    (dict(num_kv_heads=3), r"num_heads=4 must be a multiple of"),
    (dict(head_dim=7), r"head_dim=7: rotary embeddings need an even one"),
    (dict(attn_softcap=0.0), r"attn_softcap=0.0: expected a number > 0"),
    (dict(final_softcap=math.inf), r"final_softcap=inf: expected a number > 0"),
    (dict(rope_base="x"), r"rope_base='x': expected a number > 0"),
    (dict(norm_eps=True), r"norm_eps=True: expected a number > 0"),
    (dict(query_pre_attn_scalar=10**400), r"pre_attn_scalar=1000"),
    (dict(post_norms=None), r"post_norms=None: expected a bool"),
    (dict(attention_pattern=3), r"attention_pattern=3: expected a tuple"),
    (dict(query_pre_attn_scalar=-1.0), r"query_pre_attn_scalar=-1.0"),
    (dict(attention_pattern=("sliding",)), r"attention_pattern='sliding'"),
    (dict(attention_pattern=()), r"attention_pattern is empty"),
    (dict(dtype="fp32"), r"model.dtype='fp32': expected one of"),
    (dict(kernel="flash"), r"model.kernel='flash': expected one of"),
    (dict(remat="all"), r"model.remat='all': expected one of"),
    (dict(window=0), r"model.window=0"),
    (dict(hidden=3), r"has no field \['hidden'\]"),
    (dict(norm_offset=0.5), r"model.norm_offset=0.5: expected one of"),
    (dict(activation="relu"), r"model.activation='relu': expected one of"),
    (dict(embed_scale=0), r"model.embed_scale=0.0: expected a number > 0"),
    (dict(local_rope_base=-1.0), r"model.local_rope_base=-1.0"),
    (dict(tied=1), r"model.tied=1: expected a bool"),
    (dict(qk_norm="no"), r"model.qk_norm='no': expected a bool"),
    (dict(attention_bias=0), r"model.attention_bias=0: expected a bool"),
    (dict(rope_scaling="linear"), r"rope_scaling='linear': expected a Rope"),
    (
      dict(rope_scaling=dict(kind="yarn", factor=2.0)),
      r"rope_scaling.kind='yarn': expected one of",
    ),
    (
      dict(rope_scaling=dict(kind="linear", factor=0.0)),
      r"rope_scaling.factor=0.0: expected a number > 0",
    ),
  ],
)
def test_model_fields(changes, message):
  with pytest.raises(ValueError, match=message):
    TransformerConfig.preset("tiny", **changes)


def test_models_are_read_from_config_dicts():
  for preset in ("tiny", "llama3.1_8b"):
    config = TransformerConfig.preset(preset)
    values = ml_collections.ConfigDict(config.to_dict())
    assert TransformerConfig.from_dict(values) == config


def test_unknown_preset():
  with pytest.raises(ValueError, match="preset='gemma3': expected one of"):
    TransformerConfig.preset("gemma3")


@pytest.mark.parametrize("name", PRESETS)
def test_presets_round_trip(name):
  config = TransformerConfig.preset(name)
  values = config.to_dict()
  values["attention_pattern"] = list(values["attention_pattern"])  # As JSON.
  assert TransformerConfig.from_dict(values) == config


def test_local_layers_come_first():
  config = TransformerConfig.preset("gemma2_2b")
  assert config.attention_kinds == ("local", "global") * 13
  assert config.layers[0].window == 4096
  assert config.layers[1].window is None
  assert set(TransformerConfig.preset("gemma1_7b").attention_kinds) == {
    "global"
  }


def test_a_layer_has_its_own_rotation():
  scaling = dict(kind="linear", factor=8.0)
  config = TransformerConfig.preset(
    "tiny", local_rope_base=1e4, rope_base=1e6, rope_scaling=scaling
  )
  scaling = RopeScaling("linear", 8.0)
  assert config.layers == (LayerSpec(8, 1e4), LayerSpec(None, 1e6, scaling)) * 2
  assert TransformerConfig.from_dict(config.to_dict()) == config


def test_query_scales_that_others_get_wrong():
  scalars = {
    name: TransformerConfig.preset(name).query_pre_attn_scalar
    for name in PRESETS
  }
  assert scalars["gemma2_9b"] == 256
  assert scalars["gemma2_27b"] == 144


def test_configs_are_frozen():
  with pytest.raises(dataclasses.FrozenInstanceError):
    FunnelConfig(1).start = 2
  with pytest.raises(dataclasses.FrozenInstanceError):
    TransformerConfig.preset("tiny").window = 3
