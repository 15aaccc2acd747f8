#!/usr/bin/env bash
# Serve OPT-66B on eight GPUs of one machine, tensor parallel.
#
#   OPT_MEGATRON_API_KEY=... bash run_scripts/serve_opt_66b_tp8.sh [CHECKPOINT]
#
# Needs: eight GPUs of 40 GB (16.5 GB of weights each in float16, 15 GB for a KV cache of 50,000 tokens), a CUDA
# build of torch, and 132 GB of disk for the Hub's files (or your own checkpoint directory). It listens on this
# machine alone; HOST=0.0.0.0 accepts others, who then need the key. This project has not run it on GPUs yet.
set -euo pipefail
source "$(dirname "$0")/environment.sh"
prepare "[serve]"
exec torchrun --standalone --nproc-per-node 8 "$ROOT/tools/serve.py" \
    --load "${1:-facebook/opt-66b}" --device cuda --dtype float16 --tensor-model-parallel-size 8 \
    --max-batch-size 32 --kv-cache-memory 15GB --prefill-chunk-size 1024 \
    --host "${HOST:-127.0.0.1}" --port "${PORT:-5000}"
