"""Checkpoints: one table of parameters, one lazy reader per format, and what is built on them.

Canonical tensors carry Hugging Face's names under `model.decoder.` and are whole. A reader presents any
format as canonical tensors; `table.py` says how a Megatron rank's parameters are cut out of them.
"""
