r"""A task put to a checkpoint, with several funnels.

  python eval.py --config=configs/eval_task.py --config.checkpoint=RUN \
    --config.task....=...
  python eval.py --config=configs/eval_task.py:blimp --config.checkpoint=RUN \
    --config.task.test=blimp.jsonl
  python eval.py --config=configs/eval_task.py --config.checkpoint=RUN \
    --config.funnels="('trained', 'off', 'start=2,stride=3')"

RUN is the folder of a training run, or whatever gemma_funnel.load reads, with
--config.tokenizer where it has none. A language model answers by itself; a run
of configs/finetune.py, or the folder around its seeds, is measured on the test
split of its own task unless --config.task names another. Expect a model to be
best with the funnel it was trained with, and one that has not learned the task
at chance with all.
"""

from ml_collections import config_dict

from gemma_funnel import tasks


def get_config(task: str = "table") -> config_dict.ConfigDict:
  """The configuration of a task, by a name of `tasks.PRESETS`."""
  config = config_dict.ConfigDict()
  config.evaluator = "task"

  # A training run, or whatever gemma_funnel.load reads. Required.
  config.checkpoint = config_dict.placeholder(str)
  # A SentencePiece model or a tokenizer.json, for a checkpoint that is no run
  # and has none beside it.
  config.tokenizer = config_dict.placeholder(str)
  # Unset is as trained, and float32 for a checkpoint that is no run.
  config.dtype = config_dict.placeholder(str)

  # "trained" is the checkpoint's own; others as "start=2,stride=2" or "off".
  config.funnels = ("trained", "off")

  # Of kind "choice", "generation" or "perplexity"; of a fine-tuned run, which
  # needs none, one with the same labels.
  config.task = tasks.preset(task)
  config.split = "test"
  # A sample of the split; unset is all of it.
  config.max_examples = config_dict.placeholder(int)
  config.split_seed = 0  # Of samples, of few_shot's too.

  # Unset is 8, or a fine-tuned run's.
  config.batch_size = config_dict.placeholder(int)
  # Tokens that a pass is given at most; of a longer prompt the beginning is
  # cut. Unset is the model's max_length. This and what follows, but for `out`,
  # is not of fine-tuned runs.
  config.max_length = config_dict.placeholder(int)

  # Choice and generation: how many examples of the train split, a sample, come
  # before each prompt, and what they and the prompt look like. A space at a
  # prompt's end goes with the choice: "{prompt} " for choices without one.
  config.few_shot = 0
  config.shot_format = "{prompt}{answer}\n\n"
  config.prompt_format = "{prompt}"

  # Generation: greedy, until EOS or one of the stop strings. The answer is what
  # the pattern's first group matches, such as r"#### (-?[0-9.,]+)"; unset, all.
  config.max_new_tokens = 128
  config.stop = ()
  config.answer_pattern = config_dict.placeholder(str)
  config.lower_case = False

  config.out = config_dict.placeholder(str)  # Unset is CHECKPOINT/eval.
  return config
