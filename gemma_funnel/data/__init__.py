"""Text in, packed batches of tokens out: corpora, tokenizer, packing, grain.

Nothing is imported here: grain and SentencePiece load with the modules that
need them.
"""
