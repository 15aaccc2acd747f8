#!/usr/bin/env bash
# Convert a Hugging Face checkpoint to Megatron's tensor x pipeline partitions, and generate text with the result.
#
#   bash run_scripts/convert_hf.sh opt-125m checkpoints/opt-125m-tp2            # TP=2 PP=1
#   TP=4 PP=2 bash run_scripts/convert_hf.sh /path/to/hf checkpoints/opt-tp4-pp2
#
# Needs: disk for a second copy of the weights. No GPU.
set -euo pipefail
source "$(dirname "$0")/environment.sh"
LOAD="${1:?usage: convert_hf.sh CHECKPOINT TARGET}"
SAVE="${2:?usage: convert_hf.sh CHECKPOINT TARGET}"
TP="${TP:-2}" PP="${PP:-1}"
prepare ""
python "$ROOT/tools/convert_checkpoint.py" --load "$LOAD" --save "$SAVE" \
    --tensor-model-parallel-size "$TP" --pipeline-model-parallel-size "$PP"
torchrun --standalone --nproc-per-node $((TP * PP)) "$ROOT/tools/generate.py" --load "$SAVE" \
    --tensor-model-parallel-size "$TP" --pipeline-model-parallel-size "$PP" \
    --prompt "Once upon a time" --max-new-tokens 32 --temperature 0
