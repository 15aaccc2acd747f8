"""Pre-train or fine-tune: `torchrun tools/train.py ...` runs `opt-megatron train ...` on several ranks (see --help)."""

import sys

from opt_megatron.cli import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
