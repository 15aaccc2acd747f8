"""Draw what each layer predicts: `torchrun tools/logit_lens.py ...` runs `opt-megatron logit-lens ...` (see --help)."""

import sys

from opt_megatron.cli import main

if __name__ == "__main__":
    main(["logit-lens", *sys.argv[1:]])
