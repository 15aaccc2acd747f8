#!/usr/bin/env bash
# Generate with OPT-30B on four GPUs of one machine, tensor parallel: the multi-GPU example of FlagAI's OPT page.
#
#   bash run_scripts/generate_opt_30b_tp4.sh [CHECKPOINT]
#
# Needs: four GPUs of 24 GB or more (15 GB of weights each in float16), a CUDA build of torch, and 60 GB of
# disk for the Hub's files (or your own checkpoint directory). This project has not run it on GPUs yet.
set -euo pipefail
source "$(dirname "$0")/environment.sh"
prepare ""
torchrun --standalone --nproc-per-node 4 "$ROOT/tools/generate.py" \
    --load "${1:-facebook/opt-30b}" --device cuda --dtype float16 \
    --tensor-model-parallel-size 4 --seed 123 \
    --prompt "I think The Old Man and the Sea is a very good book, what do you think? I think " \
    --max-new-tokens 200 --top-k 30 --temperature 1.0 --stream
