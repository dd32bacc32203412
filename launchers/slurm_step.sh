# shellcheck shell=bash
# One srun step of a batch script: started in the background, told of stop requests, waited for.
# Sourced.
#
# Slurm signals the batch shell (#SBATCH --signal=B:USR1@300, scancel --batch). The shell passes it on
# to the running step; the ranks save at the next step boundary and end by themselves. Other signals,
# of scancel --signal and of a preemption, reach the step's processes without the shell's help.

num_steps=0       # Slurm numbers the steps of an attempt from 0, in this order
stop_request=none # none -> wanted (a signal came) -> sent (the step's tasks have it)

on_signal() {
    echo "$(date '+%F %T') batch script received $1: asking the ranks to save and stop"
    stop_request=wanted
}
trap 'on_signal USR1' USR1
trap 'on_signal TERM' TERM

# run_step SRUN_ARGUMENT...: run the step to its end; its exit code. A step that is being created
# cannot be told yet, so telling is tried until it works.
run_step() {
    local step pid code=0
    step=$(job_name).$num_steps
    num_steps=$((num_steps + 1))
    srun "$@" &
    pid=$!
    while kill -0 "$pid" 2>/dev/null; do
        if [[ "$stop_request" == wanted ]] && scancel --signal=USR1 "$step" 2>/dev/null; then
            stop_request=sent
            echo "$(date '+%F %T') sent USR1 to step $step"
        fi
        # A trapped signal ends this wait early; the srun is waited for below.
        sleep 1 &
        wait $! || true
    done
    wait "$pid" || code=$?
    return "$code"
}
