"""Check a machine's GPUs: parity with transformers and the CPU, features, speed; JSON and table (see --help)."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # benchmarks/ is not part of the installed package

from benchmarks.check_gpu.command import main

if __name__ == "__main__":
    main()
