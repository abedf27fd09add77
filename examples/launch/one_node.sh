# shellcheck shell=bash
# The body of every run.sh: torchrun on the GPUs of this node.
# Sourced with STAGE and CONFIG set, from the repository's root; the arguments of run.sh are passed on.
#
#   GPUS_PER_NODE   (optional) processes, default 8
#   MAX_RESTARTS    (optional) how often torchrun restarts a failed job from its checkpoint, default 3

# shellcheck source=examples/launch/environment.sh
source examples/launch/environment.sh
# shellcheck source=examples/launch/arguments.sh
source examples/launch/arguments.sh
# shellcheck source=examples/launch/torchrun.sh
source examples/launch/torchrun.sh

check_run "${GPUS_PER_NODE:-8}" "${TRAIN_ARGS[@]}" "$@"

DISTRIBUTED_ARGS=(
    --standalone
    --nproc-per-node "${GPUS_PER_NODE:-8}"
    --max-restarts "${MAX_RESTARTS:-3}"
)
run_torchrun "${DISTRIBUTED_ARGS[@]}" -m megatron_croc train "${TRAIN_ARGS[@]}" "$@"
exit "$status"
