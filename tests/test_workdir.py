"""The folder of a run: whose it is, and what may change while it goes on."""

import json
import os

import pytest
import tiny_run

from gemma_funnel import config_file
from gemma_funnel.config import TransformerConfig
from gemma_funnel.training import pretrain, workdir


def _config(workdir, **changes):
  return tiny_run.make_config(workdir, "corpus.txt", **changes)


def test_a_workdir_is_claimed_once(tmp_path):
  config = _config(tmp_path / "run")
  workdir.init_workdir(config)
  written = json.loads((tmp_path / "run" / "config.json").read_text())
  assert written == json.loads(config.to_json())
  workdir.init_workdir(config)
  assert os.listdir(tmp_path / "run") == ["config.json"]


@pytest.mark.parametrize(
  "changes",
  [
    {"steps": 13},
    {"batch_size": 16},
    {"length": 64},
    {"seed": 1},
    {"funnel": "off"},
    {"z_loss": 0.0},
    {"data.lanes": 2},
    {"model.dtype": "bfloat16"},
    {"optimizer.b2": 0.9},
    {"data.seed": 1},
    {"data.tokenizer": "x"},
  ],
  ids=str,
)
def test_a_workdir_of_another_run_is_refused(changes, tmp_path):
  workdir.init_workdir(_config(tmp_path))
  (tmp_path / "tokenizer.model").write_text("")
  config = _config(tmp_path, **changes)
  with pytest.raises(ValueError) as error:
    workdir.init_workdir(config)
  (key,) = changes
  text = str(error.value)
  assert f"{key}: " in text and text.count(" / ") == 2 and "\n" not in text


@pytest.mark.parametrize(
  ("funnel", "same"),
  [
    ("start=1,stride=2", "start=1"),
    ("start=1,stride=2", "start=1,stride=2,recover=average"),
    ("start=1,stride=2", "stride=2,reduce=mean,start=1"),
    ("start=1,stride=2", " start = 1 , stride=2 "),
    ("start=1,stride=2", "start=1,stop=2,stride=2,position=last"),
    ("start=1,stride=2", "start=1,keep_first=false,pool_query_only=false"),
    ("start=1,stride=2", "start=1,pool=mean"),
    ("start=0,stop=1+start=1", "start=1,stop=2+start=0,stop=1,stride=2"),
    ("off", ""),
    ("off", " off "),
  ],
)
def test_a_funnel_spelled_otherwise_is_the_same_run(funnel, same, tmp_path):
  workdir.init_workdir(
    _config(tmp_path, funnel=funnel, funnel_sampled=(funnel, "off"))
  )
  (tmp_path / "checkpoints").mkdir()
  workdir.init_workdir(
    _config(tmp_path, funnel=same, funnel_sampled=(same, ""))
  )


def test_a_preset_is_the_model_written_out(tmp_path):
  config = _config(tmp_path)
  config.model.update(TransformerConfig.preset("tiny").to_dict())
  workdir.init_workdir(config)
  (tmp_path / "checkpoints").mkdir()
  config = _config(tmp_path)
  config.model.kernel = "auto"  # How a model runs is no part of a preset.
  config_file.set_key(config, "model", "tiny")
  workdir.init_workdir(config)


def test_what_changes_rounding_at_most_may_change(tmp_path):
  workdir.init_workdir(_config(tmp_path / "run"))
  (tmp_path / "run" / "checkpoints").mkdir()
  changes = {
    "log_every": 7,
    "eval_every": 3,
    "checkpoint_every": 5,
    "keep": 1,
    "tensorboard": True,
    "latency.repeats": 3,
    "heldout_documents": 9,
    "eval_documents": 3,
    "mesh.fsdp": 2,
    "accumulate": 2,
    "model.remat": "block",
    "loss_chunk": 8,
    "data.num_workers": 1,
    "watchdog_minutes": 3.0,
    "keep_best": 1,
    "rollback.factor": 2.0,
  }
  workdir.init_workdir(_config(tmp_path / "run", **changes))
  moved = (tmp_path / "run").rename(tmp_path / "moved")
  workdir.init_workdir(_config(moved))
  # Of data whose place is a number of rows.
  with pytest.raises(ValueError, match="batch_size"):
    workdir.init_workdir(_config(moved, batch_size=16))
  workdir.init_workdir(_config(moved, batch_size=16), free=("batch_size",))


def test_workdirs_that_cannot_be_claimed(tmp_path):
  file = tmp_path / "file"
  file.write_text("")

  def hold(path):
    with workdir.hold(str(path)):
      pass

  with pytest.raises(ValueError, match="is a file"):
    hold(file)
  with pytest.raises(ValueError, match="cannot be written to: Not a dir"):
    hold(file / "run")
  for name in ("a[1]", "a]", "a*/run", "what?"):
    with pytest.raises(ValueError, match="checkpoints below it could not be"):
      hold(tmp_path / name)
    assert not (tmp_path / name).exists()
  for content in ("{", "\0\0", "[]"):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(
      ValueError, match=r"config\.json (cannot be read|holds a)"
    ):
      workdir.init_workdir(_config(tmp_path))
  (tmp_path / "config.json").unlink()
  for name in ("checkpoints", "tokenizer.model"):
    (tmp_path / name).mkdir()
    with pytest.raises(ValueError, match=r"but no config\.json"):
      workdir.init_workdir(_config(tmp_path))
    (tmp_path / name).rmdir()


def test_a_call_that_failed_early_may_be_corrected(tmp_path):
  workdir.init_workdir(_config(tmp_path, **{"data.source": "wrong"}))
  workdir.init_workdir(_config(tmp_path))
  written = json.loads((tmp_path / "config.json").read_text())
  assert written["data"]["source"] == "corpus.txt"


def _as_version_0_1(folder, funnel, sampled=()):
  """Rewrites a run's configuration as version 0.1 would have written it."""
  config = json.loads((folder / "config.json").read_text())
  for name in (
    "activation",
    "norm_offset",
    "embed_scale",
    "tied",
    "qk_norm",
    "attention_bias",
    "local_rope_base",
    "rope_scaling",
  ):
    del config["model"][name]
  config |= {"funnel": funnel, "funnel_sampled": list(sampled)}
  (folder / "config.json").write_text(json.dumps(config))
  (folder / "checkpoints").mkdir(exist_ok=True)


def test_a_run_of_the_previous_version_goes_on(tmp_path):
  sampled = ("off", "start=1,stride=4,reduce=strided")
  config = _config(tmp_path, funnel_sampled=sampled)
  workdir.init_workdir(pretrain.resolve(config).config)
  old = ("off", "start=1,stride=4,pool=every")
  _as_version_0_1(tmp_path, "start=1,stride=2,pool=mean", old)
  workdir.init_workdir(pretrain.resolve(config).config)
  config.funnel = "start=1,stride=4"
  with pytest.raises(ValueError, match="funnel: 'start=1,stride=2,pool=mean'"):
    workdir.init_workdir(pretrain.resolve(config).config)
  config.funnel, config.model.qk_norm = "start=1,stride=2", True
  with pytest.raises(ValueError, match="model.qk_norm: None / True"):
    workdir.init_workdir(pretrain.resolve(config).config)


@pytest.mark.parametrize("what", ["pool=attention", "recover=gate"])
def test_what_a_funnel_learned_in_the_previous_version(what, tmp_path):
  funnel = f"start=1,stride=2,{what}"
  config = pretrain.resolve(_config(tmp_path, funnel=funnel)).config
  workdir.init_workdir(config)
  _as_version_0_1(tmp_path, funnel)
  before = sorted(tmp_path.rglob("*"))
  with pytest.raises(ValueError, match=f"version 0.1.*{what}.*init_from"):
    workdir.init_workdir(config)
  assert sorted(tmp_path.rglob("*")) == before
