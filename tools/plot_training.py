"""Draw loss curves: `python tools/plot_training.py ...` is `opt-megatron plot-training ...` (see --help)."""

import sys

from opt_megatron.cli import main

if __name__ == "__main__":
    main(["plot-training", *sys.argv[1:]])
