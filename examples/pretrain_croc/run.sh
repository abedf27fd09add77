#!/usr/bin/env bash
# Stage 1.5 of Croc, replaced visual tokens rebuilt on detailed captions, on the GPUs of one node.
#
#   DATA=data/pretrain_croc TOKENIZER=vicuna-7b-v1.5/tokenizer.model START=checkpoints/pretrain_mlp \
#       examples/pretrain_croc/run.sh [FLAG OF croc train ...]
#
# CONFIG chooses another recipe or cluster (configs/); launch/arguments.sh and
# launch/one_node.sh explain the variables.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

STAGE=pretrain_croc
CONFIG=${CONFIG:-examples/pretrain_croc/configs/croc_7b_1x8.yaml}
# shellcheck source=examples/launch/one_node.sh
source examples/launch/one_node.sh
