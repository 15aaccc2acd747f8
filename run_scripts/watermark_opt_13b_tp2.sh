#!/usr/bin/env bash
# Continue a file of prompts with OPT-13B on two GPUs, with a watermark, and look for it in what was written.
#
#   WATERMARK_KEY=271828183 bash run_scripts/watermark_opt_13b_tp2.sh prompts.txt [CHECKPOINT] [OUTPUT.jsonl]
#
# Needs: two GPUs of 24 GB or more (13 GB of weights each in float16), a CUDA build of torch, and 26 GB of disk for the
# Hub's files (or your own checkpoint directory). Detection needs a CPU. This project has not run it.
set -euo pipefail
source "$(dirname "$0")/environment.sh"
PROMPTS="${1:?usage: watermark_opt_13b_tp2.sh PROMPTS [CHECKPOINT] [OUTPUT.jsonl]}"
LOAD="${2:-facebook/opt-13b}"
OUTPUT="${3:-marked.jsonl}"
KEY="${WATERMARK_KEY:-15485863}"
[ ! -e "$OUTPUT" ] || { echo "$OUTPUT is there already: name another file" >&2; exit 2; }
prepare ""
torchrun --standalone --nproc-per-node 2 "$ROOT/tools/generate.py" \
    --load "$LOAD" --device cuda --dtype float16 --tensor-model-parallel-size 2 \
    --prompt-file "$PROMPTS" --max-new-tokens 200 --temperature 0.7 \
    --watermark-delta 2 --watermark-gamma 0.25 --watermark-key "$KEY" --json >"$OUTPUT"
opt-megatron detect --load "$LOAD" --input "$OUTPUT" --watermark-gamma 0.25 --watermark-key "$KEY"
