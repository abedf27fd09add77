# shellcheck shell=bash
# wait_for PID: wait for a background process, however many signals arrive meanwhile; its exit
# status is in $status. A trap has to set signalled=1, because it makes `wait` return early.
wait_for() {
    local code
    status=0
    while :; do
        signalled=0
        code=0
        wait "$1" 2>/dev/null || code=$? # quiet: bash would tell of a killed process
        # shellcheck disable=SC2034  # the caller reads it
        ((code == 127)) || status=$code # 127: an earlier `wait` had the answer already
        ((signalled)) || break
    done
}
