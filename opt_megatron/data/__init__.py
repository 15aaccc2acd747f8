"""Training data: from JSON lines to token files, and from token files to batches."""
