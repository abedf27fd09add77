#!/usr/bin/env bash
# Stage 1.5 of Croc, replaced visual tokens rebuilt on detailed captions, on the GPUs of one node.
#
#   DATA=data/pretrain_croc TOKENIZER=vicuna-7b-v1.5/tokenizer.model START=checkpoints/pretrain_mlp \
#       examples/pretrain_croc/run.sh [FLAG OF croc train ...]
#
# CONFIG chooses another recipe or cluster (configs/); launch/arguments.sh explains the variables.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

STAGE=pretrain_croc
CONFIG=${CONFIG:-examples/pretrain_croc/configs/croc_7b_1x8.yaml}
# shellcheck source=examples/launch/environment.sh
source examples/launch/environment.sh
# shellcheck source=examples/launch/arguments.sh
source examples/launch/arguments.sh

DISTRIBUTED_ARGS=(
    --standalone
    --nproc-per-node "${GPUS_PER_NODE:-8}"
    --max-restarts "${MAX_RESTARTS:-3}"
)
exec torchrun "${DISTRIBUTED_ARGS[@]}" -m megatron_croc train "${TRAIN_ARGS[@]}" "$@"
