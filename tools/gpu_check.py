"""Prove the CUDA paths on one GPU against transformers, and print what was measured as one JSON (see --help)."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # benchmarks/ is not part of the installed package

from benchmarks.gpu_check import main

if __name__ == "__main__":
    main()
