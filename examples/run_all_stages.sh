#!/usr/bin/env bash
# The three stages as Slurm jobs, each after the one before has succeeded.
#
#   DATA_MLP=data/lcs558k DATA_CROC=data/captions DATA_FINETUNE=data/llava665k \
#   TOKENIZER=vicuna-7b-v1.5/tokenizer.model START=checkpoints/start \
#       examples/run_all_stages.sh [OPTION OF sbatch ...]
#
#   RECIPE   croc_7b | croc_13b | victor_7b                (default croc_7b)
#   CLUSTER  nodes x GPUs of configs/: 1x8 | 4x8 | 16x8    (default 4x8)
#   OUT      folder of all checkpoints                     (default checkpoints/$RECIPE)
# All other variables of launch/arguments.sh and launch/slurm.sh reach the jobs as they are.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

: "${DATA_MLP:?set DATA_MLP to the shards of stage 1}"
: "${DATA_CROC:?set DATA_CROC to the shards of stage 1.5}"
: "${DATA_FINETUNE:?set DATA_FINETUNE to the shards of stage 2}"
: "${TOKENIZER:?set TOKENIZER to the tokenizer of the language model}"
: "${START:?set START to what stage 1 starts from (croc convert import)}"
RECIPE=${RECIPE:-croc_7b}
CLUSTER=${CLUSTER:-4x8}
OUT=${OUT:-checkpoints/$RECIPE}
export TOKENIZER

# submit STAGE DATA START [JOB TO WAIT FOR]: prints the job's id
submit() {
    local stage=$1 data=$2 start=$3 after=${4:-}
    local options=(--parsable "--nodes=${CLUSTER%x*}" "--gpus-per-node=${CLUSTER#*x}")
    [[ -z $after ]] || options+=("--dependency=afterok:$after" --kill-on-invalid-dep=yes)
    DATA=$data START=$start SAVE=$OUT/$stage GPUS_PER_NODE=${GPUS_PER_NODE:-${CLUSTER#*x}} \
        CONFIG=examples/$stage/configs/${RECIPE}_$CLUSTER.yaml \
        sbatch "${options[@]}" "${SBATCH_ARGS[@]}" "examples/$stage/sbatch.sh" | cut -d ';' -f 1
}

SBATCH_ARGS=("$@")
mlp=$(submit pretrain_mlp "$DATA_MLP" "$START")
croc=$(submit pretrain_croc "$DATA_CROC" "$OUT/pretrain_mlp" "$mlp")
finetune=$(submit finetune "$DATA_FINETUNE" "$OUT/pretrain_croc" "$croc")
echo "pretrain_mlp $mlp, pretrain_croc $croc, finetune $finetune"
echo "then: croc convert export --load $OUT/finetune --to $OUT/hf"
