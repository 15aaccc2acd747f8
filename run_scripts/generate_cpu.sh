#!/usr/bin/env bash
# Continue prompts on a CPU: one process with all cores, or TP x PP ranks of one thread each.
#
#   bash run_scripts/generate_cpu.sh opt-125m "The capital of France is"
#   TP=2 PP=1 bash run_scripts/generate_cpu.sh /path/to/checkpoint "The capital of France is"
#
# Needs: a checkpoint directory, or a network for a model of the Hub; 4 bytes of memory a parameter.
set -euo pipefail
source "$(dirname "$0")/environment.sh"
LOAD="${1:?usage: generate_cpu.sh CHECKPOINT PROMPT}"
PROMPT="${2:?usage: generate_cpu.sh CHECKPOINT PROMPT}"
TP="${TP:-1}" PP="${PP:-1}"
[ $((TP * PP)) -gt 1 ] || export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$(nproc)}"
prepare ""
torchrun --standalone --nproc-per-node $((TP * PP)) "$ROOT/tools/generate.py" \
    --load "$LOAD" --device cpu --dtype float32 \
    --tensor-model-parallel-size "$TP" --pipeline-model-parallel-size "$PP" \
    --prompt "$PROMPT" --max-new-tokens 64 --temperature 0.7 --top-p 0.9 --stream
