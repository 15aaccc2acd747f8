"""Serve a model over HTTP: `torchrun tools/serve.py ...` is `opt-megatron serve ...` on several ranks (see --help)."""

import sys

from opt_megatron.cli import main

if __name__ == "__main__":
    main(["serve", *sys.argv[1:]])
