# shellcheck shell=bash
# Compose the container prefix of a command. Sourced; paths are the same inside and outside.
#
#   compose_container KIND IMAGE NUM_GPUS MOUNT...
#
# KIND       none | pyxis | apptainer | docker
# IMAGE      what that kind understands: registry#name:tag or .sqsh, .sif, a docker tag
# NUM_GPUS   per node; 0 leaves GPU options out
# MOUNT      PATH, OUTSIDE:INSIDE or OUTSIDE:INSIDE:ro
#
# sets two arrays:
#   container_srun_args   options for srun itself (pyxis)
#   container_command     what stands before the command (apptainer, docker)
#
# example
#   compose_container apptainer vqmoe.sif 8 "$PWD" /data
#   srun "${container_srun_args[@]}" "${container_command[@]}" vqmoe doctor

# The variables a docker container is given; the other kinds pass the whole environment on.
DOCKER_VARIABLES='^(SLURM_|VQMOE_|MASTER_|PET_|NCCL_|GLOO_|TORCH|PYTORCH_|OMP_|CUDA_|PYTHON|MLFLOW_|TRITON_)'
# srun sets these in each task, after the prefix was composed.
TASK_VARIABLES=(SLURM_PROCID SLURM_LOCALID SLURM_NODEID SLURM_NTASKS SLURM_STEP_ID PET_NODE_RANK
    VQMOE_KEEP_SIGNALS)

container_refuse() {
    echo "container.sh: $*" >&2
    exit 2
}

compose_container() {
    (($# >= 3)) || container_refuse "compose_container KIND IMAGE NUM_GPUS MOUNT..."
    local kind=$1 image=$2 num_gpus=$3 mount name
    shift 3
    container_srun_args=()
    container_command=()
    case "$kind" in
        none | pyxis | apptainer | docker) ;;
        *) container_refuse "VQMOE_CONTAINER=$kind is not one of none, pyxis, apptainer, docker" ;;
    esac
    if [[ "$kind" == none ]]; then return; fi
    [[ -n "$image" ]] || container_refuse "VQMOE_CONTAINER=$kind needs an image: set VQMOE_IMAGE"

    local mounts=()
    for mount in "$@"; do
        [[ "$mount" == *:* ]] || mount=$mount:$mount
        [[ "$mount" =~ ^/[^:]*:/[^:]*(:[a-z]+)?$ ]] || container_refuse \
            "mount '$mount' must be PATH, OUTSIDE:INSIDE or OUTSIDE:INSIDE:ro, absolute, without colons"
        [[ "$mount" != *,* ]] || container_refuse "mount '$mount' must not contain a comma"
        mounts+=("$mount")
    done
    case "$kind" in
        pyxis)
            container_srun_args=(--container-image="$image" --container-workdir="$PWD")
            if ((${#mounts[@]})); then
                container_srun_args+=(--container-mounts="$(IFS=, && echo "${mounts[*]}")")
            fi
            ;;
        apptainer)
            container_command=(apptainer exec --pwd "$PWD")
            if ((num_gpus)); then container_command+=(--nv); fi
            for mount in "${mounts[@]}"; do container_command+=(--bind "$mount"); done
            container_command+=("$image")
            ;;
        docker)
            ((${SLURM_JOB_NUM_NODES:-1} == 1)) || container_refuse \
                "docker is for one node, not $SLURM_JOB_NUM_NODES; use pyxis or apptainer"
            # Host network and IPC: ranks meet on the node's address and share memory.
            # Signals go to the whole group: the first process, rank.sh, would keep them.
            container_command=(docker run --rm --init --env TINI_KILL_PROCESS_GROUP=1
                --network host --ipc host --workdir "$PWD" --user "$(id -u):$(id -g)")
            if ((num_gpus)); then container_command+=(--gpus all); fi
            for mount in "${mounts[@]}"; do container_command+=(--volume "$mount"); done
            while read -r name; do
                container_command+=(--env "$name")
            done < <({ compgen -e | grep -E "$DOCKER_VARIABLES"; printf '%s\n' "${TASK_VARIABLES[@]}"; } | sort -u)
            # The image's entry point must not stand before the command.
            container_command+=(--entrypoint /usr/bin/env "$image")
            ;;
    esac
}
