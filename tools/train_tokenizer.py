"""Train a tokenizer: `python tools/train_tokenizer.py ...` is `opt-megatron train-tokenizer ...` (see --help)."""

import sys

from opt_megatron.cli import main

if __name__ == "__main__":
    main(["train-tokenizer", *sys.argv[1:]])
