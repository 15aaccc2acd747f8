#!/usr/bin/env bash
# Pre-train a size of OPT from scratch with OPT's recipe on every GPU of this machine (or, slowly, on a CPU).
#
#   bash run_scripts/pretrain_opt.sh 125m DATA_PREFIX SAVE
#   TP=2 PP=2 bash run_scripts/pretrain_opt.sh 1.3b DATA_PREFIX SAVE --micro-batch-size 4 --bf16
#
# Needs: a corpus indexed by tools/preprocess_data.py with OPT's tokenizer. Arguments after the third are passed to
# tools/train.py. This project has not run it on a GPU yet.
set -euo pipefail
SIZE="${1:?usage: pretrain_opt.sh SIZE DATA_PREFIX SAVE [OPTION ...]}"
DATA="${2:?usage: pretrain_opt.sh SIZE DATA_PREFIX SAVE [OPTION ...]}"
SAVE="${3:?usage: pretrain_opt.sh SIZE DATA_PREFIX SAVE [OPTION ...]}"
shift 3
TP="${TP:-1}" PP="${PP:-1}"
source "$(dirname "$0")/environment.sh"
prepare "[train]"
GPUS="$(nvidia-smi -L 2>/dev/null | wc -l)"
torchrun --standalone --nproc-per-node "${PROCESSES:-$((GPUS > 0 ? GPUS : TP * PP))}" "$ROOT/tools/train.py" \
    --preset "$SIZE" --data-path "$DATA" --split 999,1,0 --save "$SAVE" --save-interval 2000 --eval-interval 2000 \
    --eval-iters 32 --keep-last 3 \
    --tensor-model-parallel-size "$TP" --pipeline-model-parallel-size "$PP" "$@"
