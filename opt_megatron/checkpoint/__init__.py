"""Checkpoints: opened, converted, compared and loaded into a model.

`formats/` reads and writes each format. A `Checkpoint` presents any of them as canonical tensors, which are whole
and have Hugging Face's names with the prefix `model.decoder.`; they are `storage/`'s lazy tensors, read block by
block. `parameter_mapping.py` says how the parameters of a Megatron rank are made of canonical tensors.
"""
