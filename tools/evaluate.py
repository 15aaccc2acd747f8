"""Evaluate a model: `torchrun tools/evaluate.py ...` runs `opt-megatron evaluate ...` on several ranks (see --help)."""

import sys

from opt_megatron.cli import main

if __name__ == "__main__":
    main(["evaluate", *sys.argv[1:]])
