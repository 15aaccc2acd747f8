"""Interpretability methods that use `opt_megatron.OPT`: the logit lens."""
