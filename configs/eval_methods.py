r"""Every reduction of a prompt, untrained, at the same savings.

  python eval.py --config=configs/eval_methods.py
  python eval.py --config=configs/eval_methods.py:smollm2_135m
  python eval.py --config=configs/eval_methods.py --config.length=4096 \
    --config.max_bytes=66000

Needs the extra "weights". Each window's first tokens are a prompt, in which so
much is saved, and its last 256 are what is scored. Expect minutes a method on
two cores. Expect the selections by attention to cost least on both models, and
far less than pools; docs/methods.md has the table.
"""

from ml_collections import config_dict

from configs import eval_damage

# The saving is met by the start.
_METHODS = (
  "start=?,stride=2,recover=average",
  "start=?,stride=2,recover=delta",
  "start=?,stride=4,recover=delta",
  "start=?,stride=2,recover=delta,keys=first",
  "start=?,stride=2,recover=delta,keys=before",
  "start=?,stride=2,reduce=strided",
  "start=?,stride=2,reduce=strided,keys=before",
  "start=?,stride=2,reduce=boundary,threshold=?",
  "start=?,reduce=last_queries,keep=0.2",
  "start=?,reduce=last_queries,keep=0.5",
  "start=?,reduce=received,keep=0.2",
  "start=?,reduce=received,keep=0.5",
  "start=?,reduce=tail",
  "start=?,reduce=all,keys=none",
)


def get_config(model: str = "gemma3_270m") -> config_dict.ConfigDict:
  """The configuration for one of the models that come as packages."""
  config = eval_damage.get_config(model)
  config.funnels = _METHODS
  # Parts of a prompt's FLOPs, without the vocabulary head.
  config.savings = (0.25, 0.45, 0.6)
  config.length = 1024
  config.continuation = 256
  config.max_bytes = 34_000
  config.new_tokens = 0
  config.repeats = 5
  return config
