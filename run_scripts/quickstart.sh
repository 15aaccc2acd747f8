#!/usr/bin/env bash
# From a fresh clone to text: installs, then generates with the embedded toy model on two ranks.
#
#   bash run_scripts/quickstart.sh "Once upon a time"
#
# Needs: Python 3.11 or later and a network for the first run. Two CPU cores are enough.
set -euo pipefail
source "$(dirname "$0")/environment.sh"
prepare ""
torchrun --standalone --nproc-per-node 2 "$ROOT/tools/generate.py" \
    --tensor-model-parallel-size 2 \
    --prompt "${1:-Once upon a time}" \
    --max-new-tokens 120 --temperature 0.7 --top-p 0.9 --seed "${SEED:-1234}" --stream
