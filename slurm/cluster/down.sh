#!/usr/bin/env bash
# Stop the virtual cluster of up.sh: its jobs, its daemons, and what is left of their processes.
set -euo pipefail

usage() {
    cat <<'HELP'
usage: slurm/cluster/down.sh

Ends every job and daemon of the cluster and removes its state; the logs stay in
$VQMOE_CLUSTER_DIR/log (default $TMPDIR/vqmoe_slurm_cluster/log). Nothing to stop is no error.

example
  VQMOE_CLUSTER_DIR=/tmp/trial slurm/cluster/down.sh
HELP
}

if [[ "${1:-}" == "-h" || "${1:-}" == "--help" ]]; then
    usage
    exit 0
fi
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=slurm/cluster/place.sh
source "$here/place.sh"

if [[ ! -e "$conf" ]]; then
    echo "down.sh: no cluster in $cluster_dir"
    exit 0
fi
require_root
require_own_folder

# has_variable PID TEXT: the process was started with an environment line that begins so.
has_variable() { { tr '\0' '\n' <"/proc/$1/environ" | grep "^$2" >/dev/null; } 2>/dev/null; }

# Processes of this cluster's jobs carry both variables; a shell that only uses it has but one.
job_processes() {
    local folder
    for folder in /proc/[0-9]*; do
        if has_variable "${folder#/proc/}" "SLURM_CONF=$conf" &&
            has_variable "${folder#/proc/}" "SLURM_JOB_ID="; then
            echo "${folder#/proc/}"
        fi
    done
}

# Every process of this cluster, slurmstepd included, was started with its SLURM_CONF.
step_daemons() {
    local comm pid
    for comm in /proc/[0-9]*/comm; do
        [[ "$(cat "$comm" 2>/dev/null)" == slurmstepd ]] || continue
        pid=${comm#/proc/}
        pid=${pid%/comm}
        if has_variable "$pid" "SLURM_CONF=$conf"; then echo "$pid"; fi
    done
}

no_jobs() { [[ -z "$(squeue -h 2>/dev/null)" ]]; }
no_daemons() {
    local pid_file name
    for pid_file in "${daemons[@]}"; do
        name=$(basename "$pid_file" .pid)
        if is_alive "$pid_file" "${name%%_*}"; then return 1; fi
    done
}

export SLURM_CONF=$conf
if is_alive "$cluster_dir/slurmctld.pid" slurmctld; then
    squeue -h -o %A 2>/dev/null | sort -u | xargs -r scancel 2>/dev/null || true
    wait_until 15 no_jobs || echo "down.sh: some jobs do not end; killing their processes" >&2
fi
daemons=("$cluster_dir"/slurmctld.pid "$cluster_dir"/slurmd_*.pid "$cluster_dir"/munged.pid)
for signal in TERM KILL; do
    for pid_file in "${daemons[@]}"; do
        name=$(basename "$pid_file" .pid)
        if is_alive "$pid_file" "${name%%_*}"; then kill -s "$signal" "$(<"$pid_file")" || true; fi
    done
    wait_until 10 no_daemons && break
done
mapfile -t left < <(job_processes; step_daemons)
if ((${#left[@]})); then
    kill -KILL "${left[@]}" 2>/dev/null || true
fi
rm -rf "$cluster_dir"/{state,spool_*,overlay,slurmctld.pid,slurmd_*.pid,gpu[0-9]*,gres.conf}
rm -f "$munge_socket"* "$cluster_dir"/munge{d.pid,d.seed,.key} "$conf"
echo "down.sh: the cluster in $cluster_dir is stopped; its logs stay in $cluster_dir/log"
