#!/usr/bin/env bash
# From a fresh clone to a passing test suite: installs with the test extra, then runs every test.
#
#   bash run_scripts/test.sh [arguments for pytest]
#
# Needs: Python 3.11 or later, a network for the first run, two cores, 8 GiB of memory.
set -euo pipefail
source "$(dirname "$0")/environment.sh"
prepare "[test]"
cd "$ROOT"
python -m pytest "$@"
