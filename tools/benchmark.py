"""Compare the speed of this project with transformers, CTranslate2 and the memory bandwidth limit (see --help)."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # benchmarks/ is not part of the installed package

from benchmarks.command import main

if __name__ == "__main__":
    main()
