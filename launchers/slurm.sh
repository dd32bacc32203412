# shellcheck shell=bash
# A training job under Slurm, from the batch script's first line to its requeue. Sourced by
# slurm/pretrain.sbatch and slurm/study.sbatch, which say what is trained:
#
#   start_job ROOT                     site, environment, world, meeting place, log folder
#   ask_vqmoe COMMAND...               one process; sets answer, here the run directory
#   train RUN_DIR COMMAND...           slurm_attempt.sh: preflight, ranks, what follows
#
# Logs: logs/slurm/<job>.out (this script) and logs/slurm/<job>/attempt_<restart>/ (the steps).
# shellcheck disable=SC2034,SC2154  # the files of a job share their variables

start_job() {
    local root=$1 file limit
    for file in slurm_world slurm_step container slurm_requeue slurm_attempt; do
        # shellcheck source=/dev/null
        source "$root/launchers/$file.sh"
    done
    restart=${SLURM_RESTART_COUNT:-0}
    echo "$(date '+%F %T') job $(job_name), attempt $restart, nodes $SLURM_JOB_NODELIST"
    load_site "$root"
    for limit in VQMOE_MAX_RESTARTS VQMOE_MAX_IDLE_ATTEMPTS; do
        [[ "${!limit}" =~ ^(0|[1-9][0-9]*)$ ]] || refuse "$limit=${!limit} is not a whole number"
    done
    # tini passes signals to its own process group, and torchrun's ranks have groups of their own.
    [[ "$VQMOE_CONTAINER/$VQMOE_LAUNCHER" != docker/torchrun ]] || refuse \
        "VQMOE_CONTAINER=docker with VQMOE_LAUNCHER=torchrun: stop requests would not reach the" \
        "ranks; use VQMOE_LAUNCHER=srun, or pyxis or apptainer"
    find_world
    find_meeting_place
    local mounts=()
    read -r -a mounts <<<"$VQMOE_MOUNTS"
    export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} # before the containers' variables are listed
    compose_container "$VQMOE_CONTAINER" "$VQMOE_IMAGE" "$gpus_per_node" "$root" "$PWD" "${mounts[@]}"
    local python=${PYTHON:-}
    if [[ -z "$python" && "$VQMOE_CONTAINER" == none ]]; then
        python=$root/.venv/bin/python
        if [[ ! -x "$python" ]]; then
            echo "no .venv in $root (make setup creates it); using $(command -v python3)"
            python=python3
        fi
    fi
    vqmoe=("${python:-python3}" -m vqmoe_megatron.cli)
    rank=("${container_srun_args[@]}" "${container_command[@]}" "$root/launchers/rank.sh")
    beside=("${container_command[@]}") # how one process starts beside this script
    # pyxis has no command of its own.
    if ((${#container_srun_args[@]})); then beside=(srun "${one_task[@]}" "${container_srun_args[@]}"); fi
    logs=logs/slurm/$(job_name)/attempt_$restart
    mkdir -p "$logs"
    echo "$world_size ranks by $VQMOE_LAUNCHER meet at $MASTER_ADDR:$MASTER_PORT; logs in $logs"
}

# ask_vqmoe COMMAND...: one process, before anything starts; sets answer to its last line. A refusal
# ends the job with its message.
ask_vqmoe() {
    local code=0
    answer=$(VQMOE_KEEP_SIGNALS=1 srun "${one_task[@]}" "${rank[@]}" "${vqmoe[@]}" "$@" |
        tail -n1) || code=$?
    num_steps=$((num_steps + 1))
    if was_told_to_stop "$code"; then queue_again "told to stop before training"; fi
    ((code == 0)) || exit "$code"
}
