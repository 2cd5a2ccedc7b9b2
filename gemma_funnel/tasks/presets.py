"""Configurations of tasks by name."""

from ml_collections import config_dict

from gemma_funnel import tasks

GLUE = ("cola", "sst2", "mrpc", "qqp", "stsb", "mnli", "qnli", "rte", "wnli")
CONLL2003 = "conll2003"
# A set of minimal pairs by its columns (Warstadt et al., TACL 2020).
BLIMP = "blimp"
PRESETS = (*tasks.FORMATS, *GLUE, CONLL2003, BLIMP)


def preset(name: str) -> config_dict.ConfigDict:
  """The configuration of a task; what it leaves open are files or folders.

  Raises:
    ValueError: no preset of that name.
  """
  config = tasks.default_config()
  if name in tasks.FORMATS:
    config.format = name
  elif name in GLUE or name == CONLL2003:
    config.format = "tfds"
    config.dataset = name if name == CONLL2003 else f"glue/{name}"
  elif name == BLIMP:
    config.update(kind="choice", choices="sentence_good,sentence_bad")
    config.group = "UID"
  else:
    raise ValueError(f"task {name!r}: expected one of {list(PRESETS)}")
  if name in ("code_tags", "code_packages"):
    config.update(max_train=2000, max_dev=300, max_test=600)
  return config
