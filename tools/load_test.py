"""Send concurrent requests to a running server, measure latencies and compare its answers (see --help)."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # benchmarks/ is not part of the installed package

from benchmarks.load_test import main

if __name__ == "__main__":
    main()
