#!/usr/bin/env bash
# One node's share of a job: torchrun with a process per GPU. srun starts it once on every node.
# Usage: node.sh [argument of croc train ...]
# launch/torchrun.sh says what becomes of signals.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
# shellcheck source=examples/launch/torchrun.sh
source examples/launch/torchrun.sh

DISTRIBUTED_ARGS=(
    --nnodes "${SLURM_NNODES:-1}"
    --node-rank "${SLURM_NODEID:-0}"
    --nproc-per-node "${GPUS_PER_NODE:-8}"
    --rdzv-id "${SLURM_JOB_ID:-0}-${SLURM_RESTART_COUNT:-0}"
    --rdzv-backend c10d
    --rdzv-endpoint "${MASTER_ADDR:-127.0.0.1}:${MASTER_PORT:-29500}"
    --max-restarts "${MAX_RESTARTS:-3}" # a process that dies: all start again from the checkpoint
)

run_torchrun "${DISTRIBUTED_ARGS[@]}" -m megatron_croc train "$@"
exit "$status"
