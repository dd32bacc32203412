# shellcheck shell=bash
# One attempt of a training job: guard, preflight, ranks, and what follows from how they ended.
# Sourced by slurm.sh, whose variables it uses.
# shellcheck disable=SC2034,SC2154  # the files of a job share their variables

# The controller may be busy or restarting for a while.
try_often() {
    local try
    for try in 1 2 3 4 5 6; do
        "$@" && return 0
        [[ $try -eq 6 ]] || sleep 10
    done
    return 1
}

# Whether this attempt is still the job's: Slurm may be cancelling or requeueing it already, or,
# after the death of this node's slurmd, have started the next one elsewhere.
job_is_ours() {
    local record
    job_state=unknown
    record=$(try_often scontrol show job "$(job_name)") || return 1
    job_state=$(sed -n 's/.*JobState=\([A-Z_]*\).*/\1/p' <<<"$record" | head -n1)
    [[ "$job_state" == RUNNING && "$record" == *" Restarts=$restart "* ]]
}

check_ranks() {
    local code=0
    VQMOE_KEEP_SIGNALS=1 run_step "${tasks[@]}" --wait=360 \
        --output="$logs/preflight.log" "${rank[@]}" "${vqmoe[@]}" preflight --run-dir "$1" || code=$?
    cat "$logs/preflight.log"
    return "$code"
}

run_ranks() {
    local torchrun=() options=("${tasks[@]}" --output="$logs/rank_%t.log")
    if [[ "$VQMOE_LAUNCHER" == torchrun ]]; then
        torchrun=("${vqmoe[0]}" -m torch.distributed.run --nnodes="$num_tasks"
            --nproc-per-node="$ranks_per_task" --master-addr="$MASTER_ADDR"
            --master-port="$MASTER_PORT" --rdzv-id="$(job_name)" --max-restarts=0
            --signals-to-handle="SIGTERM,SIGINT,SIGUSR1" --shutdown-timeout=600 --no-python
            "${rank[-1]}")
        options+=(--wait=600 --kill-on-bad-exit=0) # its own code is 1 after a clean stop
    else
        options+=(--wait=600 --kill-on-bad-exit=1) # the first rank still reports when others are done
    fi
    run_step "${options[@]}" "${rank[@]}" "${torchrun[@]}" "${vqmoe[@]}" "$@"
}

# queue_again REASON: does not return.
queue_again() {
    if ! job_is_ours; then
        echo "not queued here: Slurm itself ends this attempt (job state $job_state)"
        exit 0
    fi
    echo "$(date '+%F %T') queued again: $1"
    trap '' USR1 TERM # the requeue ends this script too
    try_often scontrol requeue "$(job_name)" && exit 0
    echo "giving up: Slurm did not take the requeue"
    exit 1
}

# train RUN_DIR COMMAND...: does not return. Exit 0: done, or queued again; 1: given up, with why.
train() {
    local run_dir=$1 code=0 decision start mark
    shift
    begin_attempt "$run_dir" "$(job_name)" "$restart" "$VQMOE_MAX_RESTARTS" \
        "$VQMOE_MAX_IDLE_ATTEMPTS" || exit 1
    start=$(saved_iteration "$run_dir")
    mark=$(status_mark "$run_dir")
    if [[ "$VQMOE_PREFLIGHT" == 1 ]] && ! check_ranks "$run_dir" && [[ $stop_request == none ]]; then
        echo "giving up: the preflight failed, nothing was trained"
        exit 1
    fi
    [[ $stop_request == none ]] || queue_again "told to stop before training"
    echo "$(date '+%F %T') training in $run_dir from iteration $start"
    run_ranks "$@" || code=$?
    decision=$(decide_requeue "$run_dir" "$start" "$mark" "$restart" "$VQMOE_MAX_RESTARTS")
    echo "$(date '+%F %T') ranks ended (srun: $code); decision: $decision"
    case "$decision" in
        done*) exit 0 ;;
        requeue*) queue_again "${decision#requeue }" ;;
        *)
            tail -n 20 "$logs/rank_0.log" 2>/dev/null || true
            echo "giving up: ${decision#give-up }"
            exit 1
            ;;
    esac
}
