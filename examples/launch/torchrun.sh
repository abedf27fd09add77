# shellcheck shell=bash
# run_torchrun WORD ...: torchrun with these words, in the foreground; its exit status is in $status.
# Sourced by run.sh and node.sh.
#
# Signals go to the training processes; torchrun itself would stop them after 30 seconds.
#   Ctrl-C once     they end their step, save and leave; the status is 130
#   Ctrl-C again    everything ends at once; the status is 130
#   USR1, TERM      the announced end of a job: they end their step, save and leave
# An error that a restart does not fix (a wrong setting, another run's folder) is written by a worker to
# $CROC_ERROR_FILE: restarted workers leave at once, and the error stands in the last line.

# shellcheck source=examples/launch/wait.sh
source examples/launch/wait.sh

run_torchrun() {
    CROC_ERROR_FILE=$(mktemp)
    export CROC_ERROR_FILE
    interrupts=0
    trap 'tell_workers USR1' USR1 TERM
    trap interrupt INT
    # setsid: out of this process group, so that a signal to the group does not reach torchrun.
    setsid torchrun "$@" &
    agent=$!
    wait_for "$agent"
    trap - USR1 TERM INT
    if [[ -s $CROC_ERROR_FILE ]]; then
        echo >&2
        cat "$CROC_ERROR_FILE" >&2
    fi
    rm -f "$CROC_ERROR_FILE"
    # shellcheck disable=SC2034  # the caller reads it
    ((interrupts == 0)) || status=130
}

# shellcheck disable=SC2317,SC2329  # called by the traps
tell_workers() {
    signalled=1 # read by wait_for
    pkill "-$1" -P "$agent" || true
}

# shellcheck disable=SC2317,SC2329  # called by the trap
interrupt() {
    interrupts=$((interrupts + 1))
    if ((interrupts == 1)); then
        tell_workers INT
    else
        signalled=1
        kill -KILL "$agent" || true # the workers end with it
        echo "stopped at once: steps since the last checkpoint are lost" >&2
    fi
}

# check_run WORLD_SIZE WORD ...: tell every fault of the settings in one line each, in a second.
check_run() {
    python -m megatron_croc check --for-training --dump --world-size "$@" >/dev/null
}
