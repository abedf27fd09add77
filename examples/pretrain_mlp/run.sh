#!/usr/bin/env bash
# Stage 1 of Croc, the projector on short captions, on the GPUs of one node.
#
#   DATA=data/pretrain_mlp TOKENIZER=vicuna-7b-v1.5/tokenizer.model START=checkpoints/start \
#       examples/pretrain_mlp/run.sh [FLAG OF croc train ...]
#
# CONFIG chooses another recipe or cluster (configs/); launch/arguments.sh and
# launch/one_node.sh explain the variables.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

STAGE=pretrain_mlp
CONFIG=${CONFIG:-examples/pretrain_mlp/configs/croc_7b_1x8.yaml}
# shellcheck source=examples/launch/one_node.sh
source examples/launch/one_node.sh
