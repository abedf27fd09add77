#!/usr/bin/env bash
# One node's share of a job: torchrun with a process per GPU. srun starts it once on every node.
# Usage: node.sh [argument of croc train ...]
#
# A signal that announces the end (USR1 before a time limit, TERM at a preemption) goes to the
# training processes, which finish their step, save and leave; torchrun itself would stop them.
set -euo pipefail
# shellcheck source=examples/launch/wait.sh
source "$(dirname "${BASH_SOURCE[0]}")/wait.sh"

DISTRIBUTED_ARGS=(
    --nnodes "${SLURM_NNODES:-1}"
    --node-rank "${SLURM_NODEID:-0}"
    --nproc-per-node "${GPUS_PER_NODE:-8}"
    --rdzv-id "${SLURM_JOB_ID:-0}-${SLURM_RESTART_COUNT:-0}"
    --rdzv-backend c10d
    --rdzv-endpoint "${MASTER_ADDR:-127.0.0.1}:${MASTER_PORT:-29500}"
    --max-restarts "${MAX_RESTARTS:-3}" # a process that dies: all start again from the checkpoint
)

# setsid: out of this process group, so that a signal to the group does not reach torchrun.
setsid torchrun "${DISTRIBUTED_ARGS[@]}" -m megatron_croc train "$@" &
agent=$!

# shellcheck disable=SC2317,SC2329  # called by the trap
tell_workers() {
    signalled=1 # read by wait_for
    pkill -USR1 -P "$agent" || true
}
trap tell_workers USR1 TERM

wait_for "$agent"
exit "$status"
