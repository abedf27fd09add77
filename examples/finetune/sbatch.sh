#!/usr/bin/env bash
# Stage 2 of Croc, instruction tuning, on a Slurm cluster.
#
#   DATA=data/finetune TOKENIZER=vicuna-7b-v1.5/tokenizer.model START=checkpoints/pretrain_croc \
#       sbatch examples/finetune/sbatch.sh [FLAG OF croc train ...]
#
# Call it in the repository's root. Another size: sbatch --nodes=16, with CONFIG naming the file
# for it. launch/arguments.sh and launch/slurm.sh explain the variables.
#
#SBATCH --job-name=croc-finetune
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
# A failed node or a preemption puts the job back into the queue; it goes on at its checkpoint.
#SBATCH --requeue
# Ten minutes before the time limit this script is told: it saves and requeues itself.
#SBATCH --signal=B:USR1@600
set -euo pipefail

STAGE=finetune
CONFIG=${CONFIG:-examples/finetune/configs/croc_7b_4x8.yaml}
EXTRA_ARGS=("$@")
cd "${SLURM_SUBMIT_DIR:?this is a job script: start it with sbatch}"
# shellcheck source=examples/launch/slurm.sh
source examples/launch/slurm.sh
