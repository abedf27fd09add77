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

# 1. Records and shards.
if [[ ! -e $DATA/shards/.done ]]; then
    "$PYTHON" benchmarks/evidence/records.py --out "$DATA"
    [[ -e $DATA/tokenizer.model ]] || croc data tokenizer \
        --input "$DATA/pretrain_croc.json" "$DATA/finetune.json" --output "$DATA/tokenizer.model"
    for name in {,valid_}{pretrain_mlp,pretrain_croc,finetune}; do
        croc data preprocess --input "$DATA/$name.json" --image-folder "$DATA/images" \
            --output "$DATA/shards/$name"
    done
    touch "$DATA/shards/.done"
fi

# 2. A tower that sees, and the random language model of each seed beside it.
[[ -e $DATA/tower/zero_shot.json ]] ||
    "$PYTHON" benchmarks/evidence/tower.py --data "$DATA" --out "$DATA/tower"
for seed in "${SEEDS[@]}"; do
    start=$DATA/start/seed-$seed
    [[ ! -e $start/latest_checkpointed_iteration.txt ]] || continue
    "$PYTHON" benchmarks/evidence/start.py --seed "$seed" --out "$start/language_model"
    croc convert import --from-hf "$start/language_model" --vision "$DATA/tower" \
        --save "$start" --seed "$seed"
done

# 3. Arms, answers and tables.
croc scaling all "$PLAN" --out "$OUT" --data "$DATA" "$@"
