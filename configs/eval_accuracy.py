r"""Loss on held-out text, with the funnel that was trained and with others.

  python eval.py --config=configs/eval_accuracy.py --config.checkpoint=RUN
  python eval.py --config=configs/eval_accuracy.py --config.checkpoint=RUN \
    --config.funnels="('trained', 'off', 'start=2,stride=3')"

RUN is the folder of a training run. A Hugging Face folder does too, with
--config.tokenizer, --config.length and --config.data.heldout. Expect a model
to be best with the funnel it was trained with, and every one of them well below
the bits per byte of token frequencies alone ("unigram").
"""

from ml_collections import config_dict


def get_config() -> config_dict.ConfigDict:
  """The configuration of an evaluation on held-out text."""
  config = config_dict.ConfigDict()
  config.evaluator = "accuracy"

  # A training run, or whatever gemma_funnel.load reads. Required.
  config.checkpoint = config_dict.placeholder(str)
  # A SentencePiece model or a tokenizer.json, for a checkpoint that is no run
  # and has none beside it.
  config.tokenizer = config_dict.placeholder(str)

  # "trained" is the checkpoint's own; others as "start=2,stride=2" or "off".
  config.funnels = ("trained", "off")

  # Unset is as in the training run. All funnels see the same batches, so the
  # length has to be a multiple of every total stride.
  config.batch_size = config_dict.placeholder(int)
  config.length = config_dict.placeholder(int)
  config.max_documents = config_dict.placeholder(int)  # Unset is all of them.
  # Positions whose logits are in memory at one time.
  config.chunk = 512

  # Unset is as in the training run. A source without `heldout` is split as in
  # training, and its held-out part used; `heldout` names files to use whole.
  config.data = config_dict.ConfigDict()
  config.data.source = config_dict.placeholder(str)
  config.data.heldout = config_dict.placeholder(str)

  config.out = config_dict.placeholder(str)  # Unset is CHECKPOINT/eval.
  return config
