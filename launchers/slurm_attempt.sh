# shellcheck shell=bash
# One attempt of a training job: guard, preflight, ranks, and what follows from how they ended.
# Sourced by slurm.sh, whose variables it uses.
# shellcheck disable=SC2034,SC2154  # the files of a job share their variables

# check_ranks RUN_DIR: the preflight. A stop request that Slurm sends to the step itself (scancel
# --signal, preemption) ends it with 128 + the signal's number; srun's own TERM to the other ranks of a
# bad one would look the same, so it sends none.
check_ranks() {
    local code=0
    VQMOE_KEEP_SIGNALS=1 run_step "${tasks[@]}" --wait=360 --kill-on-bad-exit=0 \
        --output="$logs/preflight.log" "${rank[@]}" "${vqmoe[@]}" preflight --run-dir "$1" || code=$?
    cat "$logs/preflight.log"
    if was_told_to_stop "$code"; then stop_request=sent; fi
    return "$code"
}

was_told_to_stop() { (($1 == 128 + 10 || $1 == 128 + 15)); }

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

# The last lines of a rank that says what went wrong, or of the first.
show_failed_rank() {
    local log said='^(\[rank[0-9]+\]: )?(Traceback|error:|failed:)'
    log=$(grep -lE "$said" "$logs"/rank_*.log 2>/dev/null | sort -V | head -n1 || true)
    log=${log:-$logs/rank_0.log}
    echo "$log ends with:"
    tail -n 20 "$log" 2>/dev/null || true
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
        leave_if_ended
        echo "giving up: the preflight failed, nothing was trained"
        exit 1
    fi
    [[ $stop_request == none ]] || queue_again "told to stop before training"
    echo "$(date '+%F %T') training in $run_dir from iteration $start"
    run_ranks "$@" || code=$?
    decision=$(decide_requeue "$run_dir" "$(job_name)" "$start" "$mark" "$restart" \
        "$VQMOE_MAX_RESTARTS")
    echo "$(date '+%F %T') ranks ended (srun: $code); decision: $decision"
    case "$decision" in
        done*) exit 0 ;;
        requeue*) queue_again "${decision#requeue }" ;;
        *)
            show_failed_rank
            echo "giving up: ${decision#give-up }"
            exit 1
            ;;
    esac
}
