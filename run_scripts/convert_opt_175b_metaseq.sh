#!/usr/bin/env bash
# OPT-175B as Meta hands it out (992 raw FSDP shards, 350 GB) to Megatron at TP=8, ready for eight ranks.
#
#   bash run_scripts/convert_opt_175b_metaseq.sh /data/opt-175b/raw /data/opt-175b/tp8 /data/opt-tokenizer
#   PP=2 bash run_scripts/convert_opt_175b_metaseq.sh ...            TP=8 x PP=2 for two machines
#
# The tokenizer's files (vocab.json and merges.txt of any OPT) are copied beside the weights, since metaseq's
# shards do not bring any along. An interrupted run goes on where it stopped when it is started again.
# Needs: 350 GB of disk beside the shards; memory under 1 GiB. The 350 GB themselves have not been here: the
# tests resolve 992 sparse files of the real sizes, and convert small ones.
set -euo pipefail
source "$(dirname "$0")/environment.sh"
SHARDS="${1:?usage: convert_opt_175b_metaseq.sh SHARDS TARGET TOKENIZER}"
SAVE="${2:?usage: convert_opt_175b_metaseq.sh SHARDS TARGET TOKENIZER}"
TOKENIZER="${3:?usage: convert_opt_175b_metaseq.sh SHARDS TARGET TOKENIZER}"
prepare ""
opt-megatron inspect "$SHARDS"
python tools/convert_checkpoint.py --load "$SHARDS" --save "$SAVE" --tokenizer "$TOKENIZER" --resume \
    --tensor-model-parallel-size 8 --pipeline-model-parallel-size "${PP:-1}"
