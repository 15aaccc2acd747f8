"""How good a model is: perplexity of texts, log-likelihoods of continuations, and lm-eval's tasks."""
