"""Pre-train or fine-tune: `python tools/train.py ...` is `opt-megatron train ...` (see --help)."""

import sys

from opt_megatron.cli import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
