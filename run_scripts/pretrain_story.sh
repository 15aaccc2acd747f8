#!/usr/bin/env bash
# Train the embedded toy model from scratch: tokenizer, indexed corpus, pre-training, export, evaluation.
#
#   bash run_scripts/pretrain_story.sh TRAIN.jsonl VALID.jsonl [DIRECTORY]
#
# Needs: two files of JSON lines with `text` (the embedded model had 7.4 MB and 0.7 MB of public-domain fairy
# tales), and about an hour on two cores. After an interruption it continues from its last checkpoint.
# PROCESSES data parallel ranks of one thread each (default: 2).
set -euo pipefail
TRAIN="${1:?usage: pretrain_story.sh TRAIN.jsonl VALID.jsonl [DIRECTORY]}"
VALID="${2:?usage: pretrain_story.sh TRAIN.jsonl VALID.jsonl [DIRECTORY]}"
OUT="${3:-story}"
source "$(dirname "$0")/environment.sh"
prepare "[train]"
mkdir -p "$OUT"
[ -d "$OUT/tokenizer" ] || python "$ROOT/tools/train_tokenizer.py" --input "$TRAIN" --vocab-size 4096 --output "$OUT/tokenizer"
for part in train valid; do
    file="$TRAIN"
    [ $part = train ] || file="$VALID"
    [ -f "$OUT/${part}_text_document.idx" ] ||
        python "$ROOT/tools/preprocess_data.py" --input "$file" --tokenizer "$OUT/tokenizer" --output-prefix "$OUT/$part" --append-eod
done
cat >"$OUT/config.json" <<'JSON'
{"model_type": "opt", "num_hidden_layers": 4, "hidden_size": 256, "num_attention_heads": 8, "ffn_dim": 1024,
 "word_embed_proj_dim": 256, "vocab_size": 4096, "max_position_embeddings": 512, "dropout": 0.1,
 "attention_dropout": 0.0, "bos_token_id": 2, "eos_token_id": 2, "pad_token_id": 1}
JSON
# OPT's recipe except for two values that suit a model of this width: the learning rate and N(0, 0.02) at the start.
torchrun --standalone --nproc-per-node "${PROCESSES:-2}" "$ROOT/tools/train.py" \
    --config "$OUT/config.json" --tokenizer "$OUT/tokenizer" \
    --train-data-path "$OUT/train_text_document" --valid-data-path "$OUT/valid_text_document" \
    --seq-length 512 --micro-batch-size 4 --global-batch-size 8 --train-iters 4000 \
    --lr 2e-3 --min-lr 2e-5 --lr-warmup-iters 200 --init-method-std 0.02 \
    --log-interval 50 --eval-interval 500 --save "$OUT/run" --save-interval 500 --keep-last 2
[ -d "$OUT/hf" ] || python "$ROOT/tools/convert_checkpoint.py" --load "$OUT/run" --save "$OUT/hf" --to hf --dtype float16
python "$ROOT/tools/plot_training.py" "$OUT/run" --output "$OUT/loss.png" --force
python "$ROOT/tools/evaluate.py" perplexity --load "$OUT/hf" --data "$VALID"
