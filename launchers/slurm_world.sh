# shellcheck shell=bash
# The world of a Slurm job: its name, its nodes and tasks, where its ranks meet. Sourced.
# shellcheck disable=SC2034,SC2154  # the files of a job share their variables

# shellcheck source=launchers/meeting_host.sh
source "$(dirname "${BASH_SOURCE[0]}")/meeting_host.sh"

refuse() {
    echo "error: $*" >&2
    exit 2
}

# An array task by its array's name: the last task has the array's own number, which means all.
job_name() {
    if [[ -n "${SLURM_ARRAY_JOB_ID:-}" ]]; then
        echo "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"
    else
        echo "$SLURM_JOB_ID"
    fi
}

# load_site ROOT: the site profile, then env.sh. Both keep what the user has set.
load_site() {
    local profile=$1/slurm/sites/${VQMOE_SITE:-${SLURM_CLUSTER_NAME:-}}.sh
    if [[ -f "$profile" ]]; then
        echo "site profile: $profile"
        # shellcheck source=slurm/sites/virtual.sh
        source "$profile"
    elif [[ -n "${VQMOE_SITE:-}" ]]; then
        refuse "VQMOE_SITE=$VQMOE_SITE: there is no $profile; there are" \
            "$(cd "$1/slurm/sites" && printf '%s ' *.sh)"
    fi
    # shellcheck source=slurm/env.sh
    source "$1/slurm/env.sh"
}

# Sets num_tasks, gpus_per_node, ranks_per_task and world_size, and srun's options: tasks for all ranks,
# one_task for a single process.
find_world() {
    local num_nodes=$SLURM_JOB_NUM_NODES tasks_per_node=${SLURM_NTASKS_PER_NODE:-}
    gpus_per_node=${SLURM_GPUS_ON_NODE:-0}
    ranks_per_task=1
    one_task=(--nodes=1 --ntasks=1 --ntasks-per-node=1)
    # Unless told, a step wants the GPUs of all nodes.
    if ((gpus_per_node)); then one_task+=(--gpus-per-node="$gpus_per_node"); fi
    if [[ -n "${SLURM_NTASKS:-}" && "$SLURM_NTASKS" != "$((num_nodes * ${tasks_per_node:-0}))" ]]; then
        # --ntasks, beside which --ntasks-per-node is a maximum: "2(x4)", or "3,1" where it filled
        # what was free
        [[ "$SLURM_TASKS_PER_NODE" =~ ^([0-9]+)(\(x[0-9]+\))?$ ]] &&
            tasks_per_node=${BASH_REMATCH[1]} || tasks_per_node=uneven
    fi
    tasks_per_node=${tasks_per_node:-1}
    if [[ "$tasks_per_node" == uneven ]]; then
        num_tasks=$SLURM_NTASKS
        tasks=(--ntasks="$num_tasks")
    else
        num_tasks=$((num_nodes * tasks_per_node))
        tasks=(--ntasks="$num_tasks" --ntasks-per-node="$tasks_per_node")
    fi
    case "$VQMOE_LAUNCHER" in
        srun)
            ((gpus_per_node == 0)) || [[ "$tasks_per_node" == "$gpus_per_node" ]] || refuse \
                "tasks per node = GPUs per node fails: $tasks_per_node != $gpus_per_node;" \
                "sbatch --ntasks-per-node=$gpus_per_node, or VQMOE_LAUNCHER=torchrun with 1"
            ;;
        torchrun)
            ranks_per_task=${VQMOE_RANKS_PER_NODE:-$((gpus_per_node ? gpus_per_node : 1))}
            [[ "$ranks_per_task" =~ ^[1-9][0-9]{0,5}$ ]] || refuse \
                "VQMOE_RANKS_PER_NODE=$ranks_per_task is no number of ranks (1 or more)"
            [[ "$tasks_per_node" == 1 ]] || refuse \
                "VQMOE_LAUNCHER=torchrun starts the ranks of a node from one task:" \
                "tasks per node = 1 fails: $tasks_per_node; sbatch --ntasks-per-node=1"
            ;;
        *) refuse "VQMOE_LAUNCHER=$VQMOE_LAUNCHER is not one of srun, torchrun" ;;
    esac
    world_size=$((num_tasks * ranks_per_task))
}

# Sets and exports MASTER_ADDR, MASTER_PORT and VQMOE_NODES. Call it outside containers: there is
# no scontrol inside, and a guessed address gives every node a world of its own and a silent hang.
find_meeting_place() {
    local address
    VQMOE_NODES=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | tr '\n' ' ') || VQMOE_NODES=""
    MASTER_ADDR=$(plain_host "${VQMOE_MASTER_ADDR:-${VQMOE_NODES%% *}}")
    [[ -n "$MASTER_ADDR" ]] || refuse "MASTER_ADDR is empty: 'scontrol show hostnames" \
        "$SLURM_JOB_NODELIST' named no node; set VQMOE_MASTER_ADDR to the first node's address"
    if ! resolves "$MASTER_ADDR"; then
        # Not every answer of scontrol is a node: it says "not found" in the same place.
        address=$(scontrol show node "$MASTER_ADDR" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p') || true
        [[ -n "$address" ]] || refuse "MASTER_ADDR=$MASTER_ADDR does not resolve, and Slurm knows" \
            "no NodeAddr for it; set VQMOE_MASTER_ADDR"
        echo "MASTER_ADDR: $MASTER_ADDR does not resolve here, using its NodeAddr $address"
        MASTER_ADDR=$address
    fi
    # Another port for every job and restart: ranks of a dead node's last attempt may still listen.
    # Below 32768, where the kernel's own choices begin.
    MASTER_PORT=$((20000 + (SLURM_JOB_ID * 16 + ${SLURM_RESTART_COUNT:-0} % 16) % 12000))
    export MASTER_ADDR MASTER_PORT VQMOE_NODES
}
