"""Turn a Hugging Face checkpoint into a backbone and one package per expert, and read them again.

`pack` writes a packed folder, `packed_model` reads it, `backbone` builds the model without its experts, `source`
finds the packed folder behind a name. Knows nothing of how or where the functions run.
"""
