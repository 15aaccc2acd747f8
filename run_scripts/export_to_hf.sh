#!/usr/bin/env bash
# Convert any checkpoint (Megatron at any layout, metaseq, FlagAI) to Hugging Face files, and compare the logits.
#
#   bash run_scripts/export_to_hf.sh checkpoints/opt-1.3b-tp4 exports/opt-1.3b
#
# Needs: disk for a second copy; for the logits 8 bytes of memory a parameter (LOGITS= skips them).
set -euo pipefail
source "$(dirname "$0")/environment.sh"
LOAD="${1:?usage: export_to_hf.sh CHECKPOINT TARGET}"
SAVE="${2:?usage: export_to_hf.sh CHECKPOINT TARGET}"
prepare ""
python "$ROOT/tools/convert_checkpoint.py" --load "$LOAD" --save "$SAVE" --to hf --max-shard-size 5GB
# shellcheck disable=SC2086
opt-megatron verify "$SAVE" "$LOAD" ${LOGITS---logits}
