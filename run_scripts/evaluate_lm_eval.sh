#!/usr/bin/env bash
# Run lm-eval's tasks, and write results.json and results.md (with the exact command, next to published OPT scores).
#
#   bash run_scripts/evaluate_lm_eval.sh                                          the embedded toy, offline
#   bash run_scripts/evaluate_lm_eval.sh opt-1.3b results/opt-1.3b lambada_openai piqa sciq winogrande
#   TP=2 PP=2 bash run_scripts/evaluate_lm_eval.sh /path/to/checkpoint results/mine fairy_minimal_pairs
#
# FORCE=1 replaces existing results. Needs: a network for a model of the Hub and for lm-eval's own tasks, none for
# fairy_last_word and fairy_minimal_pairs; 4 bytes of memory a parameter on a CPU, 2 on GPUs.
set -euo pipefail
source "$(dirname "$0")/environment.sh"
LOAD="${1:-story}"
OUTPUT="${2:-results/$(basename "$LOAD")}"
shift $(($# < 2 ? $# : 2))
[ $# -gt 0 ] || set -- fairy_last_word fairy_minimal_pairs
TP="${TP:-1}" PP="${PP:-1}"
prepare "[eval]"
torchrun --standalone --nproc-per-node $((TP * PP)) "$ROOT/tools/evaluate.py" lm-eval --load "$LOAD" \
    --tensor-model-parallel-size "$TP" --pipeline-model-parallel-size "$PP" \
    --tasks "$@" --output "$OUTPUT" $([ "${FORCE:-0}" = 0 ] || echo --force)
