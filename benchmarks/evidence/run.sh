#!/usr/bin/env bash
# Does stage 1.5 help? easy-VQA from its package to tables: about 100 minutes of one idle CPU core.
# Usage: benchmarks/evidence/run.sh [FOLDER] [OPTION OF croc scaling ...]     (default runs/evidence)
# Started again it goes on where it stopped; --minutes 60 ends it after an hour. Needs transformers.
set -euo pipefail
cd "$(dirname "$0")/../.."

OUT=${1:-runs/evidence}
shift || true
DATA=$OUT/data
SEEDS=(1 2 3 4 5)
PYTHON=${PYTHON:-python}
PLAN=${PLAN:-benchmarks/evidence/easy_vqa.yaml}
export OMP_NUM_THREADS=1 PYTHONPATH=$PWD
croc() { "$PYTHON" -m megatron_croc "$@"; }

# 1. Records, shards, a tower that sees, and a tokenizer.
source benchmarks/evidence/prepare.sh
prepare "$DATA"
[[ -e $DATA/tokenizer.model ]] || croc data tokenizer \
    --input "$DATA/pretrain_croc.json" "$DATA/finetune.json" --output "$DATA/tokenizer.model"

# 2. The random language model of each seed, beside the tower.
for seed in "${SEEDS[@]}"; do
    start=$DATA/start/seed-$seed
    [[ ! -e $start/latest_checkpointed_iteration.txt ]] || continue
    "$PYTHON" benchmarks/evidence/start.py --seed "$seed" --out "$start/language_model"
    croc convert import --from-hf "$start/language_model" --vision "$DATA/tower" \
        --save "$start" --seed "$seed"
done

# 3. Arms, answers and tables.
croc scaling all "$PLAN" --out "$OUT" --data "$DATA" "$@"
