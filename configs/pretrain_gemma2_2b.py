r"""Pretrains a funnelled Gemma 2 of 2B, 9B or 27B parameters, on a pod.

  python train.py --config=configs/pretrain_gemma2_2b.py --distributed=auto \
    --config.workdir=gs://BUCKET/run --config.data.source='gs://BUCKET/*.array_record' \
    --config.data.tokenizer=tokenizer.model
  python tpu/plan.py --config=configs/pretrain_gemma2_2b.py --topology=v5p:4x4x4
  python tpu/plan.py --config=configs/pretrain_gemma2_2b.py:gemma2_9b \
    --topology=v5p:4x4x4 --search

docs/pods.md walks through a first run. Expect what tpu/plan.py says of memory, and
at most its MFU. Text is made ready by python -m
gemma_funnel.data.tokenize, with the tokenizer of Gemma.
"""

import pathlib
import runpy

import ml_collections

from gemma_funnel.config import TransformerConfig


def get_config(size: str = "gemma2_2b") -> ml_collections.ConfigDict:
  """The configuration of a size: "gemma2_2b", "gemma2_9b" or "gemma2_27b"."""
  path = pathlib.Path(__file__).with_name("quickstart.py")
  config = runpy.run_path(str(path))["get_config"]()
  config.workdir = f"runs/{size}"
  config.model.update(
    # Weights are float32, and bfloat16 where they are multiplied.
    TransformerConfig.preset(size, dtype="bfloat16", remat="block").to_dict()
  )
  config.update(
    steps=100_000,
    batch_size=256,
    length=8192,
    loss_chunk=1024,
    # The first third of the layers sees all tokens, as most of what a funnel
    # costs is lost early; recovered by the average.
    funnel=f"start={config.model.num_layers // 3},stride=2,recover=average",
    eval_documents=64,
    heldout_documents=512,
    log_every=50,
    eval_every=2000,
    checkpoint_every=2000,
    checkpoint_minutes=30.0,
    keep=3,
    keep_period=20_000,
    on_nonfinite="skip",
    watchdog_minutes=30.0,
  )
  config.mesh.update(data=1, fsdp=-1)
  config.data.update(lanes=256, num_workers=0)
  config.optimizer.update(
    learning_rate=3e-4,
    warmup_steps=2000,
    schedule="wsd",
    decay_fraction=0.2,
    final_fraction=0.0,
  )
  config.rollback.factor = 2.0
  config.latency.update(repeats=0)
  return config
