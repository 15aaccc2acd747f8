"""Convert a checkpoint to another format or layout: the same as `opt-megatron convert` (see --help)."""

import sys

from opt_megatron.cli import main

if __name__ == "__main__":
    main(["convert", *sys.argv[1:]])
