"""Ranks and process groups: their context, which layouts fit a model, collectives, and Megatron-core's patches."""
