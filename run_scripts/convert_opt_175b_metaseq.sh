#!/usr/bin/env bash
# Convert OPT-175B as Meta distributes it (992 raw FSDP shards, 350 GB) to Megatron at TP=8, for eight ranks.
#
#   bash run_scripts/convert_opt_175b_metaseq.sh /data/opt-175b/raw /data/opt-175b/tp8 /data/opt-tokenizer
#   PP=2 bash run_scripts/convert_opt_175b_metaseq.sh ...            TP=8 x PP=2 for two machines
#
# The tokenizer's files (vocab.json and merges.txt of any OPT) are copied next to the weights, because metaseq's
# shards do not include them. An interrupted run continues when it is started again.
# Needs: 350 GB of disk in addition to the shards; less than 1 GiB of memory. Not tried on the real shards: the
# tests open 992 sparse files of the real sizes, and convert small ones.
set -euo pipefail
source "$(dirname "$0")/environment.sh"
SHARDS="${1:?usage: convert_opt_175b_metaseq.sh SHARDS TARGET TOKENIZER}"
SAVE="${2:?usage: convert_opt_175b_metaseq.sh SHARDS TARGET TOKENIZER}"
TOKENIZER="${3:?usage: convert_opt_175b_metaseq.sh SHARDS TARGET TOKENIZER}"
prepare ""
opt-megatron inspect "$SHARDS"
python "$ROOT/tools/convert_checkpoint.py" --load "$SHARDS" --save "$SAVE" --tokenizer "$TOKENIZER" --resume \
    --tensor-model-parallel-size 8 --pipeline-model-parallel-size "${PP:-1}"
