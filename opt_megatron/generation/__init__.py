"""Generation: sampling as pure functions, a KV cache that knows no text, and an engine that one rank leads."""
