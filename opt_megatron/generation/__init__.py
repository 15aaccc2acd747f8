"""Generation: sampling, decoding, and the engine that runs them; each imports only those before it."""
