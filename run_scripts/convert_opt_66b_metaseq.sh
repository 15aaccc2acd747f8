#!/usr/bin/env bash
# Convert OPT-66B from metaseq's eight model-parallel parts to Hugging Face files, or with TP set to Megatron's.
#
#   bash run_scripts/convert_opt_66b_metaseq.sh /data/opt-66b/parts /data/opt-66b/hf
#   TP=4 bash run_scripts/convert_opt_66b_metaseq.sh /data/opt-66b/parts /data/opt-66b/tp4
#
# Needs: 132 GB of disk in addition to the parts; less than 1 GiB of memory. Not tried on the real files.
set -euo pipefail
source "$(dirname "$0")/environment.sh"
PARTS="${1:?usage: convert_opt_66b_metaseq.sh PARTS TARGET}"
SAVE="${2:?usage: convert_opt_66b_metaseq.sh PARTS TARGET}"
prepare ""
if [ -n "${TP:-}" ]; then
    python "$ROOT/tools/convert_checkpoint.py" --load "$PARTS" --save "$SAVE" --resume --tensor-model-parallel-size "$TP"
else
    python "$ROOT/tools/convert_checkpoint.py" --load "$PARTS" --save "$SAVE" --resume --to hf --max-shard-size 10GB
fi
opt-megatron verify "$SAVE" "$PARTS"
