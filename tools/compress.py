"""Smooth, prune or quantise weights: `torchrun tools/compress.py ...` runs `opt-megatron compress ...` (see --help)."""

import sys

from opt_megatron.cli import main

if __name__ == "__main__":
    main(["compress", *sys.argv[1:]])
