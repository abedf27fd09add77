#!/usr/bin/env bash
# A scaling law on easy-VQA, the prediction of a larger run, that run, and the prediction's error.
# Usage: benchmarks/evidence/scaling.sh FOLDER DATA      (DATA: shards and tower of run.sh, its FOLDER/data)
# Started again it goes on where it stopped. Needs transformers.
set -euo pipefail
cd "$(dirname "$0")/../.."

OUT=$1
DATA=$2
PYTHON=${PYTHON:-python}
NICE=${NICE:-0}
export OMP_NUM_THREADS=1 PYTHONPATH=$PWD
croc() { "$PYTHON" -m megatron_croc "$@"; }

# 1. Random language models of three sizes beside the trained tower.
for size in "32 2" "64 3" "96 4"; do
    read -r width layers <<<"$size"
    for seed in 1 2; do
        start=$DATA/scaling/width$width-$seed
        [[ ! -e $start/latest_checkpointed_iteration.txt ]] || continue
        "$PYTHON" benchmarks/evidence/start.py --seed "$seed" --width "$width" \
            --num-layers "$layers" --out "$start/language_model"
        croc convert import --from-hf "$start/language_model" --vision "$DATA/tower" \
            --save "$start" --seed "$seed"
    done
done

# 2. The law and its prediction, then the larger run and the error.
croc scaling all benchmarks/evidence/scaling.yaml --out "$OUT/small" --data "$DATA" \
    --nice "$NICE" --metric valid_text_loss --target-samples 20480
croc scaling launch benchmarks/evidence/scaling_larger.yaml --out "$OUT/larger" --data "$DATA" \
    --nice "$NICE"
"$PYTHON" benchmarks/evidence/prediction.py --fit "$OUT/small/fit.json" --runs "$OUT/larger/runs" \
    --out "$OUT/prediction.json"
