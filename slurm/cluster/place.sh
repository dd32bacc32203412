# shellcheck shell=bash
# Where the virtual cluster lives and how its daemons are found. Sourced by up.sh and down.sh.
# shellcheck disable=SC2034  # what is set here is used there

cluster_dir=${VQMOE_CLUSTER_DIR:-${TMPDIR:-/tmp}/vqmoe_slurm_cluster}
conf=$cluster_dir/slurm.conf
munge_socket=$cluster_dir/munge.socket
marker="# Written by slurm/cluster/up.sh" # how its slurm.conf begins

refuse() {
    echo "$(basename "$0"): $*" >&2
    exit 2
}

# Slurm's daemons as root can start a task of any user; munged and slurmd refuse less than that.
require_root() {
    [[ $(id -u) -eq 0 ]] || refuse "must be run as root: slurmd starts other people's processes"
}

# The folder is a cluster's, or new, and nobody else's: what is in it is overwritten and removed as
# root, and its munge key is believed.
require_own_folder() {
    # slurm.conf ends a value at a space and replaces %n; the line of up.sh is for eval.
    [[ "$cluster_dir" =~ ^/[A-Za-z0-9/._+-]+$ ]] || refuse "VQMOE_CLUSTER_DIR=$cluster_dir must be an" \
        "absolute path of letters, digits and / . _ + -"
    [[ -e "$cluster_dir" ]] || return 0
    [[ -O "$cluster_dir" ]] || refuse "VQMOE_CLUSTER_DIR=$cluster_dir belongs to another user"
    if [[ -e "$conf" ]]; then
        [[ "$(head -n1 "$conf")" == "$marker"* ]] ||
            refuse "$conf was not written by up.sh; set VQMOE_CLUSTER_DIR to a folder of its own"
    elif [[ -n "$(find "$cluster_dir" -mindepth 1 -maxdepth 1 ! -name log ! -name state)" ]]; then
        refuse "VQMOE_CLUSTER_DIR=$cluster_dir is no cluster's and not empty; set it to a new folder"
    fi
}

require_commands() {
    local missing=() command
    for command in "$@"; do
        command -v "$command" >/dev/null || missing+=("$command")
    done
    [[ ${#missing[@]} -eq 0 ]] ||
        refuse "not installed: ${missing[*]}. On Debian: slurm/cluster/install.sh"
}

# is_alive PID_FILE NAME: the daemon of that file runs, and the process is no stranger's.
is_alive() {
    local pid
    [[ -s "$1" ]] && pid=$(<"$1") && [[ "$(cat "/proc/$pid/comm" 2>/dev/null)" == "$2" ]]
}

# wait_until SECONDS COMMAND...: true as soon as the command is, false when time is over.
wait_until() {
    local deadline=$((SECONDS + $1))
    shift
    until "$@"; do
        ((SECONDS < deadline)) || return 1
        sleep 0.2
    done
}
