"""Convert JSON lines to indexed token files: `python tools/preprocess_data.py ...` is `opt-megatron preprocess ...` (see --help)."""

import sys

from opt_megatron.cli import main

if __name__ == "__main__":
    main(["preprocess", *sys.argv[1:]])
