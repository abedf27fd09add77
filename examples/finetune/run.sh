#!/usr/bin/env bash
# Stage 2 of Croc, instruction tuning, on the GPUs of one node.
#
#   DATA=data/finetune TOKENIZER=vicuna-7b-v1.5/tokenizer.model START=checkpoints/pretrain_croc \
#       examples/finetune/run.sh [FLAG OF croc train ...]
#
# CONFIG chooses another recipe or cluster (configs/); launch/arguments.sh and
# launch/one_node.sh explain the variables.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

STAGE=finetune
CONFIG=${CONFIG:-examples/finetune/configs/croc_7b_1x8.yaml}
# shellcheck source=examples/launch/one_node.sh
source examples/launch/one_node.sh
