# shellcheck shell=bash
# Whether an ended attempt is queued again, and whether a started one may run. Sourced.
#
# Decided on what the run directory says, never on an exit code:
#   status.json                                       state and reason
#   checkpoints/latest_checkpointed_iteration.txt     where the next attempt would start
#   slurm_attempts.tsv                                job, restart, iteration at its start
#
# The last file is the guard's own. An attempt that ended by itself and leaves no newer checkpoint
# behind than it found would do the same again. One that was told to stop, a node that dies, and an
# administrator's requeue say nothing about the next: begin_attempt bounds those.

ATTEMPTS_FILE=slurm_attempts.tsv
# What a rank says when the rank at the other end of a connection is gone.
LOST_PEER='DistBackendError|DistNetworkError|DistStoreError|Connection (closed|reset|refused)'
LOST_PEER+='|Broken pipe|Timed out waiting|pair closure|No route to host'

# status_field RUN_DIR NAME: one field of status.json (one per line there), empty when absent.
status_field() {
    sed -n "s/^ *\"$2\": //p" "$1/status.json" 2>/dev/null | sed 's/,$//; s/^"//; s/"$//' || true
}

# saved_iteration RUN_DIR: the newest checkpoint's iteration, 0 without one.
saved_iteration() {
    local text=""
    read -r text 2>/dev/null <"$1/checkpoints/latest_checkpointed_iteration.txt" || true
    if [[ "$text" =~ ^[0-9]+$ ]]; then echo "$((10#$text))"; else echo 0; fi
}

# status_mark RUN_DIR: differs once status.json has been written again.
status_mark() {
    stat -c '%i %y' "$1/status.json" 2>/dev/null || echo none
}

# begin_attempt RUN_DIR JOB RESTART MAX_RESTARTS MAX_IDLE_ATTEMPTS: note that an attempt starts.
# False, with a line that says why, when it must not: too many restarts, or too many attempts of
# this job in a row that began at the same iteration. Where restarts do not go up, the lines before are
# of another job of that number, on a cluster that counts from 1 again.
begin_attempt() {
    local run_dir=$1 job=$2 restart=$3 max_restarts=$4 max_idle=$5 now idle=0
    local line_job line_restart at last=-1
    now=$(saved_iteration "$run_dir")
    if [[ -f "$run_dir/$ATTEMPTS_FILE" ]]; then
        while IFS=$'\t' read -r line_job line_restart at; do
            [[ "$line_job" == "$job" ]] || continue
            ((line_restart > last)) || idle=0
            last=$line_restart
            if [[ "$at" == "$now" ]]; then idle=$((idle + 1)); else idle=0; fi
        done <"$run_dir/$ATTEMPTS_FILE"
        ((restart > last)) || idle=0
    fi
    if ((restart > max_restarts)); then
        echo "giving up: restart $restart is more than VQMOE_MAX_RESTARTS=$max_restarts allows"
        return 1
    fi
    if ((idle >= max_idle)); then
        echo "giving up: $idle attempts of job $job began at iteration $now and left no newer" \
            "checkpoint (VQMOE_MAX_IDLE_ATTEMPTS=$max_idle)"
        return 1
    fi
    printf '%s\t%s\t%s\n' "$job" "$restart" "$now" >>"$run_dir/$ATTEMPTS_FILE"
}

# decide_requeue RUN_DIR JOB START_ITERATION MARK_AT_START RESTART MAX_RESTARTS: prints
# "done|requeue|give-up REASON".
decide_requeue() {
    local run_dir=$1 job=$2 start=$3 mark=$4 restart=$5 max_restarts=$6 state reason now writer
    writer=$(status_field "$run_dir" slurm_job)
    state=$(status_field "$run_dir" state)
    reason=$(status_field "$run_dir" reason)
    now=$(saved_iteration "$run_dir")
    # A rank was killed, and another one noticed before srun ended it.
    if [[ "$state" == failed && "$reason" =~ $LOST_PEER ]]; then state=running; fi
    if [[ "$(status_mark "$run_dir")" == "$mark" ]]; then
        echo "give-up the ranks ended before they wrote a status"
    elif [[ -n "$writer" && "$writer" != null && "$writer" != "$job" ]]; then
        echo "give-up job $writer trains in this run directory"
    elif [[ "$state" == completed ]]; then
        echo "done iteration $(status_field "$run_dir" iteration): $reason"
    elif [[ "$state" != requeue && "$state" != running ]]; then
        echo "give-up the run has state '$state': $reason"
    elif [[ "$state" != requeue ]] && ((now <= start)); then
        echo "give-up no progress: the attempt began at iteration $start and its newest" \
            "checkpoint is of $now (state $state: $reason)"
    elif ((restart >= max_restarts)); then
        echo "give-up restart $restart was the last that VQMOE_MAX_RESTARTS=$max_restarts allows" \
            "(state $state: $reason)"
    elif [[ "$state" == running ]]; then
        echo "requeue the ranks were killed after iteration $start -> $now"
    else
        echo "requeue iteration $start -> $now: $reason"
    fi
}
