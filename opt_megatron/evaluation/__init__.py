"""Evaluation of a model: perplexity of texts, log-likelihoods of continuations, and lm-eval's tasks."""
