"""Convert JSON lines to indexed token files: the same as `opt-megatron preprocess` (see --help)."""

import sys

from opt_megatron.cli import main

if __name__ == "__main__":
    main(["preprocess", *sys.argv[1:]])
