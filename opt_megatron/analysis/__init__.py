"""Interpretability methods that stand on `opt_megatron.OPT`: the logit lens."""
