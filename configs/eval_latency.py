"""Latency, measured beside ideal, against the same model with no funnel.

  python eval.py --config=configs/eval_latency.py
  python eval.py --config=configs/eval_latency.py:gemma2_2b
  python eval.py --config=configs/eval_latency.py --config.lengths="(256,)"

What follows the colon is a preset of gemma_funnel/config.py; "bench" without.
Weights are random unless a checkpoint is named: time does not depend on them.
Expect the measured reduction near the ideal one without the head, and lower
where memory and not arithmetic is the limit (small batches on an accelerator).
Generating, a funnel saves reading weights too: tokens cost less at any batch
size.
"""

from ml_collections import config_dict

from gemma_funnel.config import TransformerConfig

_SMALL = ("bench", "quickstart", "tiny")  # Others are of published sizes.


def get_config(preset: str = "bench") -> config_dict.ConfigDict:
  """The configuration of a latency measurement of a preset."""
  full_size = preset not in _SMALL
  dtypes = dict(param_dtype="bfloat16", dtype="bfloat16") if full_size else {}
  model = TransformerConfig.preset(preset, **dtypes)
  lengths = (512, 1024, 2048, 4096, 8192) if full_size else (1024, 2048, 4096)
  lengths = tuple(n for n in lengths if n <= model.max_length)

  config = config_dict.ConfigDict()
  config.evaluator = "latency"

  # What is measured. "off" is always measured, as what to compare with.
  config.funnels = ("start=3,stride=2" if full_size else "start=2,stride=2",)
  config.batch_sizes = (1, 8) if full_size else (1,)
  config.lengths = lengths or (model.max_length,)
  # Tokens after BOS that a funnel of reduce=context drops, as demonstrations.
  config.context_length = 0
  config.causal = True
  # False: hidden states only. True: logits of all positions too.
  config.head = (False, True)
  # Whether local and global layers are compared too, in a table of their own.
  config.layer_kinds = len(set(model.attention_pattern)) > 1

  # Generation: prompts of these lengths, and tokens one by one after them, all
  # rows in step. new_tokens=0 leaves it out; an encoder (causal=False) must.
  config.decode = config_dict.ConfigDict()
  config.decode.batch_sizes = (1, 8) if full_size else (1,)
  config.decode.prompts = (min(256, model.max_length // 2),)
  config.decode.context_length = 0  # Of each prompt, as above.
  config.decode.new_tokens = min(128, model.max_length // 2 - 1)

  # How. Each round runs every variant once, in an order of its own.
  config.warmup = 2
  config.repeats = 9
  config.seed = 0

  # A checkpoint folder to take the model from: sizes are then the checkpoint's,
  # and of `model` the dtypes, kernel, scan_layers and remat are used.
  config.checkpoint = config_dict.placeholder(str)
  config.model = config_dict.ConfigDict(
    {
      key: config_dict.placeholder(float)
      if value is None and key != "rope_scaling"
      else value
      for key, value in model.to_dict().items()
    }
  )

  config.out = "runs/latency"
  return config
