#!/usr/bin/env bash
# Serve a model over HTTP: OpenAI's completions API and a page to try it. Without a checkpoint, the embedded toy.
#
#   bash run_scripts/serve.sh                                          # http://127.0.0.1:5000
#   TP=2 PP=1 PORT=8000 bash run_scripts/serve.sh opt-1.3b [more options of tools/serve.py]
#   OPT_MEGATRON_API_KEY=... HOST=0.0.0.0 bash run_scripts/serve.sh opt-1.3b
#
# Needs: a checkpoint directory, or a network for a model of the Hub; on a CPU, 4 bytes of memory a parameter.
set -euo pipefail
source "$(dirname "$0")/environment.sh"
TP="${TP:-1}" PP="${PP:-1}"
[ $((TP * PP)) -gt 1 ] || export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$(nproc)}"
prepare "[serve]"
exec torchrun --standalone --nproc-per-node $((TP * PP)) "$ROOT/tools/serve.py" \
    --load "${1:-story}" --host "${HOST:-127.0.0.1}" --port "${PORT:-5000}" \
    --tensor-model-parallel-size "$TP" --pipeline-model-parallel-size "$PP" "${@:2}"
