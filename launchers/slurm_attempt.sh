# shellcheck shell=bash
# One attempt of a training job: preflight, ranks, and what follows from how they ended. Whether it may
# start, and start again, is `vqmoe attempt`'s to say.
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

# ask_attempt begin|decide ARGUMENT...: sets answer to what `vqmoe attempt` says, a verdict and why.
# Without an answer the job ends, by itself or by Slurm. A stop request is for the ranks, not for it.
ask_attempt() {
    local code=0
    if [[ "${beside[0]:-}" == srun ]]; then num_steps=$((num_steps + 1)); fi
    answer=$(trap '' USR1 TERM && "${beside[@]}" "${vqmoe[@]}" attempt "$@" | tail -n1) || code=$?
    if ((code)) || [[ ! "$answer" =~ ^(begin|done|requeue|give-up)\  ]]; then
        leave_if_ended
        echo "giving up: no answer from '${vqmoe[*]} attempt $1' (exit code $code)"
        exit 1
    fi
}

# train RUN_DIR COMMAND...: does not return. Exit 0: done, or queued again; 1: given up, with why.
train() {
    local run_dir=$1 code=0 verdict start mark attempt
    shift
    attempt=("$run_dir" --job "$(job_name)" --restart "$restart" --max-restarts "$VQMOE_MAX_RESTARTS")
    ask_attempt begin "${attempt[@]}" --max-idle-attempts "$VQMOE_MAX_IDLE_ATTEMPTS"
    read -r verdict start mark <<<"$answer"
    if [[ "$verdict" != begin ]]; then
        echo "giving up: ${answer#give-up }"
        exit 1
    fi
    if [[ "$VQMOE_PREFLIGHT" == 1 ]] && ! check_ranks "$run_dir" && [[ $stop_request == none ]]; then
        leave_if_ended
        echo "giving up: the preflight failed, nothing was trained"
        exit 1
    fi
    [[ $stop_request == none ]] || queue_again "told to stop before training"
    echo "$(date '+%F %T') training in $run_dir from iteration $start"
    run_ranks "$@" || code=$?
    ask_attempt decide "${attempt[@]}" --iteration "$start" --mark "$mark"
    echo "$(date '+%F %T') ranks ended (srun: $code); decision: $answer"
    case "$answer" in
        done*) exit 0 ;;
        requeue*) queue_again "${answer#requeue }" ;;
        *)
            show_failed_rank
            echo "giving up: ${answer#give-up }"
            exit 1
            ;;
    esac
}
