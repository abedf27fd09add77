#!/usr/bin/env bash
# Croc's three stages on two processes of one machine, from raw images to a report.
# Usage: examples/quickstart/run.sh [FOLDER]           (default runs/quickstart)
#        examples/quickstart/run.sh --long [FOLDER]    (default runs/quickstart_long)
# Seven minutes teach the model the words of the answers and to see colours; --long (30 minutes), more.
set -euo pipefail
cd "$(dirname "$0")/../.."
# shellcheck source=examples/launch/torchrun.sh
source examples/launch/torchrun.sh

if [[ ${1:-} == --long ]]; then
    NUM_IMAGES=20000 CROC_ITERS=1200 FINETUNE_ITERS=600 EVAL_INTERVAL=100 EVAL_ITERS=2
    BATCH=32 MICRO_BATCH=4 RATE=2e-3 LOG_INTERVAL=5
    OUT=${2:-runs/quickstart_long}
else
    # Small batches: in few minutes many small steps teach more than a few large ones.
    NUM_IMAGES=4000 CROC_ITERS=800 FINETUNE_ITERS=1000 EVAL_INTERVAL=200 EVAL_ITERS=8
    BATCH=8 MICRO_BATCH=8 RATE=1e-3 LOG_INTERVAL=25
    OUT=${1:-runs/quickstart}
fi
DEMO=$OUT/demo
export OMP_NUM_THREADS=1
rm -rf "$OUT"/pretrain_mlp "$OUT"/pretrain_croc "$OUT"/finetune

# 1. Data: made-up scenes as a LLaVA JSON + images, then shards; your own data takes the same way.
croc data demo --out "$DEMO" --num-images "$NUM_IMAGES" --workers 2
for name in {,valid_}{pretrain_mlp,pretrain_croc,finetune}; do
    croc data preprocess --input "$DEMO/$name.json" --image-folder "$DEMO/images" \
        --output "$DEMO/shards/$name" --samples-per-shard 1000 --workers 2
done

# 2. Training: each stage starts from the one before, and each is cut another way.
train() {
    local stage=$1
    shift
    run_torchrun --standalone --nproc-per-node 2 -m megatron_croc train \
        --recipe "tiny/$stage" \
        --data-path "$DEMO/shards/$stage" \
        --valid-data-path "$DEMO/shards/valid_$stage" \
        --tokenizer-model "$DEMO/tokenizer.model" \
        --save "$OUT/$stage" "$@"
    return "$status"
}
STEPS=(--global-batch-size "$BATCH" --lr "$RATE" --projector-lr "$RATE"
    --eval-interval "$EVAL_INTERVAL" --eval-iters "$EVAL_ITERS" --log-interval "$LOG_INTERVAL")
# Data parallel 2, then tensor parallel 2, then pipeline parallel 2.
train pretrain_mlp --train-iters 50 --eval-interval 25 --eval-iters 2 --log-interval 5
train pretrain_croc --train-iters "$CROC_ITERS" "${STEPS[@]}" --micro-batch-size "$MICRO_BATCH" \
    --tensor-model-parallel-size 2 --pretrained-checkpoint "$OUT/pretrain_mlp"
train finetune --train-iters "$FINETUNE_ITERS" "${STEPS[@]}" --eval-answers-iters "$EVAL_ITERS" \
    --pipeline-model-parallel-size 2 --pretrained-checkpoint "$OUT/pretrain_croc"

# 3. What it answers to held-out questions, by type, and what mere guessing would get.
croc generate --model "$OUT/finetune" --tokenizer "$DEMO/tokenizer.model" \
    --input "$DEMO/valid_finetune.json" --image-folder "$DEMO/images" --batch-size 32 \
    --max-new-tokens 16 --output "$OUT/finetune/answers.jsonl" \
    --report "$OUT/finetune/accuracy.json" --baseline "$DEMO/finetune.json"

# 4. What was learned, in a table and in pictures.
croc report "$OUT"

# 5. The next steps. The picture is the last one, which is held out.
cat <<END

The report: $(realpath "$OUT")/report/report.html

Next, in $PWD (". .venv/bin/activate" makes croc known there):

  python -m webbrowser "file://$(realpath "$OUT")/report/report.html"

  croc generate --model $OUT/finetune --tokenizer $DEMO/tokenizer.model \\
      --image $DEMO/images/$(printf %06d $((NUM_IMAGES - 1))).jpg --prompt "How many objects are there?"

  less docs/own_pictures.md    # the same way with your own pictures
END
