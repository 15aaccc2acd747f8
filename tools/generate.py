"""Generate text: `torchrun tools/generate.py ...` runs `opt-megatron generate ...` on several ranks (see --help)."""

import sys

from opt_megatron.cli import main

if __name__ == "__main__":
    main(["generate", *sys.argv[1:]])
