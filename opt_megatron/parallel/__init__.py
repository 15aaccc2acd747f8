"""Ranks and process groups: their context, the checks of a layout, collectives, and the patches of Megatron-core."""
