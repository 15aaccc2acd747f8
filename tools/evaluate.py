"""Evaluate a model: `python tools/evaluate.py ...` is `opt-megatron evaluate ...` (see --help)."""

import sys

from opt_megatron.cli import main

if __name__ == "__main__":
    main(["evaluate", *sys.argv[1:]])
