"""Decoding: the state of each sequence, the search methods, and the text that tokens become."""
