"""Decoding: the state of sequences, the searches, speculative decoding, and detokenization."""
