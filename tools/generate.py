"""Continue prompts: `python tools/generate.py ...` is `opt-megatron generate ...` (see --help)."""

import sys

from opt_megatron.cli import main

if __name__ == "__main__":
    main(["generate", *sys.argv[1:]])
