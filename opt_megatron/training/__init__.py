"""Training: data, objective, optimizer, loop, save and resume."""
