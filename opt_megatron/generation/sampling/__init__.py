"""Sampling: the options of a request, the logits processors, and the choice of a token."""
