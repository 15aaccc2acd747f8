#!/usr/bin/env bash
# Fine-tune OPT-13B with MeZO by the numbers of its paper (arXiv:2305.17333), in the memory of inference, and export it.
#
#   bash run_scripts/finetune_mezo_13b.sh CHECKPOINT TRAIN.jsonl [DIRECTORY]     JSON lines with src, tgt and candidates
#   OBJECTIVE=nll bash run_scripts/finetune_mezo_13b.sh ...                      with src and tgt, for answers of any form
#   LORA_RANK=8 LR=5e-5 EPSILON=1e-2 bash run_scripts/finetune_mezo_13b.sh ...   LoRA's factors alone
#
# Needs: TP GPUs that hold 26 GB of float16 weights together (one of 40 GB with TP=1), a CUDA build of torch.
# Not run: there was no GPU for it, and no weights of 13b. The same command with the toy is in docs/guides/mezo.md.
# A run of whole weights is best converted every few thousand steps: a checkpoint is a log of steps, which takes long to
# repeat on that many weights (see the guide).
set -euo pipefail
source "$(dirname "$0")/environment.sh"
LOAD="${1:?usage: finetune_mezo_13b.sh CHECKPOINT TRAIN.jsonl [DIRECTORY]}" TRAIN="${2:?give JSON lines}" OUT="${3:-mezo-13b}"
TP="${TP:-2}"
prepare "[train]"
torchrun --standalone --nproc-per-node "$TP" "$ROOT/tools/train.py" \
    --load "$LOAD" --supervised-data "$TRAIN" --device cuda --fp16 --tensor-model-parallel-size "$TP" \
    --optimizer mezo --objective "${OBJECTIVE:-classification}" --lora-rank "${LORA_RANK:-0}" \
    --mezo-epsilon "${EPSILON:-1e-3}" --lr "${LR:-1e-7}" --lr-decay-style constant \
    --train-iters "${TRAIN_ITERS:-20000}" --global-batch-size 16 --micro-batch-size 16 \
    --log-interval 50 --save-interval 1000 --keep-last 3 --save "$OUT/run"
python "$ROOT/tools/convert_checkpoint.py" --load "$OUT/run" --save "$OUT/hf" --to hf
