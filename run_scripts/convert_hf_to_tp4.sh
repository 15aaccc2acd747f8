#!/usr/bin/env bash
# Convert a Hugging Face checkpoint to four tensor parallel partitions, and compare the result with its source bit by bit.
#
#   bash run_scripts/convert_hf_to_tp4.sh opt-1.3b checkpoints/opt-1.3b-tp4
#
# Needs: disk for a second copy of the weights; memory under 1 GiB whatever the model's size. No GPU.
set -euo pipefail
source "$(dirname "$0")/environment.sh"
LOAD="${1:?usage: convert_hf_to_tp4.sh CHECKPOINT TARGET}"
SAVE="${2:?usage: convert_hf_to_tp4.sh CHECKPOINT TARGET}"
prepare ""
python "$ROOT/tools/convert_checkpoint.py" --load "$LOAD" --save "$SAVE" --tensor-model-parallel-size 4
opt-megatron verify "$SAVE" "$LOAD"
