"""Measure this project against transformers and CTranslate2, and the memory's limit (see --help)."""

from opt_megatron.benchmark.command import main

if __name__ == "__main__":
    main()
