r"""Fine-tunes a checkpoint, with a head on it, on the labels of a task.

  python train.py --config=configs/finetune.py --config.init_from=RUN
  python train.py --config=configs/finetune.py:conll2003 \
    --config.init_from=CHECKPOINT --config.task.data_dir=TFDS
  python train.py --config=configs/finetune.py:table --config.init_from=RUN \
    --config.task.kind=classification --config.task.train=train.tsv \
    --config.task.test=test.tsv --config.task.text=text \
    --config.task.label=label

What follows the colon is a task: "code_tags" (without), "code_packages",
"table", "conll", "conll2003", or one of GLUE's nine (cola, sst2, mrpc, qqp,
stsb, mnli, qnli, rte, wnli). The last two kinds are TensorFlow Datasets.
Expect a table of test metrics by funnel, mean and deviation over seeds; on the
quickstart's run, code_tags ends far above what the most frequent tag reaches.
"""

import ml_collections
from ml_collections import config_dict

from gemma_funnel import lora, tasks
from gemma_funnel.config import TransformerConfig
from gemma_funnel.training import optimizer, spec


def get_config(task: str = "code_tags") -> ml_collections.ConfigDict:
  """The configuration of fine-tuning on a task."""
  return config_dict.create(
    workdir=f"runs/finetune_{task}",
    # Each seed is a run of its own: of head, dropout and the order of data.
    seeds=(0, 1, 2),
    # Whatever gemma_funnel.load reads; unset is a fresh model of these sizes.
    # With a checkpoint the sizes are its own.
    init_from=config_dict.placeholder(str),
    model=TransformerConfig.preset("quickstart").to_dict(),
    tokenizer=config_dict.placeholder(str),  # Unset is the checkpoint's.
    task=tasks.preset(task),
    # pool: "mean", "first", "last" or "attention". hidden: a tanh layer's width.
    head=dict(pool="mean", dropout=0.1, hidden=0),
    causal=False,
    # Unset is what the checkpoint was trained with.
    funnel=config_dict.placeholder(str),
    funnel_from=0,
    funnel_sampled=(),
    # What the result is measured with besides.
    eval_funnels=("off",),
    epochs=4.0,
    batch_size=32,
    # Tokens of a row at most, and what becomes of longer sentences of tagged
    # words: "truncate", or "window", which makes several rows of one.
    length=128,
    long="truncate",
    # "none", "balanced", or a number for each class, such as "1,2.5".
    class_weights="none",
    # Its schedule, masks, averages and rounding: see there.
    optimizer=optimizer.default_config(
      learning_rate=5e-4, b2=0.98, weight_decay=0.01
    ),
    # LoRA: with a rank, factors beside the layers' matrices that `target` is
    # found in are trained, and what the funnel learns; init_from stays as it
    # is, or in base_dtype "int8", "int4" or "nf4" (QLoRA). An optimizer's
    # learning rate is then higher, such as 2e-4 for a 2B.
    lora=lora.default_config(),
    # Evaluations without a better one that end the training; unset never does.
    # The weights of the best one are kept either way.
    patience=config_dict.placeholder(int),
    # Keys of training.spec.LoopSpec, and the axes of the mesh. It is
    # evaluated once an epoch if eval_every is unset, and saved each time.
    **spec.loop_config(
      eval_every=config_dict.placeholder(int),
      checkpoint_every=config_dict.placeholder(int),
      keep=1,
    ),
  )
