"""Trains a small funnelled Gemma 2 on the standard library's sources.

  python train.py --config=configs/quickstart.py

On two CPU cores it takes under 6 minutes, and ends with the held-out bits per
byte and the latency that the funnel saved. Expect about 1.8 bits per byte,
where token frequencies alone allow 2.8, and about 40% less latency.
"""

import ml_collections
from ml_collections import config_dict

from gemma_funnel import lora
from gemma_funnel.config import TransformerConfig
from gemma_funnel.data import pipeline
from gemma_funnel.training import optimizer, spec


def get_config() -> ml_collections.ConfigDict:
  return config_dict.create(
    workdir="runs/quickstart",
    seed=0,
    steps=280,
    batch_size=8,
    length=256,
    model=TransformerConfig.preset("quickstart").to_dict(),
    # Whatever gemma_funnel.load reads, to start from instead of afresh: its
    # sizes and tokenizer are used, and of `model` dtypes, kernel and the like.
    init_from=config_dict.placeholder(str),
    # "next_token"; "masked" tokens, read in both directions; or "distill", of
    # init_from without a funnel, into the same weights with one.
    objective="next_token",
    mask_rate=0.15,
    # Weights of the terms: KL of logits, match of hidden states, next token.
    distill=dict(temperature=1.0, logits=1.0, hidden=1.0, tokens=0.0),
    # Several stages are joined by "+"; "off" is no funnel.
    funnel="start=2,stride=2,recover=average",
    # The first step that is funnelled; the ones before run plain.
    funnel_from=0,
    # Funnels of which each step draws one, so that one checkpoint serves all
    # of them, such as ("off", "start=2,stride=2", "start=4,stride=4").
    funnel_sampled=(),
    data=pipeline.default_config(),
    # Its schedule, masks, averages and rounding: see there.
    optimizer=optimizer.default_config(
      learning_rate=3e-3, warmup_steps=30, final_fraction=0.1
    ),
    # LoRA: with a rank, factors beside the layers' matrices that `target` is
    # found in are trained, and what the funnel learns; init_from stays as it
    # is, or in base_dtype "int8", "int4" or "nf4" (QLoRA). An optimizer's
    # learning rate is then higher, such as 2e-4 for a 2B.
    lora=lora.default_config(),
    z_loss=1e-4,
    # Positions of a row that have logits at one time.
    loss_chunk=128,
    # Held-out documents measured while training, and at the end.
    eval_documents=2,
    heldout_documents=16,
    # Keys of training.spec.LoopSpec, and the axes of the mesh.
    **spec.loop_config(eval_every=140, checkpoint_every=70),
    # The latency report at the end; 0 repeats is none.
    latency=dict(batch_size=8, length=1024, repeats=9),
  )
