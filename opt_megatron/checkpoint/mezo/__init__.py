"""MeZO's updates of weights (arXiv:2305.17333), which a log of a few bytes a step determines."""
