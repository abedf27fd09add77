# shellcheck shell=bash
# The body of every sbatch.sh: one torchrun per node of the allocation, on the bare nodes or in a
# container, and back into the queue when time runs out or the job is preempted.
# Sourced with STAGE and CONFIG set, from the repository's root (where sbatch was called).
#
#   CONTAINER_IMAGE    (optional) an image for pyxis/enroot, e.g. a .sqsh made from Dockerfile.ngc;
#                      without it the nodes' own Python runs
#   CONTAINER_MOUNTS   (optional) host:container pairs besides the repository, by commas
#   MAX_REQUEUES       (optional) how often the job may put itself back, default 100
set -euo pipefail

# shellcheck source=examples/launch/wait.sh
source examples/launch/wait.sh
# shellcheck source=examples/launch/environment.sh
source examples/launch/environment.sh
# shellcheck source=examples/launch/arguments.sh
source examples/launch/arguments.sh

mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
export MASTER_ADDR=${MASTER_ADDR:-${hosts[0]}}
export MASTER_PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 20000))}
export GPUS_PER_NODE=${GPUS_PER_NODE:-8}

SRUN_ARGS=(--ntasks-per-node=1 --kill-on-bad-exit=1)
if [[ -n ${CONTAINER_IMAGE:-} ]]; then
    SRUN_ARGS+=(
        "--container-image=$CONTAINER_IMAGE"
        "--container-mounts=$PWD:$PWD${CONTAINER_MOUNTS:+,$CONTAINER_MOUNTS}"
        "--container-workdir=$PWD"
        --no-container-mount-home
    )
fi

# A fault of the settings shows here, in a second and before all nodes start.
srun "${SRUN_ARGS[@]}" --nodes=1 --ntasks=1 python -m megatron_croc check --for-training --dump \
    --world-size $((SLURM_NNODES * GPUS_PER_NODE)) "${TRAIN_ARGS[@]}" "${EXTRA_ARGS[@]}" >/dev/null

# What is wrong on a node shows here, in seconds, not as a hang an hour later.
srun "${SRUN_ARGS[@]}" python -m megatron_croc doctor --brief

srun "${SRUN_ARGS[@]}" examples/launch/node.sh "${TRAIN_ARGS[@]}" "${EXTRA_ARGS[@]}" &
step=$!

requeue=0
# shellcheck disable=SC2317,SC2329  # called by the trap
end_soon() {
    signalled=1 # read by wait_for
    requeue=1
    echo "$(date -Is) the job ends soon: telling every node to save and stop" >&2
    scancel --signal=USR1 "$SLURM_JOB_ID" # the steps, not this script
}
trap end_soon USR1 TERM
wait_for "$step"

if ((requeue && status == 0 && ${SLURM_RESTART_COUNT:-0} < ${MAX_REQUEUES:-100})); then
    echo "$(date -Is) saved; back into the queue" >&2
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
