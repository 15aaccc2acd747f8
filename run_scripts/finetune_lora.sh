#!/usr/bin/env bash
# Fine-tune a model with LoRA on JSON lines with `src` and `tgt`, and export it merged as Hugging Face files.
#
#   bash run_scripts/finetune_lora.sh                                the embedded toy model learns to answer with names (minutes)
#   bash run_scripts/finetune_lora.sh opt-125m TRAIN.jsonl VALID.jsonl DIRECTORY
#   TP=2 bash run_scripts/finetune_lora.sh ...                       tensor parallel
#
# Needs: two cores for the toy; a network or a checkpoint directory for another model.
set -euo pipefail
source "$(dirname "$0")/environment.sh"
LOAD="${1:-story}" OUT="${4:-finetuned}" TP="${TP:-1}"
TRAIN="${2:-$ROOT/opt_megatron/assets/names-task/train.jsonl}"
VALID="${3:-$ROOT/opt_megatron/assets/names-task/valid.jsonl}"
prepare "[train]"
torchrun --standalone --nproc-per-node "${PROCESSES:-2}" "$ROOT/tools/train.py" \
    --load "$LOAD" --supervised-data "$TRAIN" --supervised-valid-data "$VALID" \
    --tensor-model-parallel-size "$TP" --lora-rank "${LORA_RANK:-16}" --lora-alpha 32 \
    --seq-length "${SEQ_LENGTH:-512}" --micro-batch-size 1 --global-batch-size 2 \
    --train-iters "${TRAIN_ITERS:-600}" --lr "${LR:-3e-3}" --lr-warmup-iters 20 --hidden-dropout 0 \
    --log-interval 50 --eval-interval 150 --save "$OUT/run"
python "$ROOT/tools/convert_checkpoint.py" --load "$OUT/run" --save "$OUT/hf" --to hf
