"""MeZO: fine-tuning by forward passes alone (arXiv:2305.17333)."""
