"""A model's tokenizer and chat template, read from the files that lie beside its weights.

The gateway encodes with it, the engine decodes with it, recordings from prompts do both. Needs neither torch nor
transformers.
"""
