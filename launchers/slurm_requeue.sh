# shellcheck shell=bash
# How an attempt is handed back to Slurm's controller, which may be slow, gone, or ahead. Sourced by
# slurm.sh, whose variables it uses.
# shellcheck disable=SC2154  # the files of a job share their variables

CONTROLLER_TRIES=30 # 10 s apart: the controller may be restarting, or failing over to another host

try_often() {
    local try
    for ((try = 1; try <= CONTROLLER_TRIES; try++)); do
        "$@" && return 0
        ((try == CONTROLLER_TRIES)) && break
        echo "waiting for Slurm's controller (try $try of $CONTROLLER_TRIES)" >&2
        sleep 10
    done
    return 1
}

# Ends this script quietly where the attempt is no longer the job's: Slurm may be cancelling or
# requeueing it already, or, after the death of this node's slurmd, have started the next one
# elsewhere. Without an answer the job fails: an end with 0 would be taken for a finished run.
leave_if_ended() {
    local record job_state
    record=$(try_often scontrol show job "$(job_name)") || {
        echo "giving up: Slurm's controller does not answer, so the job cannot be queued again"
        exit 1
    }
    job_state=$(sed -n 's/.*JobState=\([A-Z_]*\).*/\1/p' <<<"$record" | head -n1)
    if [[ "$job_state" != RUNNING || "$record" != *" Restarts=$restart "* ]]; then
        echo "not queued here: Slurm itself ends this attempt (job state $job_state)"
        exit 0
    fi
}

# queue_again REASON: does not return.
queue_again() {
    leave_if_ended
    echo "$(date '+%F %T') queued again: $1"
    trap '' USR1 TERM # the requeue ends this script too
    try_often scontrol requeue "$(job_name)" && exit 0
    echo "giving up: Slurm did not take the requeue"
    exit 1
}
