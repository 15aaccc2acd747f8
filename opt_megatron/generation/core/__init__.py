"""The engine: scheduling, the KV cache, and the model passes that one rank leads."""
