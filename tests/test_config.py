"""Every mistake of configuration is a ValueError that names the field."""

import dataclasses

import pytest

from gemma_funnel.config import PRESETS, FunnelConfig, GemmaConfig


@pytest.mark.parametrize(
  "fields,message",
  [
    (dict(start=-1), r"funnel.start=-1: expected an integer >= 0"),
    (dict(start=1.5), r"funnel.start=1.5"),
    (dict(start=3, stop=3), r"funnel.start=3 must be below funnel.stop=3"),
    (dict(start=4, stop=2), r"funnel.start=4 must be below funnel.stop=2"),
    (dict(start=1, stride=0), r"funnel.stride=0: expected an integer >= 1"),
    (dict(start=1, stride=True), r"funnel.stride=True"),
    (dict(start=1, pool="median"), r"funnel.pool='median': expected one"),
    (dict(start=1, recover="avg"), r"funnel.recover='avg': expected one"),
  ],
)
def test_funnel_fields(fields, message):
  with pytest.raises(ValueError, match=message):
    FunnelConfig(**fields)


def test_funnel_must_fit_the_depth():
  assert FunnelConfig(1).resolve(4) == FunnelConfig(1, 4)
  assert FunnelConfig(1, 3).resolve(4) == FunnelConfig(1, 3)
  with pytest.raises(ValueError, match="funnel.stop=5 is past the model's 4"):
    FunnelConfig(1, 5).resolve(4)
  with pytest.raises(ValueError, match="must be below funnel.stop=4"):
    FunnelConfig(4).resolve(4)


@pytest.mark.parametrize(
  "funnel",
  [
    FunnelConfig(2),
    FunnelConfig(0, 3, 4),
    FunnelConfig(1, 7, 3, "mean", "add"),
  ],
)
def test_funnel_strings_round_trip(funnel):
  assert FunnelConfig.parse(str(funnel)) == funnel


@pytest.mark.parametrize("text", ["off", "", " off ", None])
def test_off_is_no_funnel(text):
  assert FunnelConfig.parse(text) is None


@pytest.mark.parametrize(
  "text,message",
  [
    ("2", "'2' is not key=value"),
    ("start=", "'start=' is not key=value"),
    ("stride=2", "start is missing"),
    ("start=1,start=2", "start is given twice"),
    ("start=1,strid=2", r"has no field \['strid'\]"),
    ("start=one", "funnel.start='one': expected an integer"),
  ],
)
def test_funnel_strings_that_are_none(text, message):
  with pytest.raises(ValueError, match=message):
    FunnelConfig.parse(text)


@pytest.mark.parametrize(
  "changes,message",
  [
    (dict(num_layers=0), r"model.num_layers=0: expected an integer >= 1"),
    (dict(num_kv_heads=3), r"num_heads=4 must be a multiple of"),
    (dict(head_dim=7), r"head_dim=7: rotary embeddings need an even one"),
    (dict(attn_softcap=0.0), r"attn_softcap=0.0: expected a number > 0"),
    (dict(query_pre_attn_scalar=-1.0), r"query_pre_attn_scalar=-1.0"),
    (dict(attention_pattern=("sliding",)), r"attention_pattern='sliding'"),
    (dict(attention_pattern=()), r"attention_pattern is empty"),
    (dict(dtype="fp32"), r"model.dtype='fp32': expected one of"),
    (dict(kernel="flash"), r"model.kernel='flash': expected one of"),
    (dict(remat="all"), r"model.remat='all': expected one of"),
    (dict(window=0), r"model.window=0"),
    (dict(hidden=3), r"has no field \['hidden'\]"),
  ],
)
def test_model_fields(changes, message):
  with pytest.raises(ValueError, match=message):
    GemmaConfig.preset("tiny", **changes)


def test_unknown_preset():
  with pytest.raises(ValueError, match="preset='gemma3': expected one of"):
    GemmaConfig.preset("gemma3")


@pytest.mark.parametrize("name", PRESETS)
def test_presets_round_trip(name):
  config = GemmaConfig.preset(name)
  values = config.to_dict()
  values["attention_pattern"] = list(values["attention_pattern"])  # As JSON.
  assert GemmaConfig.from_dict(values) == config


def test_local_layers_come_first():
  config = GemmaConfig.preset("gemma2_2b")
  assert config.attention_kinds == ("local", "global") * 13
  assert config.window_of(0) == 4096
  assert config.window_of(1) is None
  assert set(GemmaConfig.preset("gemma1_7b").attention_kinds) == {"global"}


def test_query_scales_that_others_get_wrong():
  scalars = {
    name: GemmaConfig.preset(name).query_pre_attn_scalar for name in PRESETS
  }
  assert scalars["gemma2_9b"] == 256
  assert scalars["gemma2_27b"] == 144


def test_configs_are_frozen():
  with pytest.raises(dataclasses.FrozenInstanceError):
    GemmaConfig.preset("tiny").window = 3
