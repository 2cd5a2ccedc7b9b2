r"""Tokenizes a corpus once, for many runs to read.

  python -m gemma_funnel.data.tokenize --config=configs/tokenize.py \
    --config.source='texts/*.jsonl' --config.tokenizer=tokenizer.model \
    --config.out=tokens

Runs then read it with --config.data.source=tokens and
--config.data.tokenizer=tokens/tokenizer.model, and get the batches that the
text would give. Interrupted, the same command goes on after the last whole
shard. Expect files of two or four bytes a token.
"""

from ml_collections import config_dict


def get_config() -> config_dict.ConfigDict:
  return config_dict.create(
    # What a run's data.source can be, but for a tokenized folder.
    source="stdlib",
    # The key of the text in a JSON object, or its column.
    text_key="text",
    # Of rows that cannot be read: "skip" leaves them out, or "error".
    on_bad="skip",
    # A SentencePiece model or a tokenizer.json, such as the tokenizer.model of
    # a run. Required.
    tokenizer=config_dict.placeholder(str),
    # The folder to write, which is not there yet. Required.
    out=config_dict.placeholder(str),
    # Files that the ids are spread over.
    shards=8,
    # Processes that tokenize; 0 is none but this one.
    num_workers=0,
  )
