"""A model to look into: `OPT`, its hidden states, attention and hooks. README.md beside this file shows how."""

from .opt import OPT

__all__ = ["OPT"]
